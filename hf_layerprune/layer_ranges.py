"""Layers in names and in text: what lists of them are called, and sets of them as people write them, such as `20-26,29`."""

from __future__ import annotations

import re
from collections.abc import Collection

from .errors import CutError

# Names of lists of whole layers; lists of parts of layers (`attentions`, `ffns`) are not included.
LIST_NAMES = ("layers", "layer", "h", "blocks", "block")
# Marks stacks for modalities other than text, which may have as many layers as the decoder.
NOT_TEXT = re.compile(r"vision|visual|image|img|audio|speech|video")
MAX_LAYERS = 1_000  # far above any real model; limits what a damaged or hostile file can request
_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?", re.ASCII)


def parse_layers(text: str) -> list[int]:
    """Parse a set of layers, such as `20-26,29`: indices and inclusive ranges. The result is in ascending order.

    Raises:
        CutError: The text is malformed, or a range runs backwards.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise CutError(f"{part.strip()!r} is neither a layer nor a range; write layers as 20-26,29")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise CutError(f"the range {part.strip()} runs backwards; write {last}-{first}")
        layers.extend(range(first, last + 1))
    return sorted(layers)


def find_blocks(layers: Collection[int]) -> list[tuple[int, int]]:
    """Group layers into blocks of adjacent ones: for each, its first layer and the index after its last."""
    found: list[tuple[int, int]] = []
    for i in sorted(layers):
        first = found.pop()[0] if found and found[-1][1] == i else i
        found.append((first, i + 1))
    return found


def format_layers(layers: Collection[int]) -> str:
    """Format a set of layers as ranges: `[20, 21, 22, 29]` becomes `20-22,29`."""
    return ",".join(f"{first}-{end - 1}" if end - first > 1 else str(first) for first, end in find_blocks(layers))


def describe_layers(layers: Collection[int]) -> str:
    """Layers in a sentence: `layer 4`, `layers 20-22,29`."""
    return f"layer{'s' if len(layers) > 1 else ''} {format_layers(layers)}"
