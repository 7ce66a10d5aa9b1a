"""The prune stage: read a base, drop layers, write a model folder (or a GGUF file) with its lineage."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .. import families
from ..cut.base import Base
from ..cut.disk import plan_cut
from ..cut.patch import check_repairable_weights
from ..errors import CheckpointError, CutError, UnsupportedModelError
from ..families.engines import REMEDY, describe_misread_layers
from ..files.folders import check_target, new_folder
from ..layer_ranges import describe_layers
from ..options import AMOUNTS, TARGET_SETTINGS, format_bytes
from ..records.licences import is_licence_file
from ..records.lineage import Lineage, stage_entry
from ..records.names import is_gguf_name, strip_local_path
from ..runtime.loading import is_hub_id, load_config, resolve_base
from ..select import find_criterion, needs_model, select_layers
from ..select.reverse_order import advise_small
from ..select.targets import Target
from .provenance import has_same_rows, is_same_base, write_lineage
from .prune_gguf import prune_gguf
from .prune_writers import prepare_dense, to_config, write_adapter, write_files, write_model
from .requests import PruneRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..adapter.prepare import Prepared

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pruned:
    """What was written.

    Args:
        output (`str`): The folder or the GGUF file.
        dropped (`list[int]`): The layers of the base that were dropped.
        layers (`int`): How many layers the base has.
        form (`str`): `"model"` or `"adapter"`.
    """

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
    if request.adapter:
        tuned = {"tune_layers": request.tune_layers, "tune_lm_head": request.tune_lm_head}
        settings |= {name: value for name, value in tuned.items() if value is not None}
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


def prune_model(base: str, output: str | os.PathLike[str], **options: Any) -> Pruned:
    """Prune a base into a new folder, with its tokenizer and the records that cards and checks need.

    Args:
        base (`str`): A Hub id, a model folder, or a GGUF file.
        output (`str` or `os.PathLike`): The folder to write, or a `.gguf` file if the base is one.
        options: Those of `hf-layerprune prune`: `drop`, `drop_layers`, `criterion`, `repair`, `adapter`, `dtype`, ...

    Returns:
        `Pruned`: What was written.

    Raises:
        CutError: These layers can't be dropped, or an option is not accepted.
        UnsupportedModelError: The architecture is not proven.
        CheckpointError: The base can't be read, or the output can't be written.

    Example:
        ```py
        >>> from hf_layerprune import prune_model

        >>> prune_model("HuggingFaceTB/SmolLM2-135M-Instruct", "pruned", drop_layers=range(12, 19)).dropped
        [12, 13, 14, 15, 16, 17, 18]
        ```
    """
    return prune_to(PruneRequest.from_call(base, output, options))


def prune_to(request: PruneRequest) -> Pruned:
    """Do as `prune_model` does, for a request."""
    output, source = Path(request.output).expanduser(), Path(request.base).expanduser()
    if not is_gguf_name(output):  # at once: before the Hub is asked, torch is imported, and layers are chosen
        check_target(output, source, request.force)
    curve: dict[str, Any] | None = None
    if request.from_curve is not None and request.drop_layers is None:
        from .curve_file import choose_point

        request, curve = choose_point(request, request.from_curve)
    request = request.with_calibration()
    if is_gguf_name(output):
        gguf_cut = prune_gguf(request, source, output)
        return Pruned(str(output), list(gguf_cut.drop), gguf_cut.num_layers)
    return _prune_folder(request, source, output, curve)


def _prune_folder(request: PruneRequest, source: Path, output: Path, curve: dict[str, Any] | None) -> Pruned:
    # Whether tensors are copied byte for byte; otherwise the base is loaded, to convert or unpack its weights.
    is_gguf = resolve_base(request.base)[1] is not None
    copies = not request.adapter and request.dtype == "auto" and not is_gguf
    if request.link and (request.repair or not copies):
        raise CutError(
            "link=True shares weight files with the base, but this cut changes or writes them; leave it out"
        )
    hub = _open_on_hub(request)
    if hub is not None:  # everything comes from this commit
        request, source = replace(request, revision=hub.repo.commit if hub.repo else None), hub.folder
    config = load_config(source)
    _check_family(request, config)
    if request.repair and copies:
        check_repairable_weights(hub or Base.open(source), config)
    dropped, prepared, target = _choose_layers(request, config)
    cut = families.make_cut(config, dropped)
    if request.drop_layers is None and request.criterion == "reverse_order":
        _suggest_block(request, config)
    if warning := describe_misread_layers(config, cut.keep):
        logger.warning("%s; %s", warning, REMEDY)
    from ..cut.dry_run import dry_run_cut_of_config  # imports torch, which cutting a GGUF file does not need

    # Everything that can be refused is refused before a weight is read.
    dry_run_cut_of_config(config, families.cut_config(config, cut), cut)
    with new_folder(output, force=request.force, source=source) as folder:
        if prepared is None and request.repair:
            prepared = prepare_dense(request, list(cut.drop))  # timed on its own
        with stage_entry("prune", prune_settings(request, list(cut.drop))) as entry:
            if copies:
                write_files(request, plan_cut(hub or source, cut.drop), folder, prepared)
            elif request.adapter:
                write_adapter(request, list(cut.drop), folder, prepared)
            else:
                write_model(request, None if is_gguf else hub or Base.open(source), list(cut.drop), folder, prepared)
        if request.target_size is not None and not request.adapter:
            _check_size(request, folder, len(dropped))
        by_target = target and {"criterion": request.criterion, "target": target.record(cut.drop)}
        if selection := curve or by_target:
            entry["selection"] = selection
        if prepared is not None:
            entry |= prepared.record
        if warning:
            entry["misread"] = warning
        entry["layers"] = {"base": cut.num_layers, "left": len(cut.keep)}
        write_lineage(request, entry, folder, hub)
    if request.check:
        logger.info("the logits are those of %s with the dropped layers bypassed", request.base)
    return Pruned(str(output), list(cut.drop), cut.num_layers, "adapter" if request.adapter else "model")


def _open_on_hub(request: PruneRequest) -> Base | None:
    """The base on the Hub, with its licence files, which loading a model does not download; `None` if it is not there."""
    if not is_hub_id(request.base):
        return None
    hub = Base.open(request.base, request.revision)
    try:
        hub.fetch([*filter(is_licence_file, hub.sizes)])
    except CheckpointError as error:
        if not request.adapter:  # a whole model is a copy, which needs all of the base's files
            raise
        logger.warning("%s; copy the licence into %s before you publish it", error, request.output)
    return hub


def _check_size(request: PruneRequest, folder: Path, count: int) -> None:
    """Refuse files that are larger than was estimated, and than they may be."""
    import torch

    wanted, written = request.target_dtype, cast("torch.dtype | None", load_config(folder).dtype)
    if wanted not in ("auto", request.dtype) and (not written or written.itemsize > getattr(torch, wanted).itemsize):
        return  # files of a wider type are to be converted later
    limit = int(cast("int", request.target_size))
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
        prepared = prepare_dense(request, None)
        return prepared.drop_layers, prepared, None
    if request.drop_layers is not None:
        return list(request.drop_layers), None, None
    target = Target.from_options(to_config(request, None), config, request.base, revision=request.revision)
    protected = families.protected_layers(config)
    return select_layers(families.layer_count(config), request, protected, target), None, target


def _suggest_block(request: PruneRequest, config: PreTrainedConfig) -> None:
    """Say of a small model that a block in the middle is better to drop, if its type is not refused at finding one."""
    from ..cut.sizes import Sizes

    with suppress(UnsupportedModelError):
        families.check_stage(config, "rank")
        advise_small(Sizes(config, request.base, revision=request.revision).parameters())
