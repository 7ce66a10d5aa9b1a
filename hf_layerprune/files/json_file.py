"""Read untrusted JSON files: bounded in size and depth, strict, and with one-line errors."""

from __future__ import annotations

import json
import math
from collections import Counter
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, cause_of, one_line
from .text_file import MAX_DEPTH, check_values, read_bytes

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

# What the values of JSON are called in messages.
JSON_TYPES: dict[type, str] = {
    bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip

MAX_BYTES = 32 * 1024 * 1024


def read_object(
    path: Path, *, max_bytes: int = MAX_BYTES, max_depth: int = MAX_DEPTH, non_finite: bool = False
) -> dict[str, Any]:
    """Read a JSON file whose content is an object.

    With `non_finite`, `NaN` and `Infinity` are accepted, which occur in some model configs.

    Raises:
        CheckpointError: The file can't be read, is too large, is not UTF-8 or not JSON, is nested too deeply, repeats
            a key, holds a number larger than any float, or is not an object.
    """
    content = parse_json(read_bytes(path, max_bytes), str(path), max_depth=max_depth, non_finite=non_finite)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {JSON_TYPES[type(content)]} where a JSON object is expected")
    return content


def parse_json(data: bytes | str, name: str, *, max_depth: int = MAX_DEPTH, non_finite: bool = False) -> Any:
    """Parse JSON that is in memory and comes from the file, or file and line, `name`; see [`read_object`].

    Raises:
        CheckpointError: As for `read_object`.
    """
    try:
        content = _decoder(non_finite).decode(data.decode() if isinstance(data, bytes) else data)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        where = f"{f'line {error.lineno} ' if error.doc.count(chr(10)) else ''}column {error.colno}"
        raise CheckpointError(f"{name} is not JSON: {error.msg} at {where}") from error
    except RecursionError as error:
        raise CheckpointError(f"{name} is nested more than {max_depth} levels deep") from error
    except ValueError as error:
        raise CheckpointError(f"{name} is not usable JSON: {cause_of(error)}") from error
    check_values(content, name, max_depth)
    return content


@cache
def _decoder(non_finite: bool) -> json.JSONDecoder:
    def parse_constant(word: str) -> float:
        if not non_finite:
            raise ValueError(f"{word} is not a JSON number")
        return float(word)

    def parse_float(text: str) -> float:
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:40]} is larger than any float")
        return value

    return json.JSONDecoder(
        object_pairs_hook=_reject_duplicate_keys, parse_constant=parse_constant, parse_float=parse_float
    )


def _reject_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        duplicate = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"key {duplicate!r} is repeated")
    return content


@cache
def load_schema(package: str, file_name: str) -> Validator:
    """Load a validator for a JSON schema of draft 2020-12 that is stored in a package."""
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(files(package).joinpath(file_name).read_text(encoding="utf-8")))


def check_schema(content: Any, schema: Validator, name: str) -> None:
    """Refuse content of the file `name` that does not follow a schema.

    Raises:
        CheckpointError: The content does not follow the schema. The message gives the place, and the problem or the
            schema's `errorMessage`.
    """
    error = next(iter(schema.iter_errors(content)), None)
    if error is not None:
        where = "/".join(str(part) for part in error.absolute_path) or "the top"
        problem = error.schema.get("errorMessage") or one_line(error.message)[:200]
        raise CheckpointError(f"{name} has an unexpected value at {where}: {problem}")
