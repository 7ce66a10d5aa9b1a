"""Repeat the cut of the base, hashing the files instead of writing them."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ...cut.disk import plan_cut
from ...cut.header import read_header
from ...cut.plan import CheckpointPlan, ShardPlan
from ...cut.write import fill
from ...errors import CheckpointError
from ...files.copy import LocalFile
from ...files.json_file import parse_json
from ...records.fingerprints import CONFIG, WEIGHTS, hash_files, is_inert, model_files, sha256_of
from ...records.history import History
from ...runtime.loading import load_config
from .places import Base
from .requantize import is_repeatable, quantize_again

_CHUNK = 8 << 20
_MAX_HEADER = 100_000_000  # the limit of safetensors


class TensorHash(NamedTuple):
    """The type, the shape and the sha256 of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Expected:
    """The expected content of a pruned model.

    Args:
        files (`dict[str, str]`): The sha256 of each file that may affect the model's behaviour, by relative path.
        inside (`dict[str, dict[str, TensorHash]]`): The tensors of each weight file, by name.
        config (`dict[str, Any]`): The fields of the config, as loaded by its class.
        unquantized (`dict[str, TensorHash]`, *optional*): The tensors before they were quantised, if they were.
        quantizer (`str`, *optional*): What quantised them, with its version.
        notes (`dict[str, str]`): What the weight files of a quantised model say about their tensors, which decides how
            some of them are unpacked.
    """

    files: dict[str, str]
    inside: dict[str, dict[str, TensorHash]]
    config: dict[str, Any]
    unquantized: dict[str, TensorHash] | None = None
    quantizer: str | None = None
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, TensorHash]:
        """All tensors, by name."""
        return {name: tensor for tensors in self.inside.values() for name, tensor in tensors.items()}


def rebuild(history: History, base: Base) -> Expected:
    """Repeat all cuts of a history as a single one, without writing the result.

    Args:
        history (`History`): The stages of the model.
        base (`Base`): The base.

    Returns:
        `Expected`: The expected content of the pruned model.

    Raises:
        CheckpointError: No layers were dropped, the base is damaged or a different one, or the cut can't be repeated.
    """
    if not history.dropped:
        raise CheckpointError("lineage.json does not drop any layers")
    if base.packed or history.dtype is not None:
        return _converted(history, base)
    plan = plan_cut(base.source, history.dropped, revision=base.commit, token=base.token)
    if plan.cut.num_layers != history.num_base_layers:
        raise CheckpointError(
            f"the base has {plan.cut.num_layers} layers, but lineage.json says {history.num_base_layers}"
        )
    _check_bytes(plan, base.files)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in plan.files.items()}
    files |= hash_files({name: plan.source / name for name, _ in plan.companions if not is_inert(name)})
    inside: dict[str, dict[str, TensorHash]] = {}
    for shard in plan.shards:
        with LocalFile(plan.source / shard.source) as source:
            files[shard.target], inside[shard.target] = digest(
                io.BufferedReader(_Chunks(_planned(shard, source)), _CHUNK)
            )
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        folder = Path(place, "cut")
        folder.mkdir()
        if is_repeatable(history.quantized):
            fill(plan, folder)
        else:
            (folder / CONFIG).write_bytes(plan.files[CONFIG])
        return _quantized(history, folder, Expected(files, inside, load_config(folder).to_dict()))


def _quantized(history: History, folder: Path, cut: Expected) -> Expected:
    """What a cut becomes when it is quantised as its history says."""
    stage = history.quantized
    if stage is None:
        return cut
    told = stage.settings["quantization_config"]
    if not is_repeatable(stage):  # its tensors can't be derived again, and are counted as the ones that it changed
        return replace(cut, config=cut.config | {"quantization_config": told, "dtype": stage.settings.get("dtype")})
    target = folder.with_name("quantized")
    quantizer = quantize_again(stage, folder, target)
    paths = {name: path for name, path in model_files(target).items() if name.endswith(WEIGHTS)}
    inside = {name: digest_file(path) for name, path in paths.items()}
    files = {name: sha256 for name, sha256 in cut.files.items() if not name.endswith(WEIGHTS)} | hash_files(paths)
    return Expected(files, inside, load_config(target).to_dict(), cut.tensors, quantizer, notes_in(paths.values()))


def notes_in(paths: Iterable[Path]) -> dict[str, str]:
    """What safetensors files say about their tensors.

    Args:
        paths (`Iterable[Path]`): The files of a model.

    Returns:
        `dict[str, str]`: By name.

    Raises:
        CheckpointError: Two files contradict each other, or one is not a safetensors file.
    """
    notes: dict[str, str] = {}
    for path in paths:
        for name, text in (read_header(path).metadata or {}).items():
            if notes.setdefault(name, text) != text:
                raise CheckpointError(f"{path.name} and another weight file contradict each other on {name}")
    return notes


def _check_bytes(plan: CheckpointPlan, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the base's weights against their listed hashes, since file names in a cache prove nothing."""
    for name in {shard.source for shard in plan.shards}:
        listed = files.get(name, {}).get("sha256")
        if listed is not None and sha256_of(plan.source / name) != listed:
            raise CheckpointError(
                f"{plan.source / name} does not match its hash ({listed[:12]}); remove it from the cache to "
                "download it again"
            )


def _planned(shard: ShardPlan, source: LocalFile) -> Iterator[bytes | memoryview]:
    """The bytes of a planned weight file. Each part is valid only until the next one is requested."""
    yield shard.header
    for offset, length in shard.spans():
        yield from source.chunks(offset, length)


def _converted(history: History, base: Base) -> Expected:
    """Repeat a cut whose weights are dequantised or converted, in a temporary folder."""
    import torch

    from ...cut.memory import drop_layers
    from ...runtime.loading import load_base, load_tokenizer

    conversions = [
        one for one in history.stages if one.name == "prune" and one.settings.get("dtype", "auto") != "auto"
    ]
    if len(conversions) > 1:
        raise CheckpointError("the weights were converted more than once, which can't be verified")
    dtype = getattr(torch, history.dtype or "", None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"lineage.json says that the weights were converted to {history.dtype!r}, which is not a dtype"
        )
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        folder = Path(place, "cut")
        model = load_base(base.source, revision=base.commit, dtype=dtype)
        drop_layers(model, history.dropped)
        model.save_pretrained(folder)
        with suppress(CheckpointError):  # a base may have no tokenizer
            load_tokenizer(base.source, revision=base.commit).save_pretrained(folder)
        paths = model_files(folder)
        inside = {name: digest_file(path) for name, path in paths.items() if name.endswith(WEIGHTS)}
        return _quantized(history, folder, Expected(hash_files(paths), inside, load_config(folder).to_dict()))


def digest_file(path: Path) -> dict[str, TensorHash]:
    """Hash the tensors of a safetensors file.

    Raises:
        CheckpointError: The file is not a valid safetensors file.
    """
    with path.open("rb") as file:
        return digest(file, str(path))[1]


def digest(file: BinaryIO, name: str = "the base") -> tuple[str, dict[str, TensorHash]]:
    """Hash a safetensors file while it is read, as a whole and tensor by tensor.

    Args:
        file (`BinaryIO`): The file.
        name (`str`, *optional*): The name to use in errors.

    Returns:
        `tuple[str, dict[str, TensorHash]]`: The sha256 of the file, and the hashes of its tensors by name.

    Raises:
        CheckpointError: The header is invalid, or the file is too short or too long.
    """
    whole = hashlib.sha256()

    def take(count: int) -> bytes:
        data = file.read(count)
        if len(data) < count:
            raise CheckpointError("a weight file is shorter than its header says; download or save it again")
        whole.update(data)
        return data

    length = int.from_bytes(take(8), "little")
    if not 2 <= length <= _MAX_HEADER:
        raise CheckpointError(f"{name} is not a safetensors file; download or save it again")
    header = parse_json(take(length), name)
    tensors: dict[str, TensorHash] = {}
    position = 0
    try:
        header.pop("__metadata__", None)
        for tensor, told in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = told["data_offsets"]
            if start != position or not start <= end:
                raise CheckpointError(f"{name}: {tensor} does not begin where the tensor before it ends")
            own = hashlib.sha256()
            for offset in range(start, end, _CHUNK):
                own.update(take(min(_CHUNK, end - offset)))
            tensors[tensor] = TensorHash(told["dtype"], tuple(told["shape"]), own.hexdigest())
            position = end
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{name} has an invalid header: {error}") from error
    if file.read(1):
        raise CheckpointError(f"{name} has bytes that do not belong to any tensor")
    return whole.hexdigest(), tensors


class _Chunks(io.RawIOBase):
    """Chunks of bytes, as a file to read."""

    def __init__(self, chunks: Iterator[bytes | memoryview]) -> None:
        self._chunks: Iterator[bytes | memoryview] = filter(len, chunks)  # an empty chunk is not the end
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._left = self._left or memoryview(next(self._chunks, b""))
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count
