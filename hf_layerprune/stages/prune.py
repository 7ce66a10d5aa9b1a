"""The prune stage: read a base, drop layers, write a model folder (or a GGUF file) with its lineage."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import families
from ..cut.base import Base
from ..cut.disk import execute_plan, plan_cut
from ..cut.gguf import cut_gguf, gguf_layer_count, is_gguf, plan_gguf_cut
from ..cut.gguf.modelfile import make_modelfile
from ..cut.patch import check_repairable_weights, match_layers, patch_layers
from ..errors import CheckpointError, CutError
from ..families.engines import REMEDY, describe_misread_layers
from ..files.copy import check_file_target, write_text
from ..files.folders import check_target, new_folder
from ..files.gguf_header import read_header
from ..layer_ranges import describe_layers
from ..options import AMOUNTS, TARGET_SETTINGS, copy_fields, format_bytes, refuse_unused
from ..records.fingerprints import uncached_weights_hash
from ..records.licences import is_licence_file
from ..records.lineage import Lineage, stage_entry
from ..records.names import is_gguf_name, strip_local_path
from ..runtime.loading import UNPACKED_DTYPE, is_hub_id, load_config, load_tokenizer, resolve_base
from ..select import find_criterion, needs_model, select_layers
from ..select.targets import Target
from .provenance import has_same_rows, is_same_base, write_lineage
from .requests import PruneRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..adapter.config import LayerDropConfig
    from ..adapter.prepare import Prepared
    from ..cut.plan import CheckpointPlan

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What was done: the folder or file that was written, and which of the base's layers were dropped."""

    output: str
    dropped: list[int]
    layers: int
    form: str = "model"

    def __str__(self) -> str:
        kind = "adapter that drops" if self.form == "adapter" else "dropped"
        left = self.layers - len(self.dropped)
        return f"{kind} {describe_layers(self.dropped)} of {self.layers}: {left} left, in {self.output}"


def prune_settings(request: PruneRequest, dropped: Sequence[int]) -> dict[str, Any]:
    """What decides the outcome, for the lineage."""
    settings: dict[str, Any] = {"drop_layers": dropped}
    if request.drop_layers is None:
        first, last = find_criterion(request.criterion).protected_ends(request)
        amount = next(name for name in AMOUNTS if getattr(request, name) is not None)
        names = (amount, *TARGET_SETTINGS.get(amount, ()), "criterion", "variant", "seed", "steps", "contiguous")
        settings |= {name: getattr(request, name) for name in names} | {"protect_first": first, "protect_last": last}
    if request.repair is not None:
        settings["repair"] = request.repair
    return settings | {"dtype": request.dtype, "form": "adapter" if request.adapter else "model"}


def is_already_pruned(request: PruneRequest, folder: Path) -> bool:
    """Whether a folder holds what a request asks for, made by an earlier run; `False` if there is nothing yet.

    Raises:
        CheckpointError: It holds something else.
    """
    if not folder.exists():
        return False
    request = request.with_calibration()
    lineage = Lineage.load(folder) or Lineage({})
    entry: dict[str, Any] = next((entry for entry in reversed(lineage.entries) if entry["stage"] == "prune"), {})
    recorded, calibration = entry.get("settings", {}), entry.get("calibration", {})
    dropped = recorded.get("drop_layers", []) if request.drop_layers is None else request.drop_layers
    requested = {
        "source": strip_local_path(request.calibration),
        "samples": request.calibration_samples,
        "length": request.calibration_length,
        "seed": request.seed,
    }
    same = prune_settings(request, dropped) == recorded and all(
        calibration.get(name, value) == value for name, value in requested.items()
    )
    if not (same and is_same_base(lineage.base, request) and has_same_rows(calibration, request)):
        raise CheckpointError(
            f"{folder} holds a different cut, or one of another base or calibration text; choose another output folder, or "
            "remove it"
        )
    return True


def prune_to(request: PruneRequest) -> Pruned:
    """Prune a base into a new folder or file.

    Raises:
        CutError: These layers can't be dropped.
        UnsupportedModelError: The architecture is not proven.
        CheckpointError: The base can't be read, or the output can't be written.
    """
    output, source = Path(request.output).expanduser(), Path(request.base).expanduser()
    if not is_gguf_name(output):  # at once: before the Hub is asked, torch is imported, and layers are chosen
        check_target(output, source, request.force)
    curve: dict[str, Any] | None = None
    if request.from_curve is not None and request.drop_layers is None:
        from .curve_file import choose_point

        request, curve = choose_point(request, request.from_curve)
    request = request.with_calibration()
    if is_gguf_name(output):
        return _prune_gguf(request, source, output)
    # Whether tensors are copied byte for byte; otherwise the base is loaded, to convert or unpack its weights.
    copies = not request.adapter and request.dtype == "auto" and resolve_base(request.base)[1] is None
    if request.link and (request.repair or not copies):
        raise CutError(
            "link=True shares weight files with the base, but this cut changes or writes them; leave it out"
        )
    hub = None
    if is_hub_id(request.base):
        hub = Base.open(request.base, request.revision)
        hub.fetch([*filter(is_licence_file, hub.sizes)])  # which loading a model does not download
        revision = hub.repo.commit if hub.repo else None
        request, source = replace(request, revision=revision), hub.folder  # everything comes from this commit
    config = load_config(source)
    _check_family(request, config)
    if request.repair and copies:
        check_repairable_weights(hub or Base.open(source), config)
    dropped, prepared, target = _choose_layers(request, config)
    cut = families.make_cut(config, dropped)
    if warning := describe_misread_layers(config, cut.keep):
        logger.warning("%s; %s", warning, REMEDY)
    from ..cut.dry_run import dry_run_cut_of_config  # imports torch, which cutting a GGUF file does not need

    # Everything that can be refused is refused before a weight is read.
    dry_run_cut_of_config(config, families.cut_config(config, cut), cut)
    with new_folder(output, force=request.force, source=source) as folder:
        if prepared is None and request.repair:
            prepared = _prepare_dense(request, list(cut.drop))  # timed on its own
        with stage_entry("prune", prune_settings(request, list(cut.drop))) as entry:
            if copies:
                _write_files(request, plan_cut(hub or source, cut.drop), folder, prepared)
            elif request.adapter:
                _write_adapter(request, list(cut.drop), folder, prepared)
            else:
                _write_model(request, list(cut.drop), folder, prepared)
        if request.target_size is not None and not request.adapter:
            import torch

            # Files of a wider type are to be converted later.
            wanted, written = request.target_dtype, cast("torch.dtype | None", load_config(folder).dtype)
            if wanted in ("auto", request.dtype) or (written and written.itemsize <= getattr(torch, wanted).itemsize):
                _check_size(folder, int(request.target_size), len(dropped))
        if target is not None:
            entry["selection"] = {"criterion": request.criterion, "target": target.record(cut.drop)}
        if curve is not None:
            entry["selection"] = curve
        if prepared is not None:
            entry |= prepared.record
        if warning:
            entry["misread"] = warning
        entry["layers"] = {"base": cut.num_layers, "left": len(cut.keep)}
        write_lineage(request, entry, folder, hub)
    if request.check:
        logger.info("the logits are those of %s with the dropped layers bypassed", request.base)
    return Pruned(str(output), list(cut.drop), cut.num_layers, "adapter" if request.adapter else "model")


def _check_size(folder: Path, limit: int, count: int) -> None:
    """Refuse files that are larger than was estimated, and than they may be."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if size > limit:
        raise CutError(
            f"the weight files take {format_bytes(size)}, which is more than was estimated, and {format_bytes(size - limit)} more "
            f"than target_size allows; use drop={count + 1} or more instead"
        )


def _check_family(request: PruneRequest, config: PreTrainedConfig) -> None:
    """Refuse a model type that is not proven to survive what the request asks for."""
    families.check_supported(config)
    if request.repair is not None:
        families.check_stage(config, "repair")
    by_text = request.budget is not None or find_criterion(request.criterion).needs == "text"
    if request.drop_layers is None and by_text:
        families.check_stage(config, "rank")


def _choose_layers(
    request: PruneRequest, config: PreTrainedConfig
) -> tuple[list[int], Prepared | None, Target | None]:
    """The layers to drop; what was computed from the dense model, if it was needed; the target that set their number."""
    if needs_model(request):
        # The repair looks at the same model and the same text, so it is fitted here as well.
        prepared = _prepare_dense(request, None)
        return prepared.drop_layers, prepared, None
    if request.drop_layers is not None:
        return list(request.drop_layers), None, None
    target = Target.from_options(_to_config(request, None), config, request.base, revision=request.revision)
    protected = families.protected_layers(config)
    return select_layers(families.layer_count(config), request, protected, target), None, target


def _prune_gguf(request: PruneRequest, base: Path, output: Path) -> Pruned:
    if not is_gguf(base):
        resolve_base(request.base)
        raise CheckpointError(
            f"{request.base} is not a GGUF file, so {output} takes two steps: prune into the folder {output.stem}, then "
            f"run llama.cpp's converter: python convert_hf_to_gguf.py {output.stem} --outfile {output} (docs/engines.md "
            "says where it is)"
        )
    unused = ("dtype", "adapter", "repair", "check", "link", "target_dtype")
    refuse_unused(request, unused, "where a GGUF file stays one, since it is cut without being loaded")
    check_file_target(output, force=request.force, source=base)  # before layers are chosen
    if needs_model(request):
        dropped = _prepare_dense(request, None).drop_layers  # looks at the dequantised model
    elif request.drop_layers is not None:
        dropped = list(request.drop_layers)
    else:
        n = gguf_layer_count(base)
        dropped = select_layers(n, request, target=_gguf_target(request, base, n))
    plan = cut_gguf(base, output, dropped, force=request.force)
    _write_modelfile(output)
    return Pruned(str(output), list(plan.cut.drop), plan.cut.num_layers)


def _write_modelfile(output: Path) -> None:
    """Write what Ollama needs beside a file that chats; an existing one may have been edited, and stays."""
    text, path = make_modelfile(output), output.with_suffix(".Modelfile")
    if text is None:
        return
    if os.path.lexists(path):
        logger.info("%s exists and stays as it is", path)
        return
    write_text(path, text)
    logger.info("wrote %s, for Ollama", path)


def _gguf_target(request: PruneRequest, base: Path, num_layers: int) -> Target | None:
    """What must be left of a GGUF file."""
    if request.target is None:
        return None
    limit: Any = request.target_size  # as a number, since it is checked
    if limit is None:
        raise CutError(f"{request.target} is not known for a GGUF file that stays one; use target_size or drop=N")

    header = read_header(base)  # once: a large vocabulary takes a second

    def left(drop: Sequence[int]) -> float:
        return plan_gguf_cut(header, list(drop)).target_bytes if drop else base.stat().st_size

    each = [left(()) - left((i,)) for i in range(num_layers)]
    return Target("target_size", limit, left, each, format_bytes)


def _load_dtype(request: PruneRequest) -> str:
    """The type in which the base is loaded."""
    unpacks = request.dtype == "auto" and resolve_base(request.base)[1] is not None
    return UNPACKED_DTYPE if unpacks else request.dtype


def _to_config(request: PruneRequest, dropped: list[int] | None) -> LayerDropConfig:
    from ..adapter.config import LayerDropConfig

    return copy_fields(
        LayerDropConfig,
        request,
        base_model_name_or_path=request.base,
        drop_layers=dropped,
        target_dtype=request.target_dtype if request.target_dtype != "auto" else _load_dtype(request),
        # Of a whole model, nothing is tuned, and the head is not untied.
        tune_layers=request.tune_layers if request.adapter else 0,
        tune_lm_head=request.tune_lm_head if request.adapter else False,
    )


def _prepare_dense(request: PruneRequest, dropped: list[int] | None) -> Prepared:
    """Run the dense model layer by layer to choose the layers, unless they are given, and to fit the repair."""
    from ..adapter.pruning import prepare_from_base

    kwargs = {"revision": request.revision, "dtype": _load_dtype(request)}
    return prepare_from_base(_to_config(request, dropped), kwargs)


def _write_model(request: PruneRequest, dropped: list[int], folder: Path, prepared: Prepared | None) -> None:
    """Load the whole model, cut it, and save it."""
    from ..cut.memory import drop_layers
    from ..families.layout import find_decoder_layers
    from ..repair.frozen import repaired_tensors
    from ..runtime.mapping import load_mapped
    from ..runtime.model_class import stored_tensors

    model = load_mapped(request.base, revision=request.revision, dtype=_load_dtype(request))
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
    try:
        load_tokenizer(request.base, revision=request.revision).save_pretrained(folder)
    except CheckpointError as error:
        logger.warning("%s; none is written", error)


def _write_files(request: PruneRequest, plan: CheckpointPlan, folder: Path, prepared: Prepared | None) -> None:
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


def _write_adapter(request: PruneRequest, dropped: list[int], folder: Path, prepared: Prepared | None) -> None:
    """Save the plan, the tail that will be tuned, and what the repair changed."""
    from ..adapter.pruning import prune_prepared
    from ..adapter.reading import save_adapter
    from ..adapter.resolve import resolved_cut
    from ..families.layout import find_decoder_layers
    from ..repair.frozen import repaired_tensors

    model = prune_prepared(_to_config(request, dropped), prepared, whole=request.check, dtype=_load_dtype(request))
    adapter: Any = model.peft_config["default"]
    adapter.revision = adapter.base_commit  # loading would otherwise put it on whatever the base's main branch is then
    save_adapter(model, folder)
    if prepared is not None and prepared.repair is not None:
        pruned: Any = model.get_base_model()
        path = find_decoder_layers(pruned).path
        prepared.record["repair"]["changed_tensors"] = [
            *repaired_tensors(prepared.repair, path, resolved_cut(adapter))
        ]
