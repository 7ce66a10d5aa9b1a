"""Read the header of a safetensors file, and locate the bytes of each tensor.

The safetensors library validates the header (types, shapes, no gaps, no overlaps) in time and memory proportional to its
length, which is bounded here first. It returns tensors rather than byte ranges, which are taken from the JSON.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, one_line
from ..files.copy import FileState, LocalFile
from ..files.json_file import parse_json

# Types with one parameter per element, and what torch calls them.
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Ten times the header of the largest single-file models; the format allows 100 MB.
MAX_HEADER = 1 << 25
# Alignment of the tensor data, as in the safetensors library.
_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a safetensors file, with the offsets of its bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The content of a safetensors file. Its `version` is its state when it was read, to detect later changes."""

    path: Path
    version: FileState
    data_start: int
    tensors: tuple[Tensor, ...] = field(repr=False)
    metadata: dict[str, str] | None

    @property
    def names(self) -> list[str]:
        """The names of the tensors."""
        return [tensor.name for tensor in self.tensors]

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return self.version.size


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file: each byte range lies within the file and fits its tensor.

    Raises:
        CheckpointError: The file is damaged, or not a safetensors file.
    """
    from safetensors import safe_open

    with LocalFile(path) as file:
        version = file.version
        length = int.from_bytes(file.read(0, min(8, file.size)), "little")
        if file.size < 8 or length > min(MAX_HEADER, file.size - 8):
            raise _header_error(path, f"its header claims {length} bytes, and the file has {file.size}")
        text = file.read(8, length)
    try:
        with safe_open(path, framework="numpy"):  # validates the header
            entries = parse_json(text, "its header")
    except Exception as error:  # SafetensorError, OSError or CheckpointError, among others
        raise _header_error(path, one_line(str(error))[:200]) from error
    metadata = entries.pop("__metadata__", None)
    tensors = [
        Tensor(name, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"]) for name, entry in entries.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    return Header(path, version, 8 + length, tuple(tensors), metadata)


def _header_error(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a valid safetensors file: {what}; download or save it again")


def write_header(tensors: list[Tensor], metadata: dict[str, str] | None) -> bytes:
    """What precedes the tensor data in a safetensors file: the header's length, the header, and its padding."""
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (tensor.start, tensor.end),
        }
    raw = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw
