"""Account for every tensor of a model: it is the repeated cut's, or a recorded stage changed it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...cut.base import check_index, find_weights
from ...cut.header import FLOATS
from ...errors import CheckpointError, boundary
from ...files.json_file import read_object
from ...files.shards import INDEX, MAX_INDEX, shard_names
from ...options import pluralize
from ...records.fingerprints import ADAPTER_WEIGHTS, CONFIG
from ...records.history import QUANTIZE, History
from ...records.lineage import FILE_NAME as LINEAGE
from ...runtime.loading import ignored_names, load_config
from ...runtime.model_class import model_class_of, stored_tensors, tied_names
from .fields import differences, unties
from .outcome import Verification
from .places import ModelLocation
from .rebuild import Expected, TensorHash, WeightFile, inferred_dtype, notes_in

if TYPE_CHECKING:
    import torch

_ADAPTER_PREFIX = "base_model.model."
_NO_MODEL = "no model can be built from the base's config"


def weight_files(model: ModelLocation) -> tuple[list[str], dict[str, Any] | None]:
    """The names of the weight files that loaders read, and the index that lists them, if there is one.

    Raises:
        CheckpointError: There are none, or loaders differ in which files they read.
    """
    if model.is_adapter:
        return [ADAPTER_WEIGHTS], None
    name = find_weights([name for name in model.hashes if "/" not in name], model.name)
    if name != INDEX:
        return [name], None
    index = read_object(model.path(INDEX), max_bytes=MAX_INDEX)
    if "metadata" not in index:
        raise CheckpointError(f"{INDEX} has no metadata, without which transformers does not load the model")
    return shard_names(index, f"{model.name}/{INDEX}"), index


def read_weights(model: ModelLocation, expected: Expected) -> tuple[dict[str, WeightFile], dict[str, Any] | None]:
    """The files that loaders read, by name, and their index. Files with the expected hash are not read.

    Raises:
        CheckpointError: They are not complete, or contradict each other.
    """
    names, index = weight_files(model)
    files: dict[str, WeightFile] = {}
    for name in names:
        if name not in model.hashes:
            raise CheckpointError(f"{model.name} lacks {name}, so it is not complete")
        same = model.hashes[name] == expected.files.get(name)
        files[name] = expected.weights[name] if same else WeightFile.read(model.path(name))
    if index is not None:
        check_index(index["weight_map"], {name: file.tensors for name, file in files.items()}, f"{model.name}/{INDEX}")
    return files, index


def adapter_tensors(model: ModelLocation, expected: Expected) -> dict[str, TensorHash]:
    """The tensors of an adapter, by their modules' names in the cut model.

    Raises:
        CheckpointError: There are none, or PEFT would not load one.
    """
    tensors = read_weights(model, expected)[0][ADAPTER_WEIGHTS].tensors
    if stray := next((name for name in tensors if not name.startswith(_ADAPTER_PREFIX)), None):
        raise CheckpointError(f"{stray} does not begin with {_ADAPTER_PREFIX}, so PEFT would not load it")
    return {name.removeprefix(_ADAPTER_PREFIX): tensor for name, tensor in tensors.items()}


def check_tensors(
    model: ModelLocation,
    history: History,
    expected: Expected,
    modules: Mapping[str, TensorHash] | None,
    outcome: Verification,
) -> None:
    """Check that every tensor is the base's or was changed by a recorded stage, and that none is missing or extra.

    `modules` is what `adapter_tensors` returns for an adapter. The findings are added to the outcome.

    Raises:
        CheckpointError: The weight files are not complete, or contradict each other.
    """
    tensors, prefix = expected.tensors, _missing_prefix(expected)
    ties, names = tied_names(expected.model_config)

    def in_cut(name: str) -> str:
        """The repeated cut's name for a tensor, of which transformers may have completed or changed the name."""
        return name if name in tensors else names.get(name, name).removeprefix(prefix)

    tied = {in_cut(name): in_cut(other) for name, other in ties.items()}

    def origin(name: str) -> str:
        """The repeated cut's tensor that one has its values from."""
        name = in_cut(name)
        return name if name in tensors else tied.get(name, name)

    changed = {in_cut(name): by for name, by in history.changed().items()}
    files: dict[str, WeightFile] = {}
    if modules is not None:
        stored = _to_stored(model, expected, modules, origin)
    else:
        files, index = read_weights(model, expected)
        stored = [one for file in files.values() for one in file.tensors.items()]
    found = {in_cut(name): tensor for name, tensor in stored}
    if len(found) < len(stored):
        raise CheckpointError(f"{model.name} holds a tensor under two names")
    compared = _compare(found, expected, changed, tied)
    if modules is not None:
        missing = changed.keys() - found.keys()
    else:
        missing = _missing(expected, found, tied, changed)
        now = load_config(model.folder)
        if any(unties(path, *values) for path, values in differences(expected.config, now.to_dict()).items()):
            untied = tied.keys() - {in_cut(name) for name in tied_names(now)[0]} - found.keys()
            compared.wrong += [f"{name} is missing, and {CONFIG} no longer ties it to {tied[name]}" for name in untied]
        whole = expected.model_config
        if now.dtype is None or (whole.dtype is not None and whole.get_text_config().dtype is None):
            has, was = inferred_dtype(files, index), inferred_dtype(expected.weights, expected.index)
            if has != was:
                compared.wrong.append(f"{CONFIG} names no dtype, and loaders would take {has!r} and not {was!r}")
    compared.wrong += [f"{name} is missing" for name in missing]
    quantized = compared.again or any(QUANTIZE in changed[name] for name in compared.recorded)
    if history.quantized and not quantized:
        compared.wrong.append(f"none was changed by the quantising that {LINEAGE} names")
    compared.report(outcome, expected.quantizer)
    if files and expected.config.get("quantization_config") and (expected.quantizer or not history.quantized):
        _check_notes(files, expected, outcome)


@dataclass
class _Comparison:
    """How the tensors of a model compare with the repeated cut's.

    Args:
        same (`int`): How many are equal.
        again (`int`): How many are equal to the base's once these are quantised again.
        recorded (`dict[str, str]`): The stages that changed a tensor, by its name.
        wrong (`list[str]`): What is wrong with each of the others.
    """

    same: int = 0
    again: int = 0
    recorded: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def report(self, outcome: Verification, quantizer: str | None) -> None:
        outcome.recorded.update(self.recorded.values())
        outcome.same += self.same + self.again
        outcome.add_all("tensors", sorted(self.wrong), f"{self.same} are the base's, to the last bit")
        if self.again:
            outcome.add(True, "tensors", f"{self.again} are what {quantizer} makes of the base's, to the last bit")
        for stages in sorted({*self.recorded.values()}):
            names = [name for name, by in self.recorded.items() if by == stages]
            which = f"{pluralize(len(names), 'tensor')}, such as {names[0]}" if len(names) > 1 else names[0]
            text = f"{LINEAGE} says that {stages} changed {which}; the new values can't be derived again"
            outcome.add(None, "recorded", text)


def _compare(
    found: Mapping[str, TensorHash],
    expected: Expected,
    changed: Mapping[str, Collection[str]],
    tied: Mapping[str, str],
) -> _Comparison:
    """Compare each tensor with the repeated cut's; `changed` has the stages that changed tensors, by name."""
    tensors, plain = expected.tensors, expected.plain
    owners = {name.rpartition(".")[0] for name in plain}
    compared = _Comparison()
    for name, tensor in found.items():
        wanted = tensors.get(name, tensors.get(tied.get(name, "")))
        if tensor == wanted:
            if expected.quantizer is not None and plain.get(name) != tensor:
                compared.again += 1
            else:
                compared.same += 1
            continue
        whole = name if name in changed or name in plain else _changed_parameter(name, owners, changed)
        by = changed.get(whole, ())
        if by and (QUANTIZE in by or _may_be_trained(tensor, wanted)):
            compared.recorded[whole] = " and ".join(dict.fromkeys(by))
        else:
            quantizer = None if name in plain else expected.quantizer
            compared.wrong.append(_difference(name, tensor, tensors.get(name), quantizer))
    return compared


def _check_notes(files: Mapping[str, WeightFile], expected: Expected, outcome: Verification) -> None:
    """Check what the files of quantised weights say about their tensors: torchao unpacks them by it."""
    here, there = (notes_in(each.values()) for each in (files, expected.weights))
    whose = f"what {expected.quantizer} notes" if expected.quantizer else "what the base's note"
    texts = [f"what the weight files note on {name} is not {whose}" for name in sorted(here.keys() | there.keys())
             if here.get(name) != there.get(name)]  # fmt: skip
    if here or texts:
        outcome.add_all("tensors", texts, f"{pluralize(len(here), 'note')} in the weight files: {whose}")


def _owner(name: str, owners: set[str]) -> str | None:
    """The module of the base that a stored tensor belongs to: `a.b` for `a.b.weight.absmax`."""
    while name and name not in owners:
        name = name.rpartition(".")[0]
    return name or None


def _changed_parameter(name: str, owners: set[str], changed: Mapping[str, Any]) -> str:
    """The parameter that a part of a quantised one belongs to, if a stage changed that; or else the part itself."""
    owner = _owner(name, owners)
    return next((whole for whole in changed if whole.rpartition(".")[0] == owner), name)


def _missing(
    expected: Expected, found: Collection[str], tied: Mapping[str, str], changed: Mapping[str, Collection[str]]
) -> set[str]:
    """The tensors that a whole model lacks: neither tied, nor ignored by loaders, nor of modules that were quantised."""
    tensors, owners = expected.tensors, {name.rpartition(".")[0] for name in expected.plain}
    packed = {_owner(name, owners) for name, by in changed.items() if QUANTIZE in by and name in found}
    missing = {name for name in tensors.keys() - found
               if tied.get(name) not in found or tensors.get(tied[name]) != tensors[name]}  # fmt: skip
    missing -= ignored_names(expected.model_config, missing)
    return {name for name in missing if name.rpartition(".")[0] not in packed}


def _missing_prefix(expected: Expected) -> str:
    """What transformers adds to the names of a checkpoint that was saved without its head, such as gpt2's."""
    model_class = model_class_of(expected.model_config)
    prefix = f"{model_class[0].base_model_prefix}." if model_class else ""
    return "" if any(name.startswith(prefix) for name in expected.tensors) else prefix


def _to_stored(
    model: ModelLocation, expected: Expected, modules: Mapping[str, TensorHash], origin: Callable[[str], str]
) -> list[tuple[str, TensorHash]]:
    """An adapter's tensors by name, as its base's checkpoint stores them.

    Some types have other names there, or several tensors for one, or one for several. And transformers loads parts of some
    16-bit models in float32, and rounds what others store in it.
    """
    tensors = expected.tensors
    unknown = [name for name in modules if origin(name) not in tensors]
    others = [
        name for name, tensor in modules.items() if name not in unknown and tensor.dtype != tensors[origin(name)].dtype
    ]
    values = _read_adapter(model, [*unknown, *others])
    types = {value.dtype: modules[name].dtype for name, value in values.items()}
    parts = {name: values[name] for name in others}
    if unknown:
        with boundary(_NO_MODEL):
            parts |= stored_tensors(expected.model_config, {name: values[name] for name in unknown})
    hashed = {name: _hash_tensor(value, types[value.dtype], origin(name), expected) for name, value in parts.items()}
    return [*((name, tensor) for name, tensor in modules.items() if name not in values), *hashed.items()]


def _read_adapter(model: ModelLocation, names: Collection[str]) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    if not names:
        return {}
    with safe_open(model.path(ADAPTER_WEIGHTS), "pt") as file:
        return {name: file.get_tensor(f"{_ADAPTER_PREFIX}{name}") for name in names}


def _hash_tensor(value: torch.Tensor, dtype: str, name: str, expected: Expected) -> TensorHash:
    """The hash of a tensor, in the type of the cut's if both have the same values, or the cut's if loading that gives this."""
    import torch

    wanted = expected.tensors.get(name)
    if wanted is not None and {dtype, wanted.dtype} <= FLOATS.keys():
        stored = expected.read_tensor(name) if FLOATS[dtype] == expected.loaded_dtype else None
        if stored is not None and stored.to(value.dtype).equal(value):
            return wanted
        narrow = value.to(getattr(torch, FLOATS[wanted.dtype]))
        if narrow.to(value.dtype).equal(value):
            value, dtype = narrow, wanted.dtype
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return TensorHash(dtype, tuple(value.shape), hashlib.sha256(data).hexdigest())


def _difference(name: str, tensor: TensorHash, wanted: TensorHash | None, quantizer: str | None) -> str:
    if wanted is None:
        return f"{name} is not a tensor of the base"
    whose = "the base's" if quantizer is None else f"what {quantizer} makes of the base's"
    if (tensor.dtype, tensor.shape) != (wanted.dtype, wanted.shape):
        has, was = (f"{one.dtype}{list(one.shape)}" for one in (tensor, wanted))
        lost = "; a weight that was dequantised in loading, as on a CPU, can't be checked"
        return f"{name} is {has}, and {whose} is {was}{lost if wanted.dtype.startswith('F8_') else ''}"
    return f"{name} differs from {whose}"


def _may_be_trained(tensor: TensorHash, wanted: TensorHash | None) -> bool:
    """Whether a repair or training can have made a tensor of the base's: neither adds one, or changes a shape.

    Of an untied head, the base's is the tensor that it was tied to.
    """
    if wanted is None:
        return False
    floats = {tensor.dtype, wanted.dtype} <= FLOATS.keys()
    return tensor.shape == wanted.shape and (floats or tensor.dtype == wanted.dtype)
