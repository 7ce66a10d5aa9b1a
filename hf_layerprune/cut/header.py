"""Reading and writing the header of a safetensors file, and its index, trusting nothing in them.

A safetensors file is eight bytes of header length, a JSON header (each tensor's dtype, shape and byte range), and the
tensors back to back, without a gap. The safetensors library maps a file whole and hands out tensors; a cut needs the
byte ranges, of files that need not be local, so the header is read here. Entries are matched one by one, so that a
damaged or hostile header costs no more memory than a good one of its length.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ..errors import CheckpointError
from ..files.copy import PAGE, Source

# Bits an element.
DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# The safetensors library refuses longer headers as well.
MAX_HEADER = 100_000_000
_NO_ENTRY = re.compile(rb"\{\s*+\}\s*+")
_PADDING = re.compile(rb"\s*+")
_MAX_ENTRY = 1 << 16
_MAX_NAME = 2000
_LENGTH = struct.Struct("<Q")
_ALIGNMENT = 8
_METADATA = "__metadata__"
# `"name": {...}` without objects inside. Nothing in it can be tried in two ways, so matching takes linear time.
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_ENTRY = re.compile(rb"\s*+(" + _STRING + rb")\s*+:\s*+(\{(?:[^{}\"]++|" + _STRING + rb")*+\})\s*+", re.DOTALL)
Fail = Callable[[str], NoReturn]
_WAY_OUT = "download or save it again"


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a safetensors file.

    Args:
        name (`str`): Its name.
        dtype (`str`): Its type, as the header spells it.
        shape (`tuple[int, ...]`): Its shape.
        start (`int`): Where its bytes start, counted from the end of the header.
        end (`int`): Where they end.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What stands in a safetensors file, and where.

    Args:
        source (`Source`): The file.
        data_start (`int`): Where the tensors' bytes start in the file.
        tensors (`tuple[Tensor, ...]`): The tensors, in the order of their bytes.
        metadata (`dict[str, str]`, *optional*): The file's own notes, or `None` where there are none.
    """

    source: Source
    data_start: int
    tensors: tuple[Tensor, ...] = field(repr=False)
    metadata: dict[str, str] | None


def read_header(source: Source) -> Header:
    """Read and check the header of a safetensors file.

    Args:
        source (`Source`): The file.

    Returns:
        `Header`: Its tensors, each with a byte range that is proven to lie in the file and to fit its shape.

    Raises:
        CheckpointError: The file is damaged, or no safetensors file.
    """

    def fail(what: str) -> NoReturn:
        raise CheckpointError(f"{source.name} is no sound safetensors file: {what}; {_WAY_OUT}")

    if source.size < _LENGTH.size:
        fail(f"it has only {source.size} bytes")
    (length,) = _LENGTH.unpack(source.read(0, _LENGTH.size))
    if length > MAX_HEADER:
        fail(f"its header claims {length} bytes, and the format allows {MAX_HEADER}")
    data_start = _LENGTH.size + length
    if data_start > source.size:
        fail(f"its header claims {length} bytes, and the file has {source.size}")
    metadata: dict[str, str] | None = None
    tensors: dict[str, Tensor] = {}
    for name, value in _entries(source.read(_LENGTH.size, length), fail):
        if name == _METADATA:
            if metadata is not None:
                fail(f"{_METADATA} stands in it twice")
            if not all(isinstance(note, str) for note in value.values()):
                fail(f"{_METADATA} has a value that is no text")
            _check_text("".join([*value, *value.values()]), fail)
            metadata = value
            continue
        if name in tensors:
            fail(f"tensor {name!r} stands in it twice")
        tensors[name] = _tensor(name, value, fail)
    ordered = tuple(sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)))
    _check_cover(ordered, source.size - data_start, fail)
    return Header(source, data_start, ordered, metadata)


def _entries(raw: bytes, fail: Fail) -> Iterator[tuple[str, dict[str, Any]]]:
    """The members of a JSON object of objects, each as it comes."""
    if raw[:1] != b"{":
        fail("its header is no JSON object")
    position = 1
    if _NO_ENTRY.fullmatch(raw):
        return
    while True:
        match = _ENTRY.match(raw, position)
        if match is None or raw[match.end() : match.end() + 1] not in (b",", b"}"):
            fail(f"byte {_LENGTH.size + position} of its header starts no tensor description")
        name = _parse(match[1], fail)
        if len(name) > _MAX_NAME:
            fail(f"tensor {_short(name)} has a name of {len(name)} characters")
        if name != _METADATA and len(match[2]) > _MAX_ENTRY:
            fail(f"tensor {_short(name)} has a description of {len(match[2])} bytes")
        yield name, _parse(match[2], fail)
        position = match.end() + 1
        if raw[match.end() : position] == b"}":
            break
    if not _PADDING.fullmatch(raw, position):
        fail(f"something follows the JSON of its header, at byte {_LENGTH.size + position}")


def _parse(raw: bytes, fail: Fail) -> Any:
    try:
        value = parse_json(raw)
    except (ValueError, RecursionError) as error:
        fail(f"its header is damaged ({_short(str(error))})")
    if isinstance(value, str):
        _check_text(value, fail)
    return value


def _check_text(text: str, fail: Fail) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        fail(f"its header has half a character ({error.reason})")


def parse_json(raw: bytes) -> Any:
    """Parse JSON in which no object names a key twice.

    Raises:
        ValueError: It is no JSON, or a key is given twice.
        RecursionError: It is nested too deeply.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise ValueError(f"key {_short(twice)} is given twice")
        return found

    return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)


def _short(name: str) -> str:
    return repr(name if len(name) <= 100 else name[:97] + "...")


def _tensor(name: str, value: dict[str, Any], fail: Fail) -> Tensor:
    if value.keys() != {"dtype", "shape", "data_offsets"}:
        fail(f"tensor {_short(name)} needs dtype, shape and data_offsets, and has {_short(', '.join(value))}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        fail(f"tensor {_short(name)} has the unknown dtype {_short(str(dtype))}")
    if not _are_sizes(shape):
        fail(f"tensor {_short(name)} has the shape {_short(str(shape))}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        fail(f"tensor {_short(name)} has the data_offsets {_short(str(offsets))}")
    needed, rest = divmod(math.prod(shape) * bits, 8)
    if rest or needed != offsets[1] - offsets[0]:
        fail(
            f"tensor {_short(name)} of dtype {dtype} and shape {_short(str(shape))} can't have "
            f"{offsets[1] - offsets[0]} bytes"
        )
    return Tensor(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_cover(tensors: tuple[Tensor, ...], size: int, fail: Fail) -> None:
    """The format wants the bytes after the header covered by the tensors, once each."""
    position, last = 0, "the header"
    for tensor in tensors:
        if tensor.start < position:
            fail(f"tensors {_short(last)} and {_short(tensor.name)} overlap")
        if tensor.start > position:
            fail(f"{tensor.start - position} bytes before tensor {_short(tensor.name)} belong to none")
        position, last = tensor.end, tensor.name
        if position > size:
            fail(f"tensor {_short(tensor.name)} ends at {position}, and the file has {size} bytes of tensors")
    if position < size:
        fail(f"{size - position} bytes at its end belong to no tensor")


def write_header(tensors: list[Tensor], metadata: dict[str, str] | None, phase: int = 0) -> bytes:
    """Make the first bytes of a safetensors file, up to the first tensor's.

    Args:
        tensors (`list[Tensor]`): The tensors, in order.
        metadata (`dict[str, str]`, *optional*): The file's own notes.
        phase (`int`, *optional*, defaults to 0): Where, within a page of the file, the first tensor should start. It
            is taken up if tensors stay aligned by it.

    Returns:
        `bytes`: Header length, header and padding.
    """
    entries: dict[str, Any] = {} if metadata is None else {_METADATA: metadata}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (tensor.start, tensor.end),
        }
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    end = _LENGTH.size + len(raw)
    padding = (phase - end) % PAGE if phase % _ALIGNMENT == 0 else -end % _ALIGNMENT
    if len(raw) + padding > MAX_HEADER:
        padding = -end % _ALIGNMENT
    return _LENGTH.pack(len(raw) + padding) + raw + b" " * padding
