"""Kinds of option values: how they are parsed from the command line, and how they are validated."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import CutError
from ..layer_ranges import MAX_LAYERS, parse_layers

DTYPES = ("auto", "bfloat16", "float16", "float32")
MODEL_HELP = "A Hub id, a model folder, or a .gguf file"
ANY_MODEL_HELP = "A Hub id, a model folder, a .gguf file, or an adapter"
_MAX_CHARACTERS = 4096


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        parse (`Callable[[str], Any]`): Parses a command-line argument; raises `ValueError`. See [`read`].
        check (`Callable[[Any], Any]`): Validates and normalises a value; raises `ValueError`, saying what it must be.
        metavar (`str`, *optional*): Its placeholder in `--help`.
        repeated (`bool`): Whether the option can be repeated, with one value each time.
    """

    parse: Callable[[str], Any]
    check: Callable[[Any], Any]
    metavar: str | None = None
    repeated: bool = False

    def read(self, text: str) -> Any:
        """Parse a command-line argument.

        Raises:
            ValueError: It can't be parsed; the message says what it must be.
        """
        try:
            return self.parse(text)
        except CutError:  # it says so already
            raise
        except ValueError:
            return self.check(text)


def integer(minimum: int = 1, maximum: int = 1_000_000, metavar: str = "N") -> Kind:
    """A whole number from `minimum` to `maximum`."""

    def check(value: Any) -> int:
        number = as_integer(value)
        if number is None or not minimum <= number <= maximum:
            raise ValueError(f"must be a whole number from {minimum} to {maximum}")
        return number

    return Kind(int, check, metavar)


def tuple_of(kind: Kind, check: Callable[[Any], Any] | None = None, separator: str | None = None) -> Kind:
    """Several values of a kind, as a tuple: from a repeated option, or with a `separator` from a single argument."""

    def check_each(values: Any) -> tuple[Any, ...]:
        if isinstance(values, str) and separator:  # which could not be parsed
            values = values.split(separator)
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError("must be a list")
        return tuple(kind.check(value) for value in values)

    def parse(text: str) -> Any:
        return tuple(kind.read(part) for part in text.split(separator)) if separator else kind.parse(text)

    metavar = f"{kind.metavar},{kind.metavar}" if separator else kind.metavar
    return Kind(parse, check or check_each, metavar, repeated=separator is None)


def _check_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > _MAX_CHARACTERS:
        raise ValueError(f"must be a string of 1 to {_MAX_CHARACTERS} characters")
    return value


def _check_model(value: Any) -> str:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("must be a Hub id or a path; save a model that is in memory first, with its tokenizer")
    return _check_text(os.fspath(value))


def _check_path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("must be a path")
    path = Path(_check_text(os.fspath(value)))
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("starts with ~ and the name of a user who does not exist; write it in full") from None


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def _parse_drop(text: str) -> float | int:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _check_drop(value: Any) -> float | int:
    number = as_integer(value)
    if number is not None and 0 < number <= MAX_LAYERS:
        return number
    if isinstance(value, float) and 0 < value < 1:
        return value
    raise ValueError("must be a fraction between 0 and 1, or a whole number of layers")


def _check_layers(value: Any) -> list[int]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError("must be a list of layer indices such as [6, 7]")
    numbers = [as_integer(i) for i in value]
    if any(i is None or not 0 <= i < MAX_LAYERS for i in numbers):
        raise ValueError(f"must be a list of layer indices, whole numbers from 0 to {MAX_LAYERS - 1}")
    return sorted(i for i in numbers if i is not None)


def _check_tune_layers(value: Any) -> int | str | list[int]:
    try:
        if value == "cut":
            return "cut"
        number = as_integer(value)
        if number is None and isinstance(value, str):
            return int(value) if value.isdecimal() else parse_layers(value)
        return _check_layers(value) if number is None else integer(0, MAX_LAYERS).check(number)
    except ValueError:
        raise ValueError("must be a number of last layers, 'cut', or a list of base indices") from None


def as_integer(value: Any) -> int | None:
    """A whole number of any type, such as numpy's; `None` for anything else, `True` and `3.0` included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


TEXT = Kind(str, _check_text)
MODEL = Kind(str, _check_model)
PATH = Kind(Path, _check_path, "PATH")
FLAG = Kind(bool, _check_flag)
DROP = Kind(_parse_drop, _check_drop, "D")
LAYERS = Kind(parse_layers, _check_layers, "L")
TUNE_LAYERS = Kind(str, _check_tune_layers, "T")


def check_value(name: str, value: Any, kind: Kind) -> Any:
    """Validate and normalise the value of an option.

    Raises:
        CutError: It is not of that kind.
    """
    try:
        return kind.check(value)
    except CutError:  # its message already names the option
        raise
    except ValueError as error:
        raise CutError(f"{name}={quoted(value)} {error}") from None


def quoted(value: Any) -> str:
    """A value as an error quotes it, always short."""
    value = os.fspath(value) if isinstance(value, os.PathLike) else value.value if isinstance(value, Enum) else value
    try:
        text = repr(value[:50] if isinstance(value, str | list | tuple) else value)
    except ValueError:  # an integer of thousands of digits
        return f"{type(value).__name__} of enormous size"
    return text if len(text) <= 80 else f"{text[:80]}..."
