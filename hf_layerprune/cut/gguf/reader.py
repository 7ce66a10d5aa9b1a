"""Read the header of a GGUF file with the `gguf` library, within fixed bounds for damaged or hostile files.

`gguf.GGUFReader` trusts the counts in a file and creates several objects for each token of the vocabulary, which takes
hundreds of megabytes. Here every range is checked against the file's size, counts are bounded, and arrays are read whole.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from gguf import GGUFReader, GGUFValueType

from ...errors import CheckpointError
from ...families.gguf import MAX_LAYERS

MAX_KEYS = 4096
MAX_TENSORS = 1 << 18
MAX_STRINGS = 1 << 23
MAX_STRING = 1 << 28
MAX_ALIGNMENT = 1 << 20
_FIXED = struct.Struct("<4sIQQ")
_NOT_WHOLE = {GGUFValueType.FLOAT32, GGUFValueType.FLOAT64, GGUFValueType.BOOL}


class _BoundedReader(GGUFReader):
    """The library's reader, limited to the size of the file."""

    strings = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        if offset < 0 or int(count) < 0 or offset + int(count) * np.dtype(dtype).itemsize > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)}, inside something that starts at byte {offset}")
        return super()._get(offset, dtype, count, override_order)

    def _get_str(self, offset: int) -> Any:
        if (length := int(self._get(offset, np.uint64)[0])) > MAX_STRING:
            raise ValueError(f"the text at byte {offset} claims to be {length} bytes long")
        return super()._get_str(offset)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind, start = GGUFValueType(int(item_type[0])), orig_offs + 12
        if kind == GGUFValueType.ARRAY:
            raise ValueError(f"an array of arrays at byte {orig_offs}")
        if kind == GGUFValueType.STRING:
            items = self._get(start, np.uint8, self._strings_end(start, int(count[0])) - start)
        else:
            items = self._get(start, self.gguf_scalar_to_np[kind], int(count[0]))
        parts = [item_type, count, items]
        return sum(part.nbytes for part in parts), parts, [2], [GGUFValueType.ARRAY, kind]

    def _strings_end(self, position: int, count: int) -> int:
        # Bounds the time: without it, a huge file of zeros would be read as billions of empty strings.
        self.strings += count
        if self.strings > MAX_STRINGS:
            raise ValueError(f"it claims {self.strings} strings, more than any vocabulary has")
        data, unpack, end = self.data.data, struct.Struct("<Q").unpack_from, len(self.data)
        for _ in range(count):
            if position + 8 > end:
                raise ValueError(f"it ends at byte {end}, inside an array of strings")
            position += 8 + unpack(data, position)[0]
        return position


@dataclass(frozen=True)
class Entry:
    """One metadata entry.

    Args:
        key (`str`): The key.
        kind (`GGUFValueType`): The type.
        item_kind (`GGUFValueType`, *optional*): For an array, the type of its items.
        count (`int`): For an array, the number of items; otherwise 1.
        raw (`bytes`): The value as stored in the file, after its type.
    """

    key: str
    kind: GGUFValueType
    item_kind: GGUFValueType | None
    count: int
    raw: bytes

    @property
    def is_array(self) -> bool:
        """Whether the value is an array."""
        return self.item_kind is not None

    @property
    def is_numeric(self) -> bool:
        """Whether the value, or each item of the array, is a number or a boolean."""
        return (self.item_kind or self.kind) in GGUFReader.gguf_scalar_to_np

    @property
    def is_integer(self) -> bool:
        """Whether the value is a single integer."""
        return not self.is_array and self.is_numeric and self.kind not in _NOT_WHOLE

    @property
    def text(self) -> str | None:
        """The value if it is a string, else `None`."""
        return self.raw[8:].decode("utf-8", errors="replace") if self.kind == GGUFValueType.STRING else None

    @cached_property
    def values(self) -> list[Any]:
        """The items of a numeric array with at most one value per layer, or the single number."""
        if not self.is_numeric or self.count > MAX_LAYERS:
            return []
        offset = 12 if self.is_array else 0
        return np.frombuffer(
            self.raw, GGUFReader.gguf_scalar_to_np[self.item_kind or self.kind], offset=offset
        ).tolist()


@dataclass(frozen=True)
class Tensor:
    """One tensor of the file. `offset` is from the start of the file, and `shape` is in numpy's order."""

    name: str
    shape: tuple[int, ...]
    kind: Any
    offset: int
    size: int


@dataclass(frozen=True)
class GGUFHeader:
    """Everything in a GGUF file except the tensor data."""

    path: Path
    keys: dict[str, Entry]
    tensors: tuple[Tensor, ...]
    alignment: int

    def fail(self, what: str) -> NoReturn:
        """Refuse the file.

        Args:
            what (`str`): The problem and how to fix it.

        Raises:
            CheckpointError: Always.
        """
        raise _refused(self.path, what)


def _refused(path: Path, what: str) -> CheckpointError:
    # Names in the file are untrusted: remove line breaks and control characters, and limit the length.
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in what)
    return CheckpointError(f"{path}: {line if len(line) <= 1000 else line[:1000] + '...'}")


def read_header(path: Path) -> GGUFHeader:
    """Read and check the header of a GGUF file.

    Args:
        path (`Path`): A regular file.

    Returns:
        `GGUFHeader`: The metadata and the tensor descriptions.

    Raises:
        CheckpointError: The file is not a complete and valid little-endian GGUF file of version 2 or 3.
    """
    with path.open("rb") as file:
        start = file.read(_FIXED.size)
    if start[:4] != b"GGUF":
        raise _refused(path, "this is not a GGUF file: it does not start with 'GGUF'")
    if len(start) < _FIXED.size:
        raise _refused(path, f"the file ends at byte {len(start)}; it is truncated, so download it again")
    _, version, tensor_count, key_count = _FIXED.unpack(start)
    if version and not version & 0xFFFF:
        raise _refused(path, "this is a big-endian GGUF file; convert it with gguf-convert-endian first")
    if version not in (2, 3):
        raise _refused(path, f"GGUF version {version} is not supported; convert the model again to get version 3")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise _refused(
            path,
            f"the header claims {tensor_count} tensors and {key_count} metadata keys, and at most {MAX_TENSORS} and "
            f"{MAX_KEYS} are supported; the file is damaged",
        )
    try:
        with np.errstate(all="ignore"):  # integer overflows are detected below
            reader = _BoundedReader(path)
        keys = {key: _entry(key, field) for key, field in reader.fields.items() if not key.startswith("GGUF.")}
        tensors = tuple(
            Tensor(
                one.name,
                tuple(int(size) for size in reversed(one.shape)),
                one.tensor_type,
                one.data_offset,
                one.n_bytes,
            )
            for one in reader.tensors
        )
    except (ValueError, KeyError, OverflowError, MemoryError, IndexError, TypeError) as error:
        raise _refused(
            path, f"it can't be read ({error}); it is truncated or damaged, so download it again"
        ) from error
    header = GGUFHeader(path, keys, tensors, int(reader.alignment))
    _check_layout(header, reader.data_offset)
    return header


def _entry(key: str, field: Any) -> Entry:
    if not key:
        raise ValueError("a metadata key is empty")
    raw = b"".join(part.tobytes() for part in field.parts[3:])  # the parts before are the key and the type
    is_array = field.types[0] == GGUFValueType.ARRAY
    return Entry(
        key, field.types[0], field.types[1] if is_array else None, int(field.parts[4][0]) if is_array else 1, raw
    )


def _check_layout(header: GGUFHeader, data_start: int) -> None:
    if header.alignment > MAX_ALIGNMENT:
        header.fail(f"general.alignment is {header.alignment}, more than {MAX_ALIGNMENT}; the file is damaged")
    end, before = data_start, ""
    for tensor in sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if (tensor.offset - data_start) % header.alignment:
            header.fail(
                f"tensor {tensor.name!r} starts at byte {tensor.offset}, not aligned to {header.alignment} bytes; "
                "the file is damaged, so download it again"
            )
        if tensor.size and tensor.offset < end:
            header.fail(f"tensors {before!r} and {tensor.name!r} overlap; the file is damaged, so download it again")
        if tensor.size:
            end, before = tensor.offset + tensor.size, tensor.name
