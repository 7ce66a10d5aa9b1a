"""The prune station: read a base, drop layers, write a model folder (or a GGUF file) with its lineage."""

from __future__ import annotations

import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..cut.disk import plan_cut
from ..cut.gguf import cut_gguf, gguf_layer_count, is_gguf
from ..cut.patch import patch_layers
from ..cut.settings import read_config
from ..cut.write import fill
from ..errors import CheckpointError, CutError
from ..files.folders import check_target, new_folder
from ..layer_ranges import format_layers
from ..records.declared import declared_by
from ..records.licences import is_licence_file
from ..records.lineage import Lineage, fingerprint, passing_weights_hash, station
from ..runtime.loading import is_hub_id, load_base, load_config, resolve_base
from ..select import find_criterion, needs_model, select_layers

if TYPE_CHECKING:
    from ..adapter.config import LayerDropConfig
    from ..adapter.prepare import Prepared
    from ..cut.remote import HubBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PruneRequest:
    """What to prune, and how.

    Args:
        base (`str`): A Hub id, a model folder, or a GGUF file.
        output (`str`): The folder to write; or a `.gguf` file, for a base that is one.
        drop (`float` or `int`, defaults to 0.25): A fraction of the layers, or a count.
        drop_layers (`list[int]`, *optional*): These layers, whatever `drop` and `criterion` say.
        criterion (`str`, defaults to `"reverse_order"`): How layers are chosen.
        variant (`str`, defaults to `"published"`): See `LayerDropConfig`.
        steps (`int`, defaults to 1): In how many rounds layers are chosen.
        protect_first (`int`, *optional*): So many layers at the start are never chosen.
        protect_last (`int`, *optional*): So many layers at the end are never chosen.
        contiguous (`bool`, defaults to `False`): Whether the chosen layers must lie side by side.
        seed (`int`, defaults to 42): For criteria that draw.
        repair (`str`, *optional*): `"linear"`, `"refit"` or `"magnitude"`, see `LayerDropConfig`.
        calibration (`str`, defaults to `"self"`): The text that a criterion and the repair look at, see
            `LayerDropConfig`.
        calibration_samples (`int`, defaults to 128): So many rows of it.
        calibration_length (`int`, defaults to 512): So many tokens a row.
        dtype (`str`, defaults to `"auto"`): Of the weights that are written; `"auto"` keeps the base's, and is
            bfloat16 for a GGUF file that becomes a folder.
        adapter (`bool`, defaults to `False`): Write a PEFT adapter in place of a whole model.
        tune_layers (`int`, `"cut"` or `list[int]`, defaults to 3): Of the adapter, see `LayerDropConfig`.
        tune_lm_head (`bool`, defaults to `True`): Of the adapter, see `LayerDropConfig`.
        revision (`str`, *optional*): Branch, tag or commit of a base on the Hub.
        link (`bool`, defaults to `False`): Hard-link weight files that stay as they are.
        force (`bool`, defaults to `False`): Replace an output that exists.
    """

    base: str
    output: str
    drop: float | int = 0.25
    drop_layers: list[int] | None = None
    criterion: str = "reverse_order"
    variant: str = "published"
    steps: int = 1
    protect_first: int | None = None
    protect_last: int | None = None
    contiguous: bool = False
    seed: int = 42
    repair: str | None = None
    calibration: str = "self"
    calibration_samples: int = 128
    calibration_length: int = 512
    dtype: str = "auto"
    adapter: bool = False
    tune_layers: int | str | list[int] = 3
    tune_lm_head: bool = True
    revision: str | None = None
    link: bool = False
    force: bool = False

    @property
    def looks_at_model(self) -> bool:
        """Whether the layers are chosen by a criterion that looks at the dense model."""
        return self.drop_layers is None and needs_model(self.criterion)

    def layers_of(self, num_layers: int, protected: dict[int, str]) -> list[int]:
        """The layers to drop from a base with so many."""
        if self.drop_layers is not None:
            return self.drop_layers
        return select_layers(
            num_layers,
            drop=self.drop,
            criterion=self.criterion,
            variant=self.variant,
            protect_first=self.protect_first,
            protect_last=self.protect_last,
            contiguous=self.contiguous,
            seed=self.seed,
            protected=protected,
        )

    def settings(self, dropped: list[int]) -> dict[str, Any]:
        """What decides the outcome, for the lineage."""
        chosen = {"drop_layers": dropped}
        if self.drop_layers is None:
            first, last = find_criterion(self.criterion).protection(
                self.variant, self.protect_first, self.protect_last
            )
            chosen |= {"drop": self.drop, "criterion": self.criterion, "variant": self.variant, "seed": self.seed}
            chosen |= {"steps": self.steps, "protect_first": first, "protect_last": last}
            chosen |= {"contiguous": self.contiguous}
        if self.repair is not None:
            chosen |= {"repair": self.repair}
        return chosen | {"dtype": self.dtype, "form": "adapter" if self.adapter else "model"}


def prune_to(request: PruneRequest) -> str:
    """Prune a base into a new folder or file.

    Args:
        request (`PruneRequest`): What to do.

    Returns:
        `str`: One line that says what was done.

    Raises:
        CutError: These layers can't be dropped.
        UnsupportedModelError: The architecture is not proven.
        CheckpointError: The base can't be read, or the output can't be written.
    """
    output = Path(request.output)
    if output.suffix == ".gguf":
        return _prune_gguf(request, Path(request.base), output)
    if request.repair and request.link:
        raise CutError("--repair changes weights, and --link shares them with the base; leave one of them out")
    hub = _hub_base(request)
    source = hub.folder if hub else Path(request.base).expanduser()
    check_target(output.expanduser(), source, request.force)  # before minutes are spent on choosing layers
    config = read_config(hub.folder) if hub else load_config(request.base, revision=request.revision)
    families.check_supported(config)
    prepared = None
    if request.looks_at_model:
        # The repair looks at the same model and the same text, so it is fitted here as well.
        prepared = _prepare(request, None)
        dropped = prepared.drop_layers
    else:
        dropped = request.layers_of(families.layer_count(config), families.protected_layers(config))
    cut = families.make_cut(config, dropped)
    from ..cut.memory import rehearse_config  # imports torch, which a cut GGUF file does without

    # Everything that can be refused is refused before a weight is read.
    rehearse_config(config, families.cut_config(config, cut), cut)
    with new_folder(output, force=request.force, apart_from=source) as folder:
        with station("prune", request.settings(list(cut.drop))) as entry:
            if request.adapter or _needs_a_model(request):
                make = _adapter if request.adapter else _model
                commit, prepared = make(request, list(cut.drop), folder, prepared)
            else:
                if prepared is None and request.repair:
                    prepared = _prepare(request, list(cut.drop))
                # The same bytes of what stays: nothing is loaded, and of a base on the Hub nothing else is fetched.
                plan = plan_cut(hub or source, cut.drop)
                fill(plan, folder, link=request.link, name=output.name)
                commit = hub.commit if hub else None
                if prepared is not None and prepared.repair is not None:
                    _note_plain_cut(prepared, folder)
                    values = {(cut.new_index[i], name): v for (i, name), v in prepared.repair.tensors.items()}
                    changed = patch_layers(folder, len(cut.keep), values)
                    prepared.record["repair"]["changed_tensors"] = changed
        if prepared is not None:
            entry |= prepared.record
        entry["layers"] = {"base": cut.num_layers, "left": len(cut.keep)}
        _write_lineage(request, entry, commit, folder, hub)
    kind = "adapter that drops" if request.adapter else "dropped"
    return f"{kind} layers {format_layers(cut.drop)} of {cut.num_layers}: {len(cut.keep)} left, in {output}"


def _needs_a_model(request: PruneRequest) -> bool:
    """Whether weights change on the way, by another type or by unpacking, so that copying bytes is not enough."""
    return request.dtype != "auto" or resolve_base(request.base)[1] is not None


def _hub_base(request: PruneRequest) -> HubBase | None:
    """The base, if it is on the Hub and its weights stay as they are."""
    if request.adapter or _needs_a_model(request) or not is_hub_id(request.base):
        return None
    from ..cut.remote import HubBase

    return HubBase.open(request.base, request.revision)


def _prune_gguf(request: PruneRequest, base: Path, output: Path) -> str:
    if not is_gguf(base):
        raise CheckpointError(f"{base} is not a GGUF file, and only one can be written to {output}; name a folder")
    if request.dtype != "auto" or request.adapter or request.repair:
        raise CheckpointError(
            "a cut GGUF file keeps its weights as they are; leave out --dtype, --adapter and --repair, or name a folder"
        )
    if os.path.lexists(output) and not request.force:
        raise CheckpointError(f"{output} exists; replace it with --force, or name another file")
    if request.looks_at_model:
        dropped = _prepare(request, None).drop_layers  # looks at the dequantised model
    else:
        dropped = request.layers_of(gguf_layer_count(base), {})
    plan = cut_gguf(base, output, dropped, force=request.force)
    left, n = len(plan.kept_layers), plan.block_count
    return f"dropped layers {format_layers(plan.dropped_layers)} of {n}: {left} left, in {output}"


def _dtype(request: PruneRequest, gguf: bool) -> Any:
    import torch

    name = "bfloat16" if request.dtype == "auto" and gguf else request.dtype
    return name if name == "auto" else getattr(torch, name)


def _layer_drop_config(request: PruneRequest, dropped: list[int] | None) -> LayerDropConfig:
    from ..adapter.config import LayerDropConfig

    return LayerDropConfig(
        base_model_name_or_path=request.base,
        revision=request.revision,
        drop_layers=dropped,
        drop=request.drop,
        criterion=request.criterion,
        variant=request.variant,
        steps=request.steps,
        protect_first=request.protect_first,
        protect_last=request.protect_last,
        contiguous=request.contiguous,
        seed=request.seed,
        repair=request.repair,
        calibration=request.calibration,
        calibration_samples=request.calibration_samples,
        calibration_length=request.calibration_length,
        tune_layers=request.tune_layers,
        tune_lm_head=request.tune_lm_head,
    )


def _prepare(request: PruneRequest, dropped: list[int] | None) -> Prepared:
    """Choose the layers, where none are given, and fit the repair, from a dense model walked layer by layer."""
    from ..adapter.model import look_at_dense

    return look_at_dense(_layer_drop_config(request, dropped), {"revision": request.revision})


def _model(
    request: PruneRequest, dropped: list[int], folder: Path, prepared: Prepared | None
) -> tuple[str | None, Prepared | None]:
    """Load the whole model, cut it, and save it."""
    from ..adapter.prepare import prepare
    from ..cut.memory import drop_layers
    from ..families.layout import find_decoder_layers

    _, gguf_file = resolve_base(request.base)
    model = load_base(request.base, revision=request.revision, dtype=_dtype(request, gguf_file is not None))
    if prepared is None and request.repair is not None:
        prepared = prepare(_layer_drop_config(request, dropped), model)
    cut = drop_layers(model, dropped).cut
    if prepared is not None and prepared.repair is not None:
        model.save_pretrained(folder)
        _note_plain_cut(prepared, folder)
        stack = find_decoder_layers(model)
        prepared.repair.apply(stack.layers, cut.new_index)
        prepared.record["repair"]["changed_tensors"] = [
            f"{stack.path}.{cut.new_index[i]}.{name}" for i, name in sorted(prepared.repair.tensors)
        ]
    model.save_pretrained(folder)
    _save_tokenizer(request, folder)
    return getattr(model.config, "_commit_hash", None), prepared


def _note_plain_cut(prepared: Prepared, folder: Path) -> None:
    """Note what the weights were before their repair, so that the numbers of that cut can stand beside."""
    prepared.record["repair"]["input_weights"] = passing_weights_hash(folder)


def _save_tokenizer(request: PruneRequest, folder: Path) -> None:
    from transformers import AutoTokenizer

    name, gguf_file = resolve_base(request.base)
    kwargs = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        AutoTokenizer.from_pretrained(name, revision=request.revision, **kwargs).save_pretrained(folder)
    except (OSError, ValueError) as error:
        logger.warning("%s has no tokenizer that transformers can load (%s); none is written", request.base, error)


def _adapter(
    request: PruneRequest, dropped: list[int], folder: Path, prepared: Prepared | None
) -> tuple[str | None, Prepared | None]:
    """Save the plan, the tail that will be tuned, and what the repair changed."""
    from ..adapter.model import prune_prepared

    config = _layer_drop_config(request, dropped)
    _, gguf_file = resolve_base(request.base)
    model = prune_prepared(config, prepared, dtype=_dtype(request, gguf_file is not None))
    model.save_pretrained(folder)
    prepared = model.base_model.prepared
    if prepared is not None and prepared.repair is not None:
        prepared.record["repair"]["changed_modules"] = config.repaired_modules
    return config.base_commit, prepared


def _write_lineage(
    request: PruneRequest, entry: dict[str, Any], commit: str | None, folder: Path, hub: HubBase | None
) -> None:
    if hub is None and is_hub_id(request.base):
        from ..cut.remote import HubBase

        hub = HubBase.open(request.base, commit or request.revision)
    source = hub.folder if hub else Path(request.base).expanduser()
    lineage = (Lineage.of(source) if source.is_dir() else None) or Lineage({})
    if not lineage.base:
        lineage.base = {
            "id": request.base,
            "commit": commit,
            "files": hub.fingerprint() if hub else fingerprint(source),
        } | declared_by(hub or source)
    if source.is_dir():
        _copy_licence(source, folder)
    lineage.record(folder, entry)


def _copy_licence(source: Path, folder: Path) -> None:
    """Hand on the licence and its notices, where copying bytes has not done so."""
    for path in sorted(source.iterdir()):
        if path.is_file() and is_licence_file(path.name) and not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)
