"""What needs the dense model: choose the layers, fit the repair. Both use the same calibration set."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import families
from ..calibration.rows import SELF, load_calibration
from ..errors import CheckpointError, CutError
from ..families.fields import cut_without
from ..families.layout import find_decoder_layers
from ..layer_ranges import describe_layers
from ..options import format_percent
from ..repair.fit import check_repair, fit_repair
from ..runtime.loading import load_processor, load_tokenizer
from ..runtime.precision import is_packed
from ..runtime.walk import LayerWalk
from ..select import find_criterion, needs_model
from ..select.budget import check_budget_rows
from ..select.runner import choose_layers
from ..select.sets import drop_count
from .resolve import is_already_cut, resolve_drop
from .tail import tuned_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ..calibration.rows import CalibrationSet
    from ..cut.memory import LayerCut
    from ..options import CalibrationOptions
    from ..repair.fit import Repair
    from ..select.targets import Target
    from .config import LayerDropConfig

logger = logging.getLogger(__name__)

# Attributes of a base that say what was done to it: a `LayerCut`, and what was computed before the cut (`Prepared`).
CUT = "_layer_drop_cut"
PREPARED = "_layer_drop_prepared"

_HARDLY = 0.9  # the share left unexplained by a repair that is worth a warning
_MORE_TEXT = "; use more calibration rows, or text that is closer to what the model is for"


@dataclass
class Prepared:
    """What was computed from the dense model.

    Args:
        drop_layers (`list[int]`): Base indices of the layers to drop.
        repair (`Repair`, *optional*): The new weights that make up for them.
        record (`dict[str, Any]`): For the lineage: the calibration set, why these layers, what the repair did.
    """

    drop_layers: list[int]
    repair: Repair | None
    record: dict[str, Any]


def needs_dense_model(config: LayerDropConfig) -> bool:
    """Whether anything has to be computed from the dense model before this config's cut can be made."""
    return needs_model(config) or (config.repair is not None and config.repaired_modules is None)


def needs_text(config: LayerDropConfig) -> bool:
    """Whether text has to go through the dense model for that."""
    return config.repair is not None or config.budget is not None or find_criterion(config.criterion).needs == "text"


def prepare(
    config: LayerDropConfig,
    model: PreTrainedModel,
    cut: LayerCut | None = None,
    *,
    target: Target | None = None,
    device: torch.device | None = None,
) -> Prepared:
    """Choose the layers and fit the repair, as far as the config asks for it.

    Args:
        config (`LayerDropConfig`): What to do. Its `drop_layers` is filled in.
        model (`PreTrainedModel`): The dense model; left unchanged.
        cut (`LayerCut`, *optional*): The cut that was made in the model already, if any.
        target (`Target`, *optional*): What must be left, if that says how many layers go and is worked out already.
        device (`torch.device`, *optional*): Where layers run, see [`~runtime.walk.LayerWalk`].

    Returns:
        `Prepared`: The layers, the repair, and the record of both.

    Raises:
        CutError: The model is cut already, the layers can't be chosen, or the repair can't be fitted.
    """
    _check(config, model, cut, target)
    walk = calibration = repair = None
    record: dict[str, Any] = {}
    if needs_text(config):
        walk = LayerWalk(model, device=device)
        calibration = load_calibration_for(config, walk, config.revision)
        record["calibration"] = calibration.record()
    if config.drop_layers is None:
        start = time.perf_counter()
        protected = families.protected_layers(model.config)
        choice = choose_layers(walk or model, calibration, config, protected=protected, target=target)
        logger.info("%s", choice.why)
        config.drop_layers, repair = choice.drop_layers, choice.repair
        record["selection"] = choice.record() | {"seconds": round(time.perf_counter() - start, 3)}
    if config.repair is not None and walk is not None and calibration is not None:
        timing = {}
        if repair is None:  # a search within a budget has fitted it already
            start = time.perf_counter()
            logger.info("fitting the repair %s to the calibration rows", config.repair)
            repair = fit_repair(walk, config.drop_layers, calibration, config.repair)
            timing = {"seconds": round(time.perf_counter() - start, 3)}
        repair.leave_out_unchanged(list(walk.layers))
        _log_repair(repair)
        record["repair"] = {"method": repair.method, "cuts": repair.cuts} | timing
    return Prepared(list(config.drop_layers), repair, record)


def _check(config: LayerDropConfig, model: PreTrainedModel, cut: LayerCut | None, target: Target | None) -> None:
    """Refuse what can be known to fail before anything is computed, and fill in layers that need no computing."""
    families.check_supported(model.config)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise CutError(
            "weights of this model are offloaded or on the meta device, and choosing layers or fitting a repair reads them; "
            "pass no model, so that prune_with loads the base a layer at a time, or load it without offloading"
        )
    choosing = needs_model(config)
    if not choosing:
        resolve_drop(config, model.config, cut, target)
    if cut is not None or is_already_cut(config, model.config):
        way_out = (
            f"specify its layers with drop_layers={list(cut.cut.drop)}" if choosing and cut else "leave the repair out"
        )
        raise CutError(
            f"choosing layers and fitting a repair need the dense model, and this one is cut already; {way_out}, or load "
            "the base again"
        )
    if config.repair is not None:  # now, as the model may write its calibration text for minutes
        check_repair(model.config, config.drop_layers or [], config.calibration_samples, config.repair)
        if all(one.dim() < 2 or is_packed(one) for one in find_decoder_layers(model).layers.parameters()):
            raise CutError(
                f"repair={config.repair!r} changes weights of the layers, and those of this model are quantised; leave it out, "
                "or repair the unquantised model, then quantise it"
            )
    if choosing:
        check_budget_rows(config, config.calibration_samples)
        if config.drop and isinstance(config.tune_layers, int):  # too few are left, whichever go
            n = families.layer_count(model.config)
            tuned_layers(cut_without(range(drop_count(config.drop, n)), n), config.tune_layers)


def _log_repair(repair: Repair) -> None:
    """Say how well a repair fits; warn if it makes hardly a difference."""
    if not repair.tensors and repair.cuts:
        logger.warning("the repair %s changes nothing%s", repair.method, _MORE_TEXT)
        return
    for cut in repair.cuts:
        if (share := cut.get("unexplained_share")) is not None:
            level, advice = (logging.WARNING, _MORE_TEXT) if share > _HARDLY else (logging.INFO, "")
            layers = describe_layers(range(cut["layers"][0], cut["layers"][1] + 1))
            words = "on held-out rows, the repair leaves %s of what %s did unexplained%s"
            logger.log(level, words, format_percent(share), layers, advice)


def load_calibration_for(options: CalibrationOptions, walk: LayerWalk, revision: str | None = None) -> CalibrationSet:
    """The calibration set that a config or a request names; the tokenizer is loaded from where the model came from.

    A model whose layers are moved to a GPU one at a time is moved there as a whole while it writes its text.

    Raises:
        CheckpointError: The model has no tokenizer and the text needs one, or the text can't be read.
    """
    model = walk.model
    name = model.name_or_path or model.config.name_or_path or ""  # a model that was cut in memory has only the second
    if not name and options.calibration != SELF:
        raise CheckpointError(
            "this model has no name or path to load a tokenizer from, which the calibration text needs; save the model and its "
            "tokenizer to a folder and load it from there, or use calibration='self'"
        )
    try:
        tokenizer = load_tokenizer(name, revision=revision)
    except CheckpointError:
        if options.calibration != SELF:  # a model can write without one
            raise
        tokenizer = None
    load = partial(
        load_calibration,
        options.calibration,
        tokenizer,
        samples=options.calibration_samples,
        length=options.calibration_length,
        seed=options.seed,
        model=model,
        processor=lambda: load_processor(name, revision=revision),
    )
    return walk.with_whole_model(load) if options.calibration == SELF else load()
