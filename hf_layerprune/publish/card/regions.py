"""A card with two authors: what stands between our marks is ours, everything else is theirs and stays.

    <!-- hf-layerprune:begin results 5d41402abc -->
    ...
    <!-- hf-layerprune:end results -->

A begin mark holds a hash of what we wrote. Where somebody wrote inside, the hash tells, and nothing is overwritten
without their word.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import CheckpointError

# On a line of its own: within a line, the same words are not a mark.
_MARK = re.compile(r"(?m)^<!-- hf-layerprune:(begin|end) ([a-z-]{1,30})(?: ([0-9a-f]{10}))? -->[ \t]*\r?$")


@dataclass(frozen=True)
class Part:
    """A stretch of a card.

    Args:
        text (`str`): What it says, without marks.
        region (`str`, *optional*): The name of our region, or `None` where the text is theirs.
        digest (`str`, *optional*): Of our region, the hash in its begin mark.
    """

    text: str
    region: str | None = None
    digest: str | None = None

    @property
    def edited(self) -> bool:
        """Whether our region says something else than we wrote."""
        return self.region is not None and self.digest != _digest(self.text)


def marked(region: str, text: str) -> str:
    """Put our marks around a text."""
    text = text.strip("\n")
    return f"<!-- hf-layerprune:begin {region} {_digest(text)} -->\n{text}\n<!-- hf-layerprune:end {region} -->"


def parse(card: str, where: str = "the card", *, strict: bool = True) -> list[Part]:
    """Split a card's body at its marks.

    Args:
        card (`str`): What follows the YAML block.
        where (`str`, *optional*): What to call it in errors.
        strict (`bool`, *optional*, defaults to `True`): Refuse marks that don't go together. Otherwise such a mark is
            dropped, and what stands beside it is taken for theirs.

    Returns:
        `list[Part]`: Ours and theirs, in order; their stretches that are empty are left out.

    Raises:
        CheckpointError: A mark lacks its other half, or a region stands in it twice.
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
                    f"{where} has a mark of hf-layerprune without its other half, or twice ({stray[0]}); put it right, "
                    "or use --force, which drops the mark and keeps the text beside it"
                )
            parts += [Part(text)] if text.strip() else []
            opened = mark if kind == "begin" else None
        position = mark.end() if mark else len(card)
    return parts


def theirs(parts: Iterable[Part]) -> list[str]:
    """What others have written, stretch by stretch."""
    return [part.text.strip() for part in parts if part.region is None]


def merge(new: list[Part], old: list[Part]) -> str:
    """Our newest regions, with what others have written at the place where it stood.

    Args:
        new (`list[Part]`): What we would write; only its regions count.
        old (`list[Part]`): The card that is there. What follows one of our regions in it goes on following that; where
            the region is gone, it follows the one before.

    Returns:
        `str`: The body of the card.
    """
    regions = {part.region: part for part in new if part.region is not None}
    after: dict[str | None, list[str]] = {}
    anchor: str | None = None
    for part in old:
        if part.region is None:
            after.setdefault(anchor, []).append(part.text.strip("\n"))
        elif part.region in regions:
            anchor = part.region
    if not any(part.region for part in old):  # a card that was never ours: what it says comes last
        after = {next(reversed(regions), None): after.get(None, [])}
    pieces = list(after.get(None, ()))
    for name, part in regions.items():
        pieces.append(marked(name, part.text))
        pieces += after.get(name, ())
    return "\n\n".join(pieces) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip("\n").encode()).hexdigest()[:10]
