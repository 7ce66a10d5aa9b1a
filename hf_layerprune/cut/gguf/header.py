"""Read the header of a GGUF file, believing none of it.

`gguf.GGUFReader` builds one numpy array per token of the vocabulary and loops over whatever counts the file
claims, so a damaged or hostile file can hang it. This reader keeps only byte positions and the few short values
that a cut has to change, checks every count and length against the file's size before it acts on them, and raises
`CheckpointError` for everything that does not add up.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import BinaryIO, NoReturn

from ...errors import CheckpointError
from ...families.gguf import MAX_LAYERS

MAX_KEYS = 4096
MAX_TENSORS = 1 << 18
MAX_STRINGS = 1 << 23
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 255
MAX_SHORT_BYTES = 8 * MAX_LAYERS
MAX_DIMS = 4
MAX_ALIGNMENT = 1 << 20

_WINDOW = 1 << 20
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@cache
def _value_formats() -> dict[int, str]:
    # gguf imports numpy, so it is imported on first use.
    from gguf.constants import GGUFValueType as T

    kinds = (T.UINT8, T.INT8, T.UINT16, T.INT16, T.UINT32, T.INT32, T.UINT64, T.INT64, T.FLOAT32, T.FLOAT64, T.BOOL)
    return dict(zip(map(int, kinds), "BbHhIiQqfd?", strict=True))


@cache
def _constants() -> tuple[int, int, int, dict[int, tuple[int, int]]]:
    from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGUFValueType

    sizes = {int(kind): size for kind, size in GGML_QUANT_SIZES.items()}
    return int(GGUFValueType.STRING), int(GGUFValueType.ARRAY), GGUF_DEFAULT_ALIGNMENT, sizes


def _refuse(path: Path, what: str) -> NoReturn:
    # Names in the file are anybody's text: no line breaks, no terminal codes, no pages of it.
    line = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in what)
    raise CheckpointError(f"{path}: {line if len(line) <= 1000 else line[:1000] + '...'}")


def pad(size: int, alignment: int) -> int:
    """Round a size up to the next multiple of the alignment.

    Args:
        size (`int`): A number of bytes.
        alignment (`int`): The multiple to reach.

    Returns:
        `int`: The smallest multiple of `alignment` that is not below `size`.
    """
    return -(-size // alignment) * alignment


def _encode_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return _U64.pack(len(raw)) + raw


@dataclass(frozen=True, slots=True)
class KeyValue:
    """One metadata entry: where it lies in the file, and its raw bytes if it is short."""

    key: str
    start: int
    end: int
    kind: int
    item_kind: int | None
    count: int
    raw: bytes | None

    @property
    def is_array(self) -> bool:
        """Whether the value is an array."""
        return self.item_kind is not None

    @property
    def is_numeric(self) -> bool:
        """Whether the value, or each item of the array, is a number or a truth value."""
        return self._number_kind in _value_formats()

    @property
    def _number_kind(self) -> int:
        return self.kind if self.item_kind is None else self.item_kind

    @property
    def is_integer(self) -> bool:
        """Whether the value is one whole number."""
        return _value_formats().get(self.kind, "?") not in "?fd"

    @property
    def text(self) -> str | None:
        """The value if it is a short string, else `None`."""
        if self.kind != _constants()[0] or self.raw is None:
            return None
        return self.raw.decode("utf-8", errors="replace")

    def values(self) -> tuple[int | float | bool, ...]:
        """Decode a short numeric value.

        Returns:
            `tuple`: The items of an array, or the one scalar.
        """
        return struct.unpack(f"<{self.count}{_value_formats()[self._number_kind]}", self.raw or b"")

    def with_number(self, value: int) -> bytes:
        """Encode this entry again with another whole number of the same type.

        Args:
            value (`int`): The new value.

        Returns:
            `bytes`: The whole entry, key included.
        """
        return _encode_string(self.key) + _U32.pack(self.kind) + struct.pack(f"<{_value_formats()[self.kind]}", value)

    def with_items(self, indices: Sequence[int]) -> bytes:
        """Encode this array again with only some of its items, byte for byte.

        Args:
            indices (`Sequence[int]`): The items to keep, in order.

        Returns:
            `bytes`: The whole entry, key included.
        """
        width = struct.calcsize(f"<{_value_formats()[self.item_kind]}")
        items = b"".join(self.raw[index * width : (index + 1) * width] for index in indices)
        head = _encode_string(self.key) + _U32.pack(self.kind) + _U32.pack(self.item_kind)
        return head + _U64.pack(len(indices)) + items


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file; `offset` counts from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    size: int

    def encode(self, name: str, offset: int) -> bytes:
        """Encode this entry again under another name and offset.

        Args:
            name (`str`): The new name.
            offset (`int`): The new offset from the start of the tensor data.

        Returns:
            `bytes`: The whole entry.
        """
        dims = struct.pack(f"<I{len(self.shape)}Q", len(self.shape), *self.shape)
        return _encode_string(name) + dims + struct.pack("<IQ", self.ggml_type, offset)


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """Everything in a GGUF file but the tensor data and the long metadata values."""

    path: Path
    version: int
    keys: dict[str, KeyValue]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_start: int
    file_size: int

    def fail(self, what: str) -> NoReturn:
        """Refuse the file.

        Args:
            what (`str`): What is wrong and the way out.

        Raises:
            CheckpointError: Always.
        """
        _refuse(self.path, what)


class _Cursor:
    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self._file = file
        self._path = path
        self._buffer = b""
        self._base = 0
        self._strings = 0
        self.size = size
        self.pos = 0

    def fail(self, what: str) -> NoReturn:
        _refuse(self._path, what)

    def need(self, count: int, what: str) -> None:
        if count > self.size - self.pos:
            self.fail(
                f"the file ends at byte {self.size}, inside {what}, which would need {count} bytes from byte "
                f"{self.pos} on; the file is truncated or damaged, so get it again"
            )

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        at = self.pos - self._base
        if at + count > len(self._buffer):
            at = self._fill(count, what)
        self.pos += count
        return self._buffer[at : at + count]

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.pos += count

    def u32(self, what: str) -> int:
        return _U32.unpack(self.take(4, what))[0]

    def u64(self, what: str) -> int:
        return _U64.unpack(self.take(8, what))[0]

    def string(self, limit: int, what: str) -> str:
        length = self.u64(what)
        if length > limit:
            self.fail(f"{what} claims to be {length} bytes long, and at most {limit} make sense; the file is damaged")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not valid UTF-8; the file is damaged, so get it again")

    def skip_strings(self, count: int, what: str) -> None:
        # The budget bounds the time: without it a huge file of zeros is billions of empty strings.
        self._strings += count
        if self._strings > MAX_STRINGS:
            self.fail(f"{what} claims {count} strings, more than any vocabulary has; the file is damaged")
        self.need(8 * count, what)
        unpack = _U64.unpack_from
        for _ in range(count):
            at = self.pos - self._base
            if at + 8 > len(self._buffer):
                self.need(8, what)
                at = self._fill(8, what)
            length = unpack(self._buffer, at)[0]
            self.pos += 8
            self.need(length, what)
            self.pos += length

    def _fill(self, count: int, what: str) -> int:
        self._file.seek(self.pos)
        self._buffer = self._file.read(max(count, _WINDOW))
        self._base = self.pos
        if len(self._buffer) < count:
            self.fail(f"the file got shorter while {what} was read; make sure that nothing else writes it")
        return 0


def _read_key(cursor: _Cursor, number: int) -> KeyValue:
    string_kind, array_kind, _, _ = _constants()
    formats = _value_formats()
    start = cursor.pos
    key = cursor.string(MAX_KEY_BYTES, f"the name of metadata key {number}")
    what = f"the value of {key!r}"
    kind = cursor.u32(what)
    item_kind, count, raw = None, 1, None
    if kind == array_kind:
        item_kind = cursor.u32(what)
        count = cursor.u64(what)
        if item_kind == string_kind:
            cursor.skip_strings(count, what)
        elif item_kind in formats:
            size = count * struct.calcsize(f"<{formats[item_kind]}")
            cursor.need(size, what)
            if size <= MAX_SHORT_BYTES:
                raw = cursor.take(size, what)
            else:
                cursor.skip(size, what)
        else:
            cursor.fail(f"{what} is an array of type {item_kind}, which cannot be read; the file is damaged")
    elif kind == string_kind:
        length = cursor.u64(what)
        cursor.need(length, what)
        if length <= MAX_SHORT_BYTES:
            raw = cursor.take(length, what)
        else:
            cursor.skip(length, what)
    elif kind in formats:
        raw = cursor.take(struct.calcsize(f"<{formats[kind]}"), what)
    else:
        cursor.fail(f"{what} has the unknown type {kind}; the file is damaged or newer than this reader")
    return KeyValue(key, start, cursor.pos, kind, item_kind, count, raw)


def _read_tensor(cursor: _Cursor, number: int) -> TensorInfo:
    name = cursor.string(MAX_NAME_BYTES, f"the name of tensor {number}")
    what = f"the description of tensor {name!r}"
    n_dims = cursor.u32(what)
    if n_dims > MAX_DIMS:
        cursor.fail(f"tensor {name!r} claims {n_dims} dimensions, and GGUF has at most {MAX_DIMS}; it is damaged")
    shape = struct.unpack(f"<{n_dims}Q", cursor.take(8 * n_dims, what))
    ggml_type = cursor.u32(what)
    offset = cursor.u64(what)
    sizes = _constants()[3]
    if ggml_type not in sizes:
        cursor.fail(f"tensor {name!r} has ggml type {ggml_type}, unknown to the installed gguf; try a newer gguf")
    block, block_bytes = sizes[ggml_type]
    elements = 1
    for dim in shape:
        elements *= dim
    if (shape[0] if shape else 1) % block:
        cursor.fail(f"tensor {name!r} has rows of {shape[:1]} values, not whole blocks of {block}; it is damaged")
    return TensorInfo(name, shape, ggml_type, offset, elements // block * block_bytes)


def _check_layout(header: GGUFHeader) -> None:
    room = header.file_size - header.data_start
    end, before = 0, ""
    for tensor in sorted(header.tensors, key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset % header.alignment:
            header.fail(f"tensor {tensor.name!r} starts at {tensor.offset}, not aligned to {header.alignment} bytes")
        if tensor.offset + tensor.size > room:
            header.fail(
                f"tensor {tensor.name!r} would need {tensor.size} bytes at {tensor.offset} of the tensor data, and "
                f"the file has {max(room, 0)} there; it is truncated or damaged, so get it again"
            )
        if tensor.size and tensor.offset < end:
            header.fail(f"tensors {before!r} and {tensor.name!r} overlap; the file is damaged, so get it again")
        if tensor.size:
            end, before = tensor.offset + tensor.size, tensor.name


def read_header(file: BinaryIO, path: Path, size: int) -> GGUFHeader:
    """Read and check the header of an open GGUF file.

    Args:
        file (`BinaryIO`): The file, opened for reading.
        path (`Path`): Its name, for messages.
        size (`int`): Its size in bytes.

    Returns:
        `GGUFHeader`: The metadata and the tensor descriptions.

    Raises:
        CheckpointError: If the file is not a whole, sane, little-endian GGUF file of version 2 or 3.
    """
    from gguf.constants import GGUF_MAGIC, Keys

    cursor = _Cursor(file, path, size)
    if size < 4 or cursor.u32("the magic number") != GGUF_MAGIC:
        cursor.fail("this is not a GGUF file: it does not start with 'GGUF'")
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        cursor.fail("this is a big-endian GGUF file; convert it with gguf-convert-endian first")
    if version not in (2, 3):
        cursor.fail(f"GGUF version {version} is not supported; convert the model again to get version 3")
    tensor_count, key_count = cursor.u64("the number of tensors"), cursor.u64("the number of metadata keys")
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        cursor.fail(
            f"the header claims {tensor_count} tensors and {key_count} metadata keys, and at most {MAX_TENSORS} and "
            f"{MAX_KEYS} make sense; the file is damaged"
        )
    keys: dict[str, KeyValue] = {}
    for number in range(key_count):
        entry = _read_key(cursor, number)
        if not entry.key or entry.key in keys:
            cursor.fail(f"metadata key {entry.key!r} is there twice, or is empty; the file is damaged")
        keys[entry.key] = entry
    tensors: dict[str, TensorInfo] = {}
    for number in range(tensor_count):
        tensor = _read_tensor(cursor, number)
        if tensor.name in tensors:
            cursor.fail(f"tensor {tensor.name!r} is there twice; the file is damaged")
        tensors[tensor.name] = tensor

    alignment = _constants()[2]
    if (entry := keys.get(Keys.General.ALIGNMENT)) is not None:
        alignment = entry.values()[0] if entry.is_integer else 0
        if not 0 < alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            cursor.fail(f"{entry.key} is not a power of two up to {MAX_ALIGNMENT}; the file is damaged")
    data_start = pad(cursor.pos, alignment)
    header = GGUFHeader(path, version, keys, tuple(tensors.values()), alignment, data_start, size)
    _check_layout(header)
    return header
