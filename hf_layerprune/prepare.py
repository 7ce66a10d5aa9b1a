"""What has to be done while the dense model is at hand: choose the layers, fit the repair.

Both look at the same model and the same calibration set, so they share them.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .calibration import CalibrationSet
    from .config import LayerDropConfig
    from .repair import Repair

logger = logging.getLogger(__name__)


@dataclass
class Prepared:
    """What was decided with the dense model at hand.

    Args:
        drop_layers (`list[int]`): Base indices of the layers to drop.
        repair (`Repair`, *optional*): The new weights that make up for them.
        record (`dict[str, Any]`): For the lineage: the calibration set, why these layers, what the repair did.
    """

    drop_layers: list[int]
    repair: Repair | None
    record: dict[str, Any]


def needs_dense(config: LayerDropConfig) -> bool:
    """Whether anything has to be computed from the dense model before this config's cut can be made."""
    return config.repair is not None and config.repaired_modules is None


def prepare(
    config: LayerDropConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    drop_layers: Collection[int],
    device: str | None = None,
    let_go: bool = False,
) -> Prepared:
    """Fit what the config asks for.

    Args:
        config (`LayerDropConfig`): What to do.
        model (`PreTrainedModel`): The dense model. It is left as it is.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; loaded from where the model came from by
            default.
        drop_layers (`Collection[int]`): The layers that go.
        device (`str`, *optional*): Where layers run, see [`~walk.LayerWalk`].
        let_go (`bool`, defaults to `False`): Whether mapped weights leave memory after use, see [`~walk.LayerWalk`].

    Returns:
        `Prepared`: The layers, the repair, and the record of both.
    """
    from .repair import fit_repair
    from .walk import LayerWalk

    calibration = calibration_of(config, model, tokenizer)
    repair = fit_repair(LayerWalk(model, device=device, let_go=let_go), list(drop_layers), calibration, config.repair)
    record = {"calibration": calibration.record(), "repair": {"method": repair.method, "cuts": repair.cuts}}
    return Prepared(list(drop_layers), repair, record)


def calibration_of(
    config: LayerDropConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> CalibrationSet:
    """The calibration set that a config names, for a model."""
    from .calibration import SELF, load_calibration
    from .loading import load_tokenizer

    if tokenizer is None and config.calibration != SELF:
        tokenizer = load_tokenizer(model.name_or_path)
    return load_calibration(
        config.calibration,
        tokenizer,
        samples=config.calibration_samples,
        length=config.calibration_length,
        seed=config.seed,
        model=model,
    )
