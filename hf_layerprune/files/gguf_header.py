"""Read and write the header of a GGUF file: its metadata, and where each tensor is.

The format is plain: numbers, and texts preceded by their length. The reader of the `gguf` library trusts every count in a
file and creates several objects for each token of the vocabulary; its writer refuses empty arrays and text that is not
UTF-8. So both are done here, within fixed bounds for damaged or hostile files. The block sizes of the tensor types come
from the library.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from ..errors import CheckpointError
from ..layer_ranges import MAX_LAYERS
from .copy import LocalFile

# Far above any real model; limits what a damaged or hostile file can request.
MAX_KEYS = 4096
MAX_TENSORS = 1 << 18
MAX_STRINGS = 1 << 23
MAX_HEADER = 1 << 28  # bytes
_MAX_DIMENSIONS = 4
_ALIGNMENTS = [1 << power for power in range(21)]
_FIXED = struct.Struct("<4sIQQ")
# The type of a value, and for numbers its `struct` format.
_STRING, _ARRAY = 8, 9
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_COUNT = 4  # a whole number of 32 bits
# The keys in which a pruned file records its cut. llama.cpp and transformers ignore keys that they don't know.
_DROPPED, _BASE_LAYERS = "hf_layerprune.drop_layers", "hf_layerprune.num_base_layers"
CUT_KEYS = (_DROPPED, _BASE_LAYERS)


def align(size: int, alignment: int) -> int:
    """A size, rounded up to a multiple of the alignment."""
    return -(-size // alignment) * alignment


@dataclass(frozen=True)
class Entry:
    """One metadata entry, with its value as stored. For an array, `kind`, `count` and `raw` are about its items."""

    key: str
    kind: int
    is_array: bool
    count: int
    raw: bytes

    @property
    def is_numeric(self) -> bool:
        """Whether the value, or each item of the array, is a number or a boolean."""
        return self.kind in _NUMBERS

    @property
    def is_integer(self) -> bool:
        """Whether the value is a single integer."""
        return not self.is_array and _NUMBERS.get(self.kind, "?") not in "fd?"

    @property
    def text(self) -> str | None:
        """The value if it is a string, else `None`."""
        is_text = self.kind == _STRING and not self.is_array
        return self.raw[8:].decode("utf-8", errors="replace") if is_text else None

    @cached_property
    def values(self) -> tuple[Any, ...]:
        """The items of a numeric array with at most one value per layer, or the single number."""
        if not self.is_numeric or self.count > MAX_LAYERS:
            return ()
        return struct.unpack(f"<{self.count}{_NUMBERS[self.kind]}", self.raw)

    def pack(self, values: Sequence[Any] | str | None = None) -> bytes:
        """The entry as stored in a file, with other numbers or another text if any are given."""
        raw, count = self.raw, self.count
        if isinstance(values, str):
            raw = _pack_text(values)
        elif values is not None:
            raw, count = struct.pack(f"<{len(values)}{_NUMBERS[self.kind]}", *values), len(values)
        types = struct.pack("<IIQ", _ARRAY, self.kind, count) if self.is_array else struct.pack("<I", self.kind)
        return _pack_text(self.key) + types + raw


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. `dimensions` has the innermost first, and `offset` is from the start of the data."""

    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """Everything in a GGUF file except the tensor data."""

    path: Path
    keys: dict[str, Entry]
    tensors: tuple[Tensor, ...]
    alignment: int
    data_start: int

    def fail(self, what: str) -> NoReturn:
        """Raise a `CheckpointError` that says what is wrong with the file and how to fix it."""
        raise _header_error(self.path, what)


def _header_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what if len(what) <= 1000 else what[:1000] + '...'}")


class _Reader:
    """Reads values one after another, none beyond the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size, self.position, self._strings = file, size, 0, 0

    def read(self, length: int) -> bytes:
        if length > min(self._size, MAX_HEADER) - self.position:
            raise ValueError(
                f"its header claims {length} bytes from byte {self.position}, but the file has {self._size}, and a header "
                f"at most {MAX_HEADER}"
            )
        self.position += length
        return self._file.read(length)

    def number(self, format: str) -> int:
        return struct.unpack(f"<{format}", self.read(struct.calcsize(format)))[0]

    def text(self) -> bytes:
        length = self.read(8)
        return length + self.read(int.from_bytes(length, "little"))

    def name(self) -> str:
        return self.text()[8:].decode()

    def entry(self) -> Entry:
        key, kind, count = self.name(), self.number("I"), 1
        if not key:
            raise ValueError("a metadata key is empty")
        if is_array := kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
        if kind not in (_STRING, *_NUMBERS):  # also an array of arrays
            raise ValueError(f"{key!r} is of the unknown type {kind}")
        if kind != _STRING:
            return Entry(key, kind, is_array, count, self.read(count * struct.calcsize(_NUMBERS[kind])))
        # Bounds the time: without it, a huge file of zeros would be read as billions of empty strings.
        self._strings += count * is_array
        if self._strings > MAX_STRINGS:
            raise ValueError(f"it claims {self._strings} strings, more than any vocabulary has")
        return Entry(key, kind, is_array, count, b"".join(self.text() for _ in range(count)))

    def tensor(self) -> Tensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # importing gguf is slow

        name, rank = self.name(), self.number("I")
        if rank > _MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {rank} dimensions")
        dimensions = tuple(self.number("Q") for _ in range(rank))
        kind, offset = GGMLQuantizationType(self.number("I")), self.number("Q")
        block, block_size = GGML_QUANT_SIZES[kind]
        if (dimensions or (1,))[0] % block:
            raise ValueError(f"tensor {name!r} ends inside a block of {block} values")
        return Tensor(name, dimensions, int(kind), offset, math.prod(dimensions) // block * block_size)


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Raises:
        CheckpointError: The file is not a complete and valid little-endian GGUF file of version 2 or 3.
    """
    with LocalFile(path) as source:
        start, size = source.read(0, min(_FIXED.size, source.size)), source.size
    if start[:4] != b"GGUF":
        raise _header_error(path, "this is not a GGUF file: it does not start with 'GGUF'")
    if len(start) < _FIXED.size:
        raise _header_error(path, f"the file ends at byte {size}; it is truncated, so download it again")
    _, version, tensor_count, key_count = _FIXED.unpack(start)
    if version not in (2, 3):  # such as that of a big-endian file
        raise _header_error(path, f"GGUF version {version} is not supported; convert the model again to get version 3")
    try:
        if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
            raise ValueError(f"it claims {tensor_count} tensors and {key_count} metadata keys")
        with path.open("rb") as file:
            reader = _Reader(file, size)
            reader.read(_FIXED.size)
            entries = [reader.entry() for _ in range(key_count)]
            tensors = tuple(reader.tensor() for _ in range(tensor_count))
        keys = {entry.key: entry for entry in entries}
        setting = keys.get("general.alignment")
        alignment = 32 if setting is None else struct.unpack("<I", setting.raw)[0]
        if alignment not in _ALIGNMENTS:
            raise ValueError(f"general.alignment is {alignment}")
        data_start = align(reader.position, alignment)
        if len(keys) < key_count or len({tensor.name for tensor in tensors}) < tensor_count:
            raise ValueError("it has a key or a tensor twice")
        end = 0
        for tensor in tensors:
            if tensor.offset != end:  # llama.cpp does not read such a file either
                raise ValueError(f"tensor {tensor.name!r} does not follow the one before it")
            end += align(tensor.size, alignment)
        if tensors and data_start + tensors[-1].offset + tensors[-1].size > size:
            raise ValueError(f"its tensors extend beyond byte {size}, where the file ends")
    except (ValueError, KeyError, struct.error, OSError) as error:
        raise _header_error(
            path, f"it can't be read ({error}); it is truncated or damaged, so download it again"
        ) from error
    return GGUFHeader(path, keys, tensors, alignment, data_start)


def architecture_of(header: GGUFHeader) -> str:
    """The value of `general.architecture`.

    Raises:
        CheckpointError: The architecture is missing, or the file is not a model or is part of a split model.
    """
    kind = header.keys.get("general.type")
    if kind is not None and kind.text != "model":
        header.fail(f"this is not a model: general.type is {kind.text!r}; specify the model's own GGUF file")
    split = header.keys.get("split.count")
    if split is not None and integer_value(header, split) > 1:
        header.fail(
            f"this is one of {integer_value(header, split)} parts of a split model; join them first with "
            "`llama-gguf-split --merge FIRST_PART OUTPUT`"
        )
    entry = header.keys.get("general.architecture")
    if entry is None or not entry.text:
        header.fail("general.architecture is missing, so this is not a model that can be cut")
    return entry.text


def block_count_of(header: GGUFHeader) -> int:
    """The number of layers, including those for multi-token prediction.

    Raises:
        CheckpointError: The count is missing or out of bounds.
    """
    key = f"{architecture_of(header)}.block_count"
    entry = header.keys.get(key)
    if entry is None:
        header.fail(f"{key} is missing, so the layers cannot be counted")
    count = integer_value(header, entry)
    if not 0 < count <= MAX_LAYERS:
        header.fail(f"{key} is {count}, and only 1..{MAX_LAYERS} are supported; the file is damaged")
    return count


def recorded_cut(header: GGUFHeader) -> dict[str, Any] | None:
    """The cut that a pruned file records, in the form of `layer_drop` in a config; `None` without one that fits the file."""
    dropped, base = (header.keys.get(key) for key in CUT_KEYS)
    forms = [(entry.kind, entry.is_array) for entry in (dropped, base) if entry is not None]
    if dropped is None or base is None or forms != [(_COUNT, True), (_COUNT, False)]:
        return None
    drop, n = list(dropped.values), base.values[0]
    # Another program may have dropped layers since, and kept keys that it does not know.
    fits = drop and drop == sorted({*drop}) and drop[-1] < n == block_count_of(header) + len(drop)
    return {"drop_layers": drop, "num_base_layers": n} if fits else None


def cut_entries(drop: Sequence[int], num_base_layers: int) -> list[bytes]:
    """The metadata entries that record a cut."""
    dropped, base = Entry(_DROPPED, _COUNT, True, 0, b""), Entry(_BASE_LAYERS, _COUNT, False, 1, b"")
    return [dropped.pack(drop), base.pack([num_base_layers])]


def integer_value(header: GGUFHeader, entry: Entry) -> int:
    """The value of an entry, which must be a single whole number that is not negative."""
    if not entry.is_integer:
        header.fail(f"{entry.key} should be one whole number; the file is damaged or of an unknown kind")
    number = entry.values[0]
    if number < 0:
        header.fail(f"{entry.key} is {number}, and cannot be negative; the file is damaged")
    return number


def write_header(entries: Sequence[bytes], tensors: Sequence[Tensor], alignment: int) -> bytes:
    """The bytes of a GGUF file that precede the tensor data, for tensors in this order at new offsets."""
    parts, offset = [_FIXED.pack(b"GGUF", 3, len(tensors), len(entries)), *entries], 0
    for tensor in tensors:
        rank = len(tensor.dimensions)
        where = struct.pack(f"<I{rank}QIQ", rank, *tensor.dimensions, tensor.kind, offset)
        parts += [_pack_text(tensor.name), where]
        offset += align(tensor.size, alignment)
    header = b"".join(parts)
    return header.ljust(align(len(header), alignment), b"\0")


def _pack_text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
