"""What has to be done while the dense model is at hand: choose the layers, fit the repair.

Both look at the same model and the same calibration set, so they share them.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .. import families
from ..errors import CheckpointError
from ..select import find_criterion, needs_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..calibration.rows import CalibrationSet
    from ..options import CalibrationOptions
    from ..repair import Repair
    from .config import LayerDropConfig

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


def chooses(config: LayerDropConfig) -> bool:
    """Whether the layers are still to be chosen, by a criterion that looks at the dense model."""
    return config.drop_layers is None and needs_model(config.criterion)


def needs_dense(config: LayerDropConfig) -> bool:
    """Whether anything has to be computed from the dense model before this config's cut can be made."""
    return chooses(config) or (config.repair is not None and config.repaired_modules is None)


def runs_dense(config: LayerDropConfig) -> bool:
    """Whether text has to go through the dense model for that."""
    return config.repair is not None or find_criterion(config.criterion).needs == "text"


def prepare(
    config: LayerDropConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    device: str | None = None,
    let_go: bool = False,
) -> Prepared:
    """Choose the layers and fit the repair, as far as the config asks for it.

    Args:
        config (`LayerDropConfig`): What to do. It is left as it is.
        model (`PreTrainedModel`): The dense model. It is left as it is.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; loaded from where the model came from by
            default.
        device (`str`, *optional*): Where layers run, see [`~runtime.walk.LayerWalk`].
        let_go (`bool`, defaults to `False`): Whether mapped weights leave memory after use, see [`~runtime.walk.LayerWalk`].

    Returns:
        `Prepared`: The layers, the repair, and the record of both.
    """
    from ..runtime.walk import LayerWalk

    walk = calibration = repair = None
    record: dict[str, Any] = {}
    if config.repair is not None:
        families.check_stage(model.config, "repair")
    if runs_dense(config):
        walk = LayerWalk(model, device=device, let_go=let_go)
        calibration = calibration_of(config, model, tokenizer, config.revision)
        record["calibration"] = calibration.record()
    drop_layers = config.drop_layers
    if drop_layers is None:
        from ..select import choose_layers

        start = time.perf_counter()
        protected = families.protected_layers(model.config)
        choice = choose_layers(walk or model, calibration, config, protected=protected)
        logger.info("%s", choice.why)
        drop_layers = choice.drop_layers
        record["selection"] = choice.record() | {"seconds": round(time.perf_counter() - start, 3)}
        if len(choice.scores) == 1 and choice.scores[0].layers is not None:
            record["scores"] = {"criterion": config.criterion, "layers": choice.scores[0].layers}
    if config.repair is not None and walk is not None and calibration is not None:
        from ..repair import fit_repair

        repair = fit_repair(walk, drop_layers, calibration, config.repair)
        record["repair"] = {"method": repair.method, "cuts": repair.cuts}
    return Prepared(list(drop_layers), repair, record)


def calibration_of(
    options: CalibrationOptions,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
) -> CalibrationSet:
    """The calibration set that a config or a request names, for a model.

    Args:
        options (`CalibrationOptions`): The text, and how many rows of it.
        model (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): Its tokenizer; loaded from where the model came from by
            default.
        revision (`str`, *optional*): Branch, tag or commit of the tokenizer on the Hub.

    Raises:
        CheckpointError: The model has no tokenizer and the text needs one, or the text can't be read.
    """
    from ..calibration.rows import SELF, load_calibration
    from ..runtime.loading import load_tokenizer

    if tokenizer is None:
        try:
            tokenizer = load_tokenizer(model.name_or_path or "", revision=revision)
        except CheckpointError:
            if options.calibration != SELF:  # a model can write without one
                raise
    return load_calibration(
        options.calibration,
        tokenizer,
        samples=options.calibration_samples,
        length=options.calibration_length,
        seed=options.seed,
        model=model,
    )
