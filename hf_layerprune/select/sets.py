"""From scores to a set of layers: how many to drop, which may be dropped, and whether they must be contiguous."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction

from ..errors import CutError
from ..layer_ranges import describe_layers
from ..options import DROP, check_value, pluralize


def drop_count(drop: float | int | None, num_layers: int) -> int:
    """Turn a `drop` setting into a number of layers, at least 1 and less than all.

    A fraction is floored to whole layers as in arXiv:2411.15558 (0.25 is 8 of 32, 6 of 26, 7 of 30).

    Raises:
        CutError: The setting is out of range, or would drop no layer or all of them.
    """
    drop = check_value("drop", drop, DROP)
    if num_layers == 1:
        raise CutError("the model has only one layer, which must stay")
    if isinstance(drop, int):
        if drop >= num_layers:
            raise CutError(f"drop={drop} would drop all {num_layers} layers of the model; at least one must stay")
        return drop
    count = math.floor(Fraction(str(drop)) * num_layers)  # exact: 0.3 * 10 is 3, not 2.9999999999999996
    if count == 0:
        raise CutError(f"drop={drop} of {num_layers} layers is less than one layer; to drop one, use drop=1")
    return count


def check_lengths(lengths: Collection[int], num_layers: int) -> None:
    """Check the lengths of blocks to score.

    Raises:
        CutError: One is 0, or leaves no layer.
    """
    for length in lengths:
        if not 0 < length < num_layers:
            raise CutError(
                f"can't score blocks of {pluralize(length, 'layer')}; use lengths=... from 1 to {num_layers - 1}"
            )


def free_layers(
    num_layers: int, count: int, protect_first: int, protect_last: int, protected: Collection[int] = ()
) -> set[int]:
    """The layers that may be dropped, `count` or more of them; `protected` are those that the architecture needs.

    Raises:
        CutError: Fewer than `count` layers may be dropped.
    """
    free = {i for i in range(protect_first, num_layers - protect_last) if i not in protected}
    if count > len(free):
        needed = f", and the architecture needs {describe_layers(sorted(protected))}" if protected else ""
        raise CutError(
            f"can't drop {count} of {num_layers} layers: only {len(free)} may be dropped "
            f"(protect_first={protect_first}, protect_last={protect_last}{needed}); drop fewer layers, or protect fewer"
        )
    return free


def consecutive_blocks(layers: Sequence[int], length: int) -> list[tuple[int, ...]]:
    """Every block of `length` consecutive entries of `layers`."""
    return [tuple(layers[start : start + length]) for start in range(len(layers) - length + 1)]


def lowest_layers(scores: Sequence[float | None], count: int, free: Collection[int]) -> list[int]:
    """The layers with the lowest scores, ascending; on a tie, the first. Layers without a score stay.

    Raises:
        CutError: Too few of the layers that may be dropped have a score.
    """
    ranked = sorted((score, i) for i, score in enumerate(scores) if score is not None and i in free)
    if len(ranked) < count:
        raise CutError(
            f"can't drop {pluralize(count, 'layer')}: only {len(ranked)} of the layers that may be dropped have a score; drop fewer"
        )
    return sorted(i for _, i in ranked[:count])


def lowest_block(scores: Mapping[tuple[int, ...], float], count: int, free: Collection[int]) -> list[int]:
    """The block of `count` layers with the lowest score; on a tie, the first.

    Raises:
        CutError: No block of that length may be dropped.
    """
    ranked = sorted(
        (score, block) for block, score in scores.items() if len(block) == count and all(i in free for i in block)
    )
    if not ranked:
        raise CutError(
            f"no block of {pluralize(count, 'layer')} may be dropped; drop fewer layers, or protect fewer (those that may be "
            f"dropped are {sorted(free)})"
        )
    return list(ranked[0][1])


def block_sums(scores: Sequence[float | None], layers: Sequence[int], count: int) -> dict[tuple[int, ...], float]:
    """Scores of blocks as sums of their layers' scores, for criteria that score single layers."""
    sums = {}
    for block in consecutive_blocks(layers, count):
        known = [score for i in block if (score := scores[i]) is not None]
        if len(known) == len(block):
            sums[block] = sum(known)
    return sums


def split_rounds(count: int, steps: int) -> list[int]:
    """How many layers to drop in each round: as even as possible, larger rounds first."""
    steps = min(steps, count)
    return [count // steps + (i < count % steps) for i in range(steps)]
