"""The scores of a criterion, one per layer or block, and the choice that is made by them."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from ..errors import CheckpointError
from ..layer_ranges import describe_layers, find_blocks, format_layers
from .registry import CRITERIA
from .sets import block_sums, lowest_block, lowest_layers

if TYPE_CHECKING:
    from ..repair.fit import Repair
    from ..runtime.walk import LayerWalk

logger = logging.getLogger(__name__)

# The types that hold what overflows float16, for messages.
WIDER_DTYPES = "bfloat16 or float32 (--dtype of rank or prune)"
NOT_COMPARABLE = f"every cut of this size that was tried overflows the model's data type; load it in {WIDER_DTYPES}"


# The cuts that a warning has named, by the model that was walked.
_WARNED: WeakKeyDictionary[LayerWalk, list[tuple[int, ...]]] = WeakKeyDictionary()


def drop_non_finite(
    walk: LayerWalk, criterion: str, cuts: Mapping[tuple[int, ...], float]
) -> dict[tuple[int, ...], float]:
    """The numbers of those cuts that have one. A warning names the others, which are not chosen.

    A search tries many cuts, so each is named once, and not at all if it contains one that was named.
    """
    found = {cut: value for cut, value in cuts.items() if math.isfinite(value)}
    named, newly_lost = _WARNED.setdefault(walk, []), list[tuple[int, ...]]()
    for cut in sorted(cuts.keys() - found, key=lambda cut: (len(cut), cut)):
        if not any(set(cut).issuperset(known) for known in named):
            named.append(cut)
            newly_lost.append(cut)
    if newly_lost:
        logger.warning(
            "cuts whose %s is not finite are not chosen: %s; without these layers, the model overflows its data type, unlike in "
            "%s", criterion, "; ".join(map(format_layers, newly_lost)), WIDER_DTYPES
        )  # fmt: skip
    return found


@dataclass
class Scores:
    """The scores of one criterion.

    Args:
        criterion (`str`): The criterion's name.
        variant (`str`): `"original"` or `"paper"`.
        alive (`tuple[int, ...]`): The layers that had not been dropped yet, as base indices.
        layers (`list[float | None]`, *optional*): Scores by base index; `None` for a layer without a score. Omitted
            for criteria that only score blocks.
        blocks (`dict[tuple[int, ...], float]`): Scores of blocks, by their layers.
    """

    criterion: str
    variant: str
    alive: tuple[int, ...]
    layers: list[float | None] | None = None
    blocks: dict[tuple[int, ...], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse scores that are not finite."""
        of_layers = (((i,), score) for i, score in enumerate(self.layers or ()))
        for block, score in (*of_layers, *self.blocks.items()):
            if score is not None and not math.isfinite(score):
                raise CheckpointError(
                    f"{self.criterion} gives {describe_layers(block)} the score {score}: weights outside the layers are damaged, or "
                    f"the model overflows its data type; use an intact copy, or {WIDER_DTYPES}"
                )

    @classmethod
    def from_order(cls, criterion: str, variant: str, order: Sequence[int], num_layers: int) -> Scores:
        """The ranks of layers, of which the first are dropped first, as scores."""
        ranks = {layer: float(rank) for rank, layer in enumerate(order)}
        return cls(criterion, variant, tuple(sorted(order)), layers=[ranks.get(i) for i in range(num_layers)])

    def pick(self, count: int, free: Collection[int], contiguous: bool = False) -> list[int]:
        """The `count` free layers to drop; always contiguous for criteria that only score blocks."""
        if self.layers is not None and not contiguous:
            return lowest_layers(self.layers, count, free)
        scored = {block: score for block, score in self.blocks.items() if len(block) == count}
        if not scored and self.layers is not None:
            scored = block_sums(self.layers, self.alive, count)
        return lowest_block(scored, count, free)

    def record(self) -> dict[str, Any]:
        """The scores as a JSON object."""
        record: dict[str, Any] = {"variant": self.variant, "unit": CRITERIA[self.criterion].unit}
        if self.layers is not None:
            record["layers"] = self.layers
        if self.blocks:
            record["blocks"] = [
                {"start": block[0], "length": len(block), "score": score}
                | ({} if len(find_blocks(block)) == 1 else {"layers": list(block)})
                for block, score in sorted(self.blocks.items(), key=lambda item: (len(item[0]), item[0]))
            ]
        return record


@dataclass
class Choice:
    """Which layers to drop, and why.

    There is one entry of `scores` per round and criterion that the choice is based on. `details` are further entries
    for the record, such as the short list of `auto`. `repair` is the repair that the choice was judged with, where the
    cut has to get this very one.
    """

    drop_layers: list[int]
    criterion: str
    why: str
    scores: list[Scores] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    repair: Repair | None = None

    def record(self) -> dict[str, Any]:
        """The entry for `lineage.json`."""
        record = {"criterion": self.criterion, "why": self.why} | self.details
        if len(self.scores) == 1 and self.scores[0].layers is not None:  # chosen in one round, by these scores
            record["scores"] = self.scores[0].record()
        return record
