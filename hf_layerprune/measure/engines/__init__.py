"""Other programs that run models: what they measure, and how they fail."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import LayerPruneError
from ..requests import Workload


class EngineError(LayerPruneError):
    """An engine does not run the model with the path `model`; the message is what it says."""

    def __init__(self, reason: str, model: str) -> None:
        super().__init__(reason)
        self.model = model


@dataclass(frozen=True)
class EngineTimings:
    """What an engine measured: the metrics of each repeat, named as in `metrics.json`, by the path of the model.

    The type of the weights has the engine's name for it. The settings are what else decides the speed, such as the number
    of threads.
    """

    runs: dict[Workload, dict[str, list[dict[str, float]]]]
    dtype: str
    device: str
    version: str
    settings: dict[str, int | str]
