"""Sets of layers as people write them: `20-26,29`."""

from __future__ import annotations

import re
from collections.abc import Collection

from .errors import CutError

_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


def parse_layers(text: str) -> list[int]:
    """Read a set of layers.

    Args:
        text (`str`): Indices and inclusive ranges, separated by commas: `20-26,29`.

    Returns:
        `list[int]`: The indices, ascending.

    Raises:
        CutError: The text is not of that form, a range runs backwards, or a layer is named twice.
    """
    found: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise CutError(f"{part.strip()!r} in {text!r} is no layer and no range; write layers as 20-26,29")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise CutError(f"the range {part.strip()} in {text!r} runs backwards; write {last}-{first}")
        found.extend(range(first, last + 1))
    twice = sorted({i for i in found if found.count(i) > 1}) if len(set(found)) != len(found) else []
    if twice:
        raise CutError(f"{text!r} names layer {twice[0]} more than once; name each layer once")
    return sorted(found)


def format_layers(layers: Collection[int]) -> str:
    """Write a set of layers the short way: `[20, 21, 22, 29]` is `20-22,29`."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
