"""What an engine is: how it is found, how it is asked to run a workload, and how it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ...errors import LayerPruneError
from ..workload import Workload


class EngineError(LayerPruneError):
    """An engine does not run a model.

    Args:
        reason (`str`): What it says.
        model (`str`): The path of the model.
    """

    def __init__(self, reason: str, model: str) -> None:
        super().__init__(reason)
        self.reason, self.model = reason, model


@dataclass(frozen=True)
class Timed:
    """What an engine measured.

    Args:
        runs (`dict[Workload, dict[str, list[dict[str, float]]]]`): The metrics of each repeat, by the path of the model,
            named as in `metrics.json`.
        dtype (`str`): The type of the weights, as the engine names it.
        device (`str`): What it ran on.
        version (`str`): The engine's version.
        settings (`dict[str, int | str]`): What else decides the speed, such as the number of threads.
    """

    runs: dict[Workload, dict[str, list[dict[str, float]]]]
    dtype: str
    device: str
    version: str
    settings: dict[str, int | str] = field(default_factory=dict)


class Engine(Protocol):
    """Runs workloads. [`llama_cpp.LlamaCpp`] and [`vllm.Vllm`] are such."""

    name: str
    takes_gguf: bool
    largest_batch: int | None

    def find(self) -> None:
        """Look for the engine; raises a `LayerPruneError` with the way to install it."""

    def time(
        self, models: Sequence[str], works: Sequence[Workload], repeats: int, *, dtype: str, device: str
    ) -> Timed:
        """Time models in turns.

        Args:
            models (`Sequence[str]`): Paths of folders or GGUF files.
            works (`Sequence[Workload]`): What to time.
            repeats (`int`): Timed runs of each workload.
            dtype (`str`): The type of the weights, or `"auto"`.
            device (`str`): `"cpu"`, `"cuda"`, ...

        Returns:
            `Timed`: What came out.

        Raises:
            EngineError: The engine does not run one of them.
        """


def explain(engine: str, failed: EngineError, base: str | None, base_runs: bool) -> LayerPruneError:
    """Tell a model that is wrong from one that the engine does not know.

    Args:
        engine (`str`): Its name.
        failed (`EngineError`): How it failed on the model.
        base (`str`, *optional*): The dense model, if one was named.
        base_runs (`bool`): Whether the engine runs that.

    Returns:
        `LayerPruneError`: To raise.
    """
    what = f"{engine} does not run {failed.model}: {failed.reason}"
    if base is None:
        return LayerPruneError(f"{what}; name its base with --base to see whether the engine knows the architecture")
    if base_runs:
        return LayerPruneError(
            f"{what}; it runs {base}, so it knows the architecture, and it is the cut or its file that it can't take"
        )
    return LayerPruneError(f"{what}; it does not run {base} either, so it does not know the architecture")
