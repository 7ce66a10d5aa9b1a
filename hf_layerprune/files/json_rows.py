"""Read rows from untrusted JSON files: values on lines, one of which is in memory at a time, or a single list."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_file import MAX_DEPTH, parse_json
from .text_file import open_bounded

MAX_ROW = 32 * 1024 * 1024
MAX_LIST = 2 * 1024**3
_SNIFFED_BYTES = 1 << 20


def read_rows(path: Path, max_bytes: int | None = None) -> Iterator[tuple[str, Any]]:
    """Read the rows of a file, which holds either one JSON value per line, or a single JSON list.

    Args:
        path (`Path`): The file, in UTF-8, with or without a byte order mark.
        max_bytes (`int`, *optional*): The largest file to read; by default only the size of a list is limited.

    Yields:
        `tuple[str, Any]`: The place of the row, such as `"rows.jsonl, line 3"`, and the row.

    Raises:
        CheckpointError: The file can't be read or is too large; or a line is larger than 32 MiB; or it is not strict
            JSON, as `read_object` defines it.
    """
    with open_bounded(path, max_bytes) as file:
        start = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(start)
        is_list = file.read(_SNIFFED_BYTES).lstrip()[:1] == b"["
        file.seek(start)
        if is_list:
            if path.stat().st_size > MAX_LIST:
                raise CheckpointError(f"{path} is a list of more than {MAX_LIST:,} bytes; put one row on each line")
            rows = parse_json(file.read(), str(path), max_depth=MAX_DEPTH + 1)
            yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, 1))
            return
        number = 0
        while line := file.readline(MAX_ROW + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > MAX_ROW:
                raise CheckpointError(f"{where} is longer than {MAX_ROW:,} bytes, the limit for a row")
            if line.strip():
                yield where, parse_json(line.strip(), where)
