"""Compare a model's tensors with those of the repeated cut, one by one."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ...cut.folder import SINGLE
from ...errors import CheckpointError, boundary
from ...families import text_config
from ...files.json_file import read_object
from ...files.shards import INDEX, MAX_INDEX, shard_names
from ...options import plural
from ...records.fingerprints import ADAPTER_WEIGHTS, CONFIG
from ...records.history import QUANTIZE, History
from ...records.lineage import FILE_NAME as LINEAGE
from ...runtime.loading import ignored_names, load_config
from ...runtime.model_class import model_class_of, stored_names, stored_parts
from .outcome import Verified
from .places import Place
from .rebuild import Expected, TensorHash, digest_file, notes_in

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_ADAPTER_PREFIX = "base_model.model."
_FLOATS = {"F16", "BF16", "F32", "F64"}


def weight_files(place: Place) -> list[str]:
    """The names of the weight files that loaders read.

    Raises:
        CheckpointError: Loaders differ in which files they read.
    """
    if place.is_adapter:
        return [ADAPTER_WEIGHTS]
    if INDEX not in place.hashes:
        return [SINGLE]
    if SINGLE in place.hashes:
        raise CheckpointError(f"{place.name} holds both {SINGLE} and {INDEX}, and loaders differ in which they read")
    return shard_names(_read_index(place), f"{place.name}/{INDEX}")


def _read_index(place: Place) -> dict[str, Any]:
    return read_object(place.path(INDEX), max_bytes=MAX_INDEX)


def check_tensors(place: Place, history: History, expected: Expected, outcome: Verified) -> None:
    """Check that every tensor is the base's or was changed by a recorded stage, and that none is missing or extra.

    Raises:
        CheckpointError: The weight files are not complete, or contradict each other.
    """
    changed, tensors = history.changed(), expected.tensors
    modules = tuple(f"{name}." for name in _repaired_modules(history)) if place.is_adapter else ()
    plain = tensors if expected.unquantized is None else expected.unquantized
    owners = {name.rpartition(".")[0] for name in plain}
    wrong, same, again, seen = [], 0, 0, set()
    recorded: dict[str, str] = {}  # by tensor, the stages that changed it
    found = list(stored_tensors(place, expected))
    stored = {}
    if place.is_adapter:
        unknown = {name: tensor for name, tensor in found if name not in tensors and name not in changed}
        parts = _stored_parts(place, expected, unknown)
        found = [one for name, tensor in found for one in parts.get(name, {name: tensor}).items()]
        stored = _stored_names(expected, [name for name, _ in found if name not in tensors])
    prefix = _lacking_prefix(expected)
    for name, tensor in found:
        key = stored.get(name, name)
        key = key if key in tensors else key.removeprefix(prefix)
        wanted = tensors.get(key)
        seen |= {name, key}
        if wanted == tensor:
            same += plain.get(key) == tensor
            again += plain.get(key) != tensor
            continue
        whole = name if name in changed or key not in tensors or key in plain else _whole(name, owners, changed)
        by = changed.get(whole) or changed.get(key, ["repair"] if modules and name.startswith(modules) else [])
        if by and (place.is_adapter or QUANTIZE in by or _may_be_trained(name, tensor, wanted)):
            recorded[whole] = " and ".join(dict.fromkeys(by))
        else:
            wrong.append(_difference(name, tensor, wanted, expected.quantizer if name not in plain else None))
    if not place.is_adapter:
        packed = {_owner(name, owners) for name, by in changed.items() if QUANTIZE in by and name in seen}
        lacking = [name for name in tensors.keys() - seen if not _is_tied(name, expected, seen)]
        lacking = sorted(set(lacking) - ignored_names(_config(expected), lacking))
        wrong += [f"{name} is missing" for name in lacking if name.rpartition(".")[0] not in packed]
    else:
        wrong += [f"{name} is missing" for name in changed.keys() - seen]
    if _is_untied(place, expected) and not any("lm_head" in name.split(".") for name in seen):
        wrong.append(f"lm_head.weight is missing, and {CONFIG} no longer ties it to the embeddings")
    if history.quantized and not any(QUANTIZE in by for by in map(changed.get, recorded) if by) and not again:
        wrong.append(f"none was changed by the quantising that {LINEAGE} names")
    outcome.recorded.update(recorded.values())
    outcome.same = same + again
    outcome.say_all("tensors", sorted(wrong), f"{same} are the base's, to the last bit")
    if expected.quantizer:
        _check_notes(place, expected, outcome)
    if again:
        outcome.say(True, "tensors", f"{again} are what {expected.quantizer} makes of the base's, to the last bit")
    for stages, count in sorted(outcome.recorded.items()):
        names = [name for name, by in recorded.items() if by == stages]
        which = f"{plural(count, 'tensor')}, such as {names[0]}" if count > 1 else names[0]
        text = f"{LINEAGE} says that {stages} changed {which}; the new values can't be derived again"
        outcome.say(None, "recorded", text)


def _check_notes(place: Place, expected: Expected, outcome: Verified) -> None:
    """Check what the weight files say about their tensors: torchao unpacks them by it."""
    notes = notes_in(place.path(file) for file in weight_files(place))
    differ = sorted(n for n in notes.keys() | expected.notes.keys() if notes.get(n) != expected.notes.get(n))
    texts = [f"what the weight files note on {name} is not what {expected.quantizer} notes" for name in differ]
    outcome.say_all(
        "tensors", texts, f"{plural(len(notes), 'note')} in the weight files, as {expected.quantizer} writes them"
    )


def _owner(name: str, owners: set[str]) -> str | None:
    """The module of the base that a stored tensor belongs to: `a.b` for `a.b.weight.absmax`."""
    while name and name not in owners:
        name = name.rpartition(".")[0]
    return name or None


def _whole(name: str, owners: set[str], changed: Mapping[str, Any]) -> str:
    """The parameter that a part of a quantised one belongs to, if a stage changed that; or else the part itself."""
    owner = _owner(name, owners)
    return next((whole for whole in changed if whole.rpartition(".")[0] == owner), name)


def _lacking_prefix(expected: Expected) -> str:
    """What transformers adds to the names of a checkpoint that was saved without its head, such as gpt2's."""
    picked = model_class_of(_config(expected))
    prefix = f"{picked[0].base_model_prefix}." if picked else ""
    return "" if any(name.startswith(prefix) for name in expected.tensors) else prefix


def _stored_names(expected: Expected, names: list[str]) -> dict[str, str]:
    """How the base's checkpoint names tensors that the adapter names by their modules."""
    if not names:
        return {}
    with boundary("no model can be built from the base's config"):
        return stored_names(_config(expected), names)


def _stored_parts(
    place: Place, expected: Expected, tensors: Mapping[str, TensorHash]
) -> dict[str, dict[str, TensorHash]]:
    """The parts of those tensors of an adapter that its base's checkpoint stores in several, such as one for each expert."""
    if not tensors:
        return {}
    import torch
    from safetensors import safe_open

    found = {}
    with (
        boundary("no model can be built from the base's config"),
        safe_open(place.path(ADAPTER_WEIGHTS), "pt") as file,
    ):
        here = {name: f"{_ADAPTER_PREFIX}{name}" for name in tensors}
        values = {name: file.get_tensor(key) for name, key in here.items() if key in set(file.keys())}
        for name, parts in stored_parts(_config(expected), values).items():
            if len(parts) > 1:
                data = {part: value.contiguous().view(torch.uint8).numpy().tobytes() for part, value in parts.items()}
                found[name] = {
                    part: TensorHash(tensors[name].dtype, tuple(parts[part].shape), hashlib.sha256(own).hexdigest())
                    for part, own in data.items()
                }
    return found


def _config(expected: Expected) -> PreTrainedConfig:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[expected.config["model_type"]].from_dict(expected.config)


def _repaired_modules(history: History) -> list[str]:
    repairs = [stage.entry.get("repair") or {} for stage in history.stages if stage.name == "prune"]
    return [name for repair in repairs for name in repair.get("changed_modules") or ()]


def stored_tensors(place: Place, expected: Expected) -> Iterator[tuple[str, TensorHash]]:
    """The tensors of the files that loaders read. Files with the expected hash are not read."""
    files = weight_files(place)
    weight_map: dict[str, str] = {}
    for file in files:
        if file not in place.hashes:
            raise CheckpointError(f"{place.name} lacks {file}, so it is not complete")
        if place.hashes[file] == expected.files.get(file):
            tensors = expected.inside[file]
        else:
            tensors = digest_file(place.path(file))
        for name, tensor in tensors.items():
            if weight_map.setdefault(name, file) != file:
                raise CheckpointError(f"{name} is in both {weight_map[name]} and {file}")
            if place.is_adapter and not name.startswith(_ADAPTER_PREFIX):
                raise CheckpointError(f"{name} does not begin with {_ADAPTER_PREFIX}, so PEFT would not load it")
            yield name.removeprefix(_ADAPTER_PREFIX) if place.is_adapter else name, tensor
    if INDEX in place.hashes and _read_index(place)["weight_map"] != weight_map:
        raise CheckpointError(f"{INDEX} and the weight files do not agree on which tensor is where")


def _difference(name: str, tensor: TensorHash, wanted: TensorHash | None, quantizer: str | None) -> str:
    if wanted is None:
        return f"{name} is not a tensor of the base"
    whose = "the base's" if quantizer is None else f"what {quantizer} makes of the base's"
    if (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
        has, was = (f"{one.dtype}{list(one.shape)}" for one in (tensor, wanted))
        lost = "; a weight that was dequantised in loading, as on a CPU, can't be checked"
        return f"{name} is {has}, and {whose} is {was}{lost if wanted.dtype.startswith('F8_') else ''}"
    return f"{name} differs from {whose}"


def _may_be_trained(name: str, tensor: TensorHash, wanted: TensorHash | None) -> bool:
    """Whether a repair or training can have made a tensor: neither adds one, but an untied head, or changes a shape."""
    if wanted is None:
        return _is_head(name)
    floats = {tensor.dtype, wanted.dtype} <= _FLOATS
    return tensor.shape == wanted.shape and (floats or tensor.dtype == wanted.dtype)


def _is_untied(place: Place, expected: Expected) -> bool:
    if place.is_adapter:
        return False
    was, now = ((config, text_config(config)) for config in (_config(expected), load_config(place.folder)))
    untied = [getattr(part, "tie_word_embeddings", None) is False for part in now]
    return any(left and getattr(part, "tie_word_embeddings", False) for left, part in zip(untied, was, strict=True))


def _is_head(name: str) -> bool:
    return name.endswith("lm_head.weight")


def _is_tied(name: str, expected: Expected, seen: set[str]) -> bool:
    """Whether a tensor is an LM head that need not be stored because it is tied to the stored embeddings."""
    tied, tensors = bool(expected.config.get("tie_word_embeddings")), expected.tensors
    return _is_head(name) and tied and any(tensors.get(other) == tensors[name] for other in seen)
