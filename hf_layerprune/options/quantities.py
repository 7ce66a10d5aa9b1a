"""Quantities as people write them: `6.3B` parameters, `12GB` or `8GiB`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from .kinds import Kind, as_integer

_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
_MAX = 10**18
_QUANTITY = re.compile(r"(\d{1,20}(?:\.\d{1,20})?) ?([A-Za-z]*)", re.ASCII)


def _parse(text: str, units: Mapping[str, int]) -> int | None:
    match = _QUANTITY.fullmatch(text.strip())
    unit = units.get(match[2].upper()) if match else None
    return math.floor(Fraction(match[1]) * unit) if match and unit else None


def _kind(units: Mapping[str, int], wanted: str, metavar: str) -> Kind:
    def check(value: Any) -> int:
        number = _parse(value, units) if isinstance(value, str) else as_integer(value)
        if number is None or not 1 <= number <= _MAX:
            raise ValueError(f"must be {wanted}")
        return number

    return Kind(str, check, metavar)


COUNT = _kind(_COUNTS, "a number of parameters such as 6.3B or 135M", "P")
BYTES = _kind(_BYTES | {"": 1}, "a number of bytes such as 12GB (12 * 1000^3) or 8GiB (8 * 1024^3)", "BYTES")


def number_between(minimum: float, maximum: float, wanted: str, metavar: str) -> Kind:
    """A number between two bounds, both exclusive."""

    def check(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not minimum < value < maximum:
            raise ValueError(f"must be {wanted}")
        return float(value)

    return Kind(float, check, metavar)


RATIO = number_between(1, 1000, "a ratio above 1, such as 1.1", "R")
NATS = number_between(0, 1000, "a number of nats above 0, such as 0.2", "NATS")
SHARE = number_between(0, 1, "a share between 0 and 1, such as 0.8", "SHARE")


def format_count(count: float) -> str:
    """Format a number of parameters: `6.3 B`."""
    return _format_with_unit(count, {" T": 10**12, " B": 10**9, " M": 10**6, " k": 10**3})


def format_bytes(size: float) -> str:
    """Format a number of bytes: `12.6 GB`."""
    return _format_with_unit(size, {" TB": 10**12, " GB": 10**9, " MB": 10**6, " kB": 10**3}, " B")


def format_percent(share: float, digits: int = 0) -> str:
    """Format a share: `25 %`."""
    return f"{100 * share:.{digits}f} %"


def pluralize(count: int, noun: str) -> str:
    """A count and its noun, in the plural if needed: `1 layer`, `1,024 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def join_words(words: Sequence[str]) -> str:
    """Words as a sentence lists them: `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _format_with_unit(value: float, units: Mapping[str, int], plain: str = "") -> str:
    rounded = abs(float(f"{value:.4g}"))  # 999,999 is 1 M, not 1000 k
    for unit, size in units.items():
        if rounded >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.0f}{plain}"
