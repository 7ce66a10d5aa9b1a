"""A picture that knows what it was drawn from: a digest in a text chunk of a PNG file, so that it is drawn once."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_KEY = b"hf-layerprune\0"
_HEAD = len(_SIGNATURE) + 25  # the first chunk describes the picture and has a fixed length


def stamp(path: Path, digest: str) -> None:
    """Put a digest into a PNG file.

    Args:
        path (`Path`): The file.
        digest (`str`): What it was drawn from.
    """
    data = path.read_bytes()
    text = b"tEXt" + _KEY + digest.encode()
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    path.write_bytes(data[:_HEAD] + chunk + data[_HEAD:])


def stamped(path: Path) -> str | None:
    """The digest that a PNG file holds.

    Args:
        path (`Path`): The file, which need not be there.

    Returns:
        `str`, *optional*: `None` where it holds none.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD + 200)
    except OSError:
        return None
    if not head.startswith(_SIGNATURE) or head[_HEAD + 4 : _HEAD + 8 + len(_KEY)] != b"tEXt" + _KEY:
        return None
    (length,) = struct.unpack(">I", head[_HEAD : _HEAD + 4])
    return head[_HEAD + 8 + len(_KEY) : _HEAD + 8 + length].decode("latin-1")
