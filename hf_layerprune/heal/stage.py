"""The heal stage: turn the trained weights into a complete model folder with its history."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..cut.header import FLOATS, read_header
from ..cut.settings import copy_transformers_version, encode_json
from ..errors import CheckpointError, LayerPruneError
from ..files.copy import copy_model_file, write_bytes
from ..files.folders import new_folder
from ..files.json_file import read_object
from ..options import pluralize
from ..records.fingerprints import ADAPTER_CONFIG, CONFIG, GENERATION, fingerprint, holds_weights, model_files
from ..records.licences import copy_licence
from ..records.lineage import Lineage
from ..runtime.config_file import read_config_file
from ..runtime.loading import load_base, load_config
from ..runtime.model_class import stored_layer_prefix, stored_names, tied_names
from ..runtime.tokenizer_version import TOKENIZER, needs_config
from .student import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..adapter.config import LayerDropConfig

logger = logging.getLogger(__name__)

_TYPES: dict[str, torch.dtype] = {name: getattr(torch, known) for name, known in FLOATS.items()}


def write_healed(
    student: Student, trained: Path, output: Path, entry: dict[str, Any], *, adapter: Path | None = None
) -> None:
    """Merge the trained weights into the pruned model, and write it as a plain model.

    Args:
        student ([`Student`]): The pruned model that was trained.
        trained (`Path`): The folder that the trainer saved: an adapter, or a whole model.
        output (`Path`): The folder to write.
        entry (`dict[str, Any]`): The stage's entry in the history, see [`~records.lineage.stage`]; the names of the
            changed tensors are added to it.
        adapter (`Path`, *optional*): Where to write the adapter, if the trainer saved one, in the model's own type, with the
            same history unless it is LoRA's. A model that was cut or healed before has none, unless it is LoRA's.

    Raises:
        CheckpointError: The output or the adapter's folder exists, something can't be written, or tokens were added.
        LayerPruneError: Training changed nothing, or a trained weight is not finite.
    """
    lineage = _lineage(student)
    with ExitStack() as folders:  # folders get their names in reverse order: the model, then its adapter
        merged, part = _merge_trained(student, lineage, trained, adapter, folders)
        _use_config_of(student, merged, trained)
        _restore_types(student, merged)
        merged.name_or_path = merged.config.name_or_path = str(student.folder)
        folder = folders.enter_context(new_folder(output, source=student.folder))
        merged.save_pretrained(folder)
        copy_companion_files(student.folder, folder)
        entry["changed_tensors"] = changed_tensors(student.folder, folder)
        if not entry["changed_tensors"]:
            raise LayerPruneError(
                f"training changed no weight of {student.folder}; train more steps, or at a higher learning rate"
            )
        _check_finite(folder, entry["changed_tensors"])
        entry["layers"] = {"base": student.cut.num_layers, "left": len(student.cut.keep)}
        entry["layers"]["prefix"] = stored_layer_prefix(merged)
        _record_adapter(part, lineage, entry)
        lineage.record(folder, entry)
    changed = pluralize(len(entry["changed_tensors"]), "tensor")
    logger.info("training changed %s; the model is in %s", changed, output)


def write_adapter(student: Student, trained: Path, output: Path, adapter: Path) -> None:
    """Write the adapter of a model that [`write_healed`] wrote, if that was killed before the adapter had its name."""
    if not adapter.exists():
        with ExitStack() as folders:
            lineage, healed = _lineage(student), Lineage.load(output)
            _, part = _merge_trained(student, lineage, trained, adapter, folders)
            _record_adapter(part, lineage, healed.entries[-1] if healed else {})


def _lineage(student: Student) -> Lineage:
    base = {"id": str(student.folder), "commit": None, "files": fingerprint(student.folder)}
    return Lineage.load(student.folder) or Lineage(base)


def _record_adapter(folder: Path | None, lineage: Lineage, entry: dict[str, Any]) -> None:
    if folder is not None:
        settings = entry["settings"] | {"form": "adapter"}
        Lineage(lineage.base, [*lineage.entries]).record(folder, entry | {"settings": settings})


def _merge_trained(
    student: Student, lineage: Lineage, trained: Path, adapter: Path | None, folders: ExitStack
) -> tuple[PreTrainedModel, Path | None]:
    """The merged model; writes its adapter too, if there is one. Returns the folder of one that the history describes."""
    if not (trained / ADAPTER_CONFIG).is_file():
        return _load_trained(student, trained), None
    from ..adapter.config import LayerDropConfig
    from ..adapter.reading import load_adapter, save_adapter

    adapted: Any = load_adapter(load_base(student.folder, dtype="auto"), str(trained))
    tail = isinstance(adapted.peft_config["default"], LayerDropConfig)  # others have the pruned model as their base
    if adapter is not None and student.whole_only and tail:
        logger.warning(
            "%s was cut or healed before, so an adapter of %s would lack what was done then; only the whole model is written",
            student.folder,
            student.base,
        )
    elif adapter is not None:
        folder = folders.enter_context(new_folder(adapter, source=student.folder))
        if tail:
            _record_repair(adapted.peft_config["default"], lineage)
        save_adapter(adapted, folder)
        _copy_to_adapter(student.folder, folder)
        return adapted.merge_and_unload(), folder if tail else None
    return adapted.merge_and_unload(), None


def _load_trained(student: Student, trained: Path) -> PreTrainedModel:
    """A whole model that was trained, which will be saved under the names that the pruned model has on disk.

    Checkpoints of the recipe have the names of the model itself, which transformers would keep.
    """
    model: Any = load_base(trained, dtype=weights_dtype(student))
    with ExitStack() as files:
        names, known = (_open_weights(folder, files).keys() for folder in (trained, student.folder))
        if not names <= known:
            like: Any = load_base(student.folder, device_map="meta")  # no weight is read
            model._weight_conversions = like._weight_conversions
    return model


def _use_config_of(student: Student, model: PreTrainedModel, trained: Path) -> None:
    """Give a trained model the config from before: loading and trainers set fields for their own use. An untied head stays so."""
    config = load_config(student.folder)
    text, old = model.config.get_text_config(), config.get_text_config()
    if text.vocab_size != old.vocab_size:
        raise CheckpointError(
            f"{trained} has {text.vocab_size:,} tokens in its vocabulary, and {student.folder} has {old.vocab_size:,}; add tokens "
            "to a copy of the base, prune that, and train the result"
        )
    for has, was in ((model.config, config), (text, old)):
        if getattr(was, "tie_word_embeddings", False):
            was.tie_word_embeddings = has.tie_word_embeddings
    model.config = config


def _restore_types(student: Student, model: PreTrainedModel) -> None:
    """Give what was not trained the types that it has on disk: transformers loads most of a model in one type, and some in
    float32. Otherwise, it would look trained.
    """
    with ExitStack() as files:
        where = _open_weights(student.folder, files)
        types = {name: _TYPES.get(file.get_slice(name).get_dtype()) for name, file in where.items()}
        named = (*model.named_parameters(), *model.named_buffers())
        loaded = {name: tensor for name, tensor in named if tensor.is_floating_point()}
        if len({*types.values(), *(tensor.dtype for tensor in loaded.values())}) == 1:
            return
        stored = stored_names(model.config, loaded)
        for name, tensor in loaded.items():
            own = stored.get(name, name)
            if types.get(own) in (None, tensor.dtype):
                continue
            old = where[own].get_tensor(own)
            if old.to(tensor.dtype).equal(tensor.data.cpu()):
                tensor.data = old.to(tensor.device)


def _record_repair(config: LayerDropConfig, lineage: Lineage) -> None:
    """Record in an adapter's config how the model was repaired, as it is if the cut wrote the adapter."""
    repair = next((entry["repair"] for entry in lineage.entries if entry.get("repair")), None)
    if repair:
        config.repair = repair.get("method")
        config.repaired_modules = config.repaired_modules or []  # without a list, loading would fit the repair again


def weights_dtype(student: Student) -> torch.dtype:
    """The type of most of a pruned model's weights on disk."""
    counts: Counter[str] = Counter()
    for path in student.folder.glob("*.safetensors"):
        for tensor in read_header(path).tensors:
            if tensor.dtype in _TYPES:
                counts[tensor.dtype] += tensor.elements
    return _TYPES[counts.most_common(1)[0][0]]


def changed_tensors(before: Path, after: Path) -> list[str]:
    """Names, ascending, of the tensors of one model folder that are new or different from those of another.

    A head that was untied from the embeddings is compared with these. If the other folder was saved without its head, as
    gpt2 was, its names lack their first part.
    """
    tied, stored = tied_names(load_config(before))
    others = {one: stored.get(other, other) for name, other in tied.items() for one in (name, stored.get(name, name))}
    with ExitStack() as files:
        where, new = _open_weights(before, files), _open_weights(after, files)

        def is_unchanged(name: str) -> bool:
            names = [one for full in (name, others.get(name, "")) for one in (full, full.partition(".")[2])]
            old = next((one for one in names if one in where), None)
            if old is None:
                return False
            tensor, other = new[name].get_tensor(name), where[old].get_tensor(old)
            return other.dtype == tensor.dtype and torch.equal(other, tensor)

        return sorted(name for name in new if not is_unchanged(name))


def _open_weights(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The open file of each tensor of a folder, by the tensor's name."""
    opened = [files.enter_context(safe_open(path, framework="pt")) for path in folder.glob("*.safetensors")]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _check_finite(folder: Path, names: Collection[str]) -> None:
    with ExitStack() as files:
        where = _open_weights(folder, files)
        for name in names:
            if not where[name].get_tensor(name).isfinite().all():
                raise LayerPruneError(
                    f"{name} of the trained model has a value that is not finite; specify an earlier checkpoint, or train at a "
                    "lower learning rate"
                )


def copy_companion_files(before: Path, after: Path) -> None:
    """Copy tokenizer, chat template, generation settings and licence byte for byte, as verification expects them."""
    fields = read_config_file(after / CONFIG)
    copy_transformers_version(read_config_file(before / CONFIG), fields)
    write_bytes(after / CONFIG, encode_json(fields))
    (after / GENERATION).unlink(missing_ok=True)  # saving a model writes one even where there was none
    _copy_companions(before, after, exclude=(CONFIG,))


def _copy_to_adapter(before: Path, after: Path) -> None:
    """Copy the tokenizer, unless it would be read in another way without its config: then, loaders have to take the base's."""
    settings = read_object(before / TOKENIZER) if (before / TOKENIZER).is_file() else {}
    if needs_config(read_config_file(before / CONFIG), settings):
        copy_licence(before, after)
        logger.info("the adapter gets no tokenizer, which would be read in another way without a %s beside it", CONFIG)
    else:
        _copy_companions(before, after, exclude=(CONFIG, GENERATION))


def _copy_companions(before: Path, after: Path, exclude: Collection[str]) -> None:
    for name, path in model_files(before).items():
        if name not in exclude and not (holds_weights(name) or name.endswith(".index.json")):
            (after / name).parent.mkdir(exist_ok=True)
            copy_model_file(path, before, after / name)
    copy_licence(before, after)
