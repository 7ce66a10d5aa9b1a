"""The ways in which the prune stage writes a model: by copying bytes, by converting a loaded model, or as an adapter."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cut.base import Base
from ..cut.disk import copy_companions, execute_plan
from ..cut.patch import match_layers, patch_layers
from ..errors import CheckpointError, CutError
from ..options import copy_fields
from ..records.fingerprints import QUANTISERS, uncached_weights_hash
from ..runtime.loading import UNPACKED_DTYPE, load_tokenizer, resolve_base
from .requests import PruneRequest

if TYPE_CHECKING:
    from ..adapter.config import LayerDropConfig
    from ..adapter.prepare import Prepared
    from ..cut.plan import CheckpointPlan

logger = logging.getLogger(__name__)


def load_dtype(request: PruneRequest) -> str:
    """The type in which the base is loaded."""
    unpacks = request.dtype == "auto" and resolve_base(request.base)[1] is not None
    return UNPACKED_DTYPE if unpacks else request.dtype


def to_config(request: PruneRequest, dropped: list[int] | None) -> LayerDropConfig:
    """The request as the config of an adapter; of a whole model, nothing is tuned."""
    from ..adapter.config import LayerDropConfig

    return copy_fields(
        LayerDropConfig,
        request,
        base_model_name_or_path=request.base,
        drop_layers=dropped,
        target_dtype=request.target_dtype if request.target_dtype != "auto" else load_dtype(request),
        tune_layers=request.tune_layers if request.adapter else 0,
        tune_lm_head=request.tune_lm_head if request.adapter else False,
    )


def prepare_dense(request: PruneRequest, dropped: list[int] | None) -> Prepared:
    """Run the dense model layer by layer to choose the layers, unless they are given, and to fit the repair."""
    from ..adapter.pruning import prepare_from_base

    kwargs = {"revision": request.revision, "dtype": load_dtype(request)}
    return prepare_from_base(to_config(request, dropped), kwargs)


def write_model(
    request: PruneRequest, base: Base | None, dropped: list[int], folder: Path, prepared: Prepared | None
) -> None:
    """Load the whole model, cut it, and save it; what comes with its weights is copied, or made from a GGUF file."""
    from ..cut.memory import drop_layers
    from ..families.layout import find_decoder_layers
    from ..repair.frozen import repaired_tensors
    from ..runtime.mapping import load_mapped
    from ..runtime.model_class import stored_tensors

    model = load_mapped(request.base, revision=request.revision, dtype=load_dtype(request))
    if getattr(model, "is_quantized", False):
        raise CutError(
            f"the weights of {request.base} are quantised and stay so when they are loaded, so dtype={request.dtype!r} can't convert "
            "them; leave it out"
        )
    cut = drop_layers(model, dropped).cut
    if prepared is not None and prepared.repair is not None:
        model.save_pretrained(folder)
        # Finds the numbers of the plain cut.
        prepared.record["repair"]["input_weights"] = uncached_weights_hash(folder)
        stack = find_decoder_layers(model)
        prepared.repair.apply(list(stack.layers), cut.new_index)
        stored = stored_tensors(model.config, repaired_tensors(prepared.repair, stack.path, cut))
        prepared.record["repair"]["changed_tensors"] = sorted(stored)
    model.save_pretrained(folder)
    if base is not None:
        copy_companions(base.folder, folder, [name for name, _ in base.companions() if name not in QUANTISERS])
        return
    try:
        load_tokenizer(request.base, revision=request.revision).save_pretrained(folder)
    except CheckpointError as error:
        logger.warning("%s; none is written", error)


def write_files(request: PruneRequest, plan: CheckpointPlan, folder: Path, prepared: Prepared | None) -> None:
    """Copy the bytes of the tensors that stay. No model is loaded, and no more is downloaded of a base on the Hub."""
    from ..cut.check import CannotCheckError, bypassed_logits, check_logits, warn_if_unproven
    from ..runtime.mapping import load_mapped

    expected, values = None, {}
    if request.check:  # a cut in memory has been checked already
        try:
            expected = bypassed_logits(load_mapped(request.base, revision=request.revision), plan.cut.drop)
        except CannotCheckError as error:
            raise CutError(f"check=True can't compare the logits: {error}; leave it out") from error
    else:
        warn_if_unproven(plan.config)
    if prepared is not None and prepared.repair is not None:
        values = {(plan.cut.new_index[i], name): v for (i, name), v in prepared.repair.tensors.items()}
        match_layers(plan.tensors, plan.config, values, request.output)
    execute_plan(plan, folder, link=request.link, name=Path(request.output).name)
    if expected is not None:  # before any repair
        check_logits(load_mapped(folder), expected)
    if prepared is not None and prepared.repair is not None:
        prepared.record["repair"]["input_weights"] = uncached_weights_hash(folder)
        prepared.record["repair"]["changed_tensors"] = patch_layers(folder, plan.config, values, request.output)


def write_adapter(request: PruneRequest, dropped: list[int], folder: Path, prepared: Prepared | None) -> None:
    """Save the plan, the tail that will be tuned, and what the repair changed."""
    from ..adapter.pruning import prune_prepared
    from ..adapter.reading import save_adapter
    from ..adapter.resolve import resolved_cut
    from ..families.layout import find_decoder_layers
    from ..repair.frozen import repaired_tensors
    from ..runtime.model_class import stored_tensors

    model = prune_prepared(to_config(request, dropped), prepared, whole=request.check, dtype=load_dtype(request))
    adapter: Any = model.peft_config["default"]
    adapter.revision = adapter.base_commit  # loading would otherwise put it on whatever the base's main branch is then
    save_adapter(model, folder)
    if prepared is not None and prepared.repair is not None:
        pruned: Any = model.get_base_model()
        path = find_decoder_layers(pruned).path
        tensors = repaired_tensors(prepared.repair, path, resolved_cut(adapter))
        prepared.record["repair"]["changed_tensors"] = sorted(stored_tensors(pruned.config, tensors))
