"""Read untrusted text and YAML files: bounded in size, and with one-line errors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, LayerPruneError, cause_of

MAX_TEXT = 256 * 1024 * 1024
MAX_YAML = 1024 * 1024
MAX_DEPTH = 64
MAX_VALUES = 1_000_000


@contextmanager
def open_bounded(path: Path, max_bytes: int | None) -> Iterator[BinaryIO]:
    """Open a regular file of bounded size.

    Raises:
        CheckpointError: The file is missing, not a regular file, unreadable, or too large.
    """
    try:
        if not path.is_file():  # a pipe or a device may never end
            what = "is not a file" if path.exists() else "does not exist"
            raise CheckpointError(f"{path} {what}; is the path right, and the download complete?")
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} is larger than {max_bytes:,} bytes, the limit for such a file")
        with path.open("rb") as file:
            yield file
    except LayerPruneError:
        raise
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {cause_of(error, str(path))}") from error


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of bounded size; raises as `open_bounded` does."""
    with open_bounded(path, max_bytes) as file:
        return file.read(max_bytes)


def read_text(path: Path, max_bytes: int = MAX_TEXT) -> str:
    """Read a UTF-8 text, with or without a byte order mark; all line endings become a line feed.

    Raises:
        CheckpointError: The file can't be read, is too large, or is not UTF-8.
    """
    try:
        text = read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping with string keys, of at most 1 MiB. Tags can only create plain values.

    Raises:
        CheckpointError: The file can't be read, is not YAML, is not a mapping with string keys, or is refused by
            `check_values`.
    """
    import yaml

    text = read_text(path, MAX_YAML)
    try:
        fields = yaml.safe_load(text)
    except Exception as error:  # dates, numbers and tags raise other exceptions
        raise CheckpointError(f"{path} is not valid YAML: {cause_of(error)}") from error
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise CheckpointError(f"{path} must be a mapping whose keys are text")
    check_values(fields, str(path), max_values=MAX_VALUES)
    return dict(fields)


def check_values(content: Any, name: str, max_depth: int = MAX_DEPTH, max_values: float = math.inf) -> None:
    """Refuse what the file `name` holds if it is nested deeply, or has text that can't be encoded.

    The limit on the number of values is for YAML, whose aliases can repeat a value very often; each counts as often as
    it appears.

    Raises:
        CheckpointError: It is nested more than `max_depth` levels deep, holds more than `max_values` values or half a
            surrogate pair.
    """
    level, depth, count = [content], 0, 0
    while level:
        if depth > max_depth:
            raise CheckpointError(f"{name} is nested more than {max_depth} levels deep")
        inside: list[Any] = []
        for value in level:
            if isinstance(value, Mapping | list | tuple | set):
                inside += [*value, *value.values()] if isinstance(value, Mapping) else value
                if (count := count + len(value)) > max_values:
                    raise CheckpointError(
                        f"{name} holds more than {max_values:,} values, counting those that it repeats"
                    )
            elif isinstance(value, str) and not value.isascii():
                try:
                    value.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise CheckpointError(f"{name} holds half a surrogate pair in {value[:40]!r}") from error
        level, depth = inside, depth + 1
