"""Cards with two authors: the text between our marks is generated, everything else is kept as it is.

    <!-- hf-layerprune:begin results 5d41402abc -->
    ...
    <!-- hf-layerprune:end results -->

A begin mark holds a hash of the generated text. If somebody edited that text, the hash no longer matches, and nothing
is overwritten without `--force`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import CheckpointError

# Only on a line of its own; the same words inside a line are not a mark.
_MARK = re.compile(r"(?m)^<!-- hf-layerprune:(begin|end) ([a-z-]{1,30})(?: ([0-9a-f]{10}))? -->[ \t]*\r?$")


@dataclass(frozen=True)
class Part:
    """A part of a card: its text without marks, and for a region of ours, its name and the hash in its begin mark."""

    text: str
    region: str | None = None
    digest: str | None = None

    @property
    def edited(self) -> bool:
        """Whether our region was changed after it was written."""
        return self.region is not None and self.digest != _digest(self.text)


def add_markers(region: str, text: str) -> str:
    """Put our marks around a text."""
    text = text.strip("\n")
    return f"<!-- hf-layerprune:begin {region} {_digest(text)} -->\n{text}\n<!-- hf-layerprune:end {region} -->"


def parse(card: str, where: str = "the card", *, strict: bool = True) -> list[Part]:
    """Split a card's body at its marks; leaves out empty text between our regions.

    Unless `strict`, an unmatched mark is dropped, and the text next to it counts as somebody else's. `where` names the
    card in errors.

    Raises:
        CheckpointError: A mark is unmatched, or a region occurs twice.
    """
    parts: list[Part] = []
    position, opened = 0, None
    for mark in [*_MARK.finditer(card), None]:
        kind, name = (mark[1], mark[2]) if mark else ("", "")
        text = card[position : mark.start() if mark else None]
        if opened and kind == "end" and opened[2] == name and all(part.region != name for part in parts):
            parts.append(Part(text.strip("\n"), name, opened[3]))
            opened = None
        else:
            stray = opened or (mark if kind == "end" else None)
            if stray and strict:
                raise CheckpointError(
                    f"{where} has an unmatched or repeated mark of hf-layerprune ({stray[0]}); correct it, or use "
                    "--force, which drops the mark and keeps the text next to it"
                )
            parts += [Part(text)] if text.strip() else []
            opened = mark if kind == "begin" else None
        position = mark.end() if mark else len(card)
    return parts


def foreign_texts(parts: Iterable[Part]) -> list[str]:
    """The parts that others have written."""
    return [part.text.strip() for part in parts if part.region is None]


def merge(new: list[Part], old: list[Part]) -> str:
    """Combine the regions of a new card with the text that others wrote, each text in its old place.

    Text that follows one of our regions in the old card still follows it; if that region no longer exists, it follows
    the one before.
    """
    regions = {part.region: part for part in new if part.region is not None}
    after: dict[str | None, list[str]] = {}
    anchor: str | None = None
    for part in old:
        if part.region is None:
            after.setdefault(anchor, []).append(part.text.strip("\n"))
        elif part.region in regions:
            anchor = part.region
    if not any(part.region for part in old):  # a card without our regions: its text comes last
        after = {next(reversed(regions), None): after.get(None, [])}
    pieces = list(after.get(None, ()))
    for name, part in regions.items():
        pieces.append(add_markers(name, part.text))
        pieces += after.get(name, ())
    return "\n\n".join(pieces) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip("\n").encode()).hexdigest()[:10]
