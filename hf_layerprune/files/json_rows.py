"""Read rows from untrusted JSON files of any size: one row is in memory at a time."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import CheckpointError, cause_of
from .json_file import parse_json, scan_json

MAX_ROW = 32 * 1024 * 1024
_PIECE = 1 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def read_rows(path: Path, max_bytes: int | None = None) -> Iterator[tuple[str, Any]]:
    """Read the rows of a file, which holds either one JSON value per line, or a single JSON list.

    Args:
        path (`Path`): The file, in UTF-8, with or without a byte order mark.
        max_bytes (`int`, *optional*): The largest file to read; by default the size is not limited.

    Yields:
        `tuple[str, Any]`: The place of the row, such as `"rows.jsonl, line 3"`, and the row.

    Raises:
        CheckpointError: The file can't be read or is too large; or a row is larger than 32 MiB or not strict JSON, as
            `read_object` defines it.
    """
    try:
        if not path.is_file():  # a pipe or a device may never end
            raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} is larger than {max_bytes:,} bytes, the limit for such a file")
        with path.open("rb") as file:
            if file.read(3) != codecs.BOM_UTF8:
                file.seek(0)
            start = file.tell()
            is_list = file.read(_PIECE).lstrip()[:1] == b"["
            file.seek(start)
            yield from _list(path, file) if is_list else _lines(path, file)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} can't be read: {cause_of(error)}") from error


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    number = 0
    while line := file.readline(MAX_ROW + 1):
        number += 1
        if len(line) > MAX_ROW:
            raise CheckpointError(f"{path}, line {number} is longer than {MAX_ROW:,} bytes, the limit for a row")
        if line.strip():
            where = f"{path}, line {number}"
            yield where, parse_json(line.strip(), where)


def _list(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
    window = _Window(path, file)
    window.peek()
    window.at += 1
    number = 0
    while (next_one := window.peek()) != "]":
        if number:
            if next_one != ",":
                raise CheckpointError(f"{path} is not JSON: after row {number} of its list, there is neither , nor ]")
            window.at += 1
            window.peek()
        number += 1
        where = f"{path}, row {number}"
        yield where, window.value(where)
    window.at += 1
    if window.peek():
        raise CheckpointError(f"{path} is not JSON: something follows its list; put one row on each line instead")


class _Window:
    """The part of a file that is being parsed."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at = "", 0

    def more(self) -> bool:
        """Read on. False at the end of the file."""
        data = self.file.read(_PIECE)
        try:
            piece = self.decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            near = self.file.tell() - len(data)
            raise CheckpointError(f"{self.path} is not UTF-8: {error.reason} near byte {near:,}") from error
        self.text, self.at = self.text[self.at :] + piece, 0
        return bool(data)

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it matches anything
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self, where: str) -> Any:
        """The value that begins here."""
        while True:
            try:
                value, self.at = scan_json(self.text, self.at, where)
                return value
            except CheckpointError as error:
                early = isinstance(error.__cause__, json.JSONDecodeError)
                if not early or len(self.text) - self.at > MAX_ROW or not self.more():
                    raise
