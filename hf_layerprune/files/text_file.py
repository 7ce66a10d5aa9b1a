"""Reading a text or YAML file that somebody else may have written: bounded, and with one line for what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, cause_of

MAX_TEXT = 256 * 1024 * 1024
MAX_YAML = 1024 * 1024


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a regular file of bounded size.

    Raises:
        CheckpointError: It is not there, not a regular file, can't be read, or is too large.
    """
    try:
        if not path.is_file():  # a pipe or a device may never end
            raise CheckpointError(f"{path} is not a file" if path.exists() else f"{path} does not exist")
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} can't be read: {cause_of(error)}") from error
    if len(data) > max_bytes:
        raise CheckpointError(f"{path} is larger than {max_bytes:,} bytes, the most that is read of such a file")
    return data


def read_text(path: Path, max_bytes: int = MAX_TEXT) -> str:
    r"""Read a UTF-8 text; line ends of any system become `\n`.

    Args:
        path (`Path`): The file.
        max_bytes (`int`, defaults to 256 MiB): A larger file is refused.

    Raises:
        CheckpointError: It can't be read, is too large, or is not UTF-8.
    """
    try:
        text = read_bytes(path, max_bytes).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8: {error.reason} at byte {error.start}; convert it") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_yaml(path: Path, max_bytes: int = MAX_YAML) -> dict[str, Any]:
    """Read a YAML file with fields. No tag in it can make anything but plain values.

    Args:
        path (`Path`): The file.
        max_bytes (`int`, defaults to 1 MiB): A larger file is refused.

    Raises:
        CheckpointError: It can't be read, is not YAML, or holds something other than fields with names.
    """
    return parse_yaml(read_text(path, max_bytes), str(path))


def parse_yaml(text: str, name: str) -> dict[str, Any]:
    """Parse YAML that is in memory; see [`read_yaml`].

    Args:
        text (`str`): The text.
        name (`str`): What to call it in an error.

    Raises:
        CheckpointError: As for `read_yaml`.
    """
    import yaml

    try:
        fields = yaml.safe_load(text)
    except Exception as error:  # dates, numbers and tags raise kinds of their own
        raise CheckpointError(f"{name} is not usable YAML: {cause_of(error)}") from error
    if not isinstance(fields, Mapping) or not all(isinstance(key, str) for key in fields):
        raise CheckpointError(f"{name} must have fields with names, and has {type(fields).__name__}")
    return dict(fields)
