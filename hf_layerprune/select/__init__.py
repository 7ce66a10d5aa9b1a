"""Choose which decoder layers to drop.

A criterion is a function in a file of its own that orders the layers, the first to go first. `select_layers`
turns that order into a set: how many, which of them may go, and whether they must lie side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction

from ..errors import CutError
from .random import random_order
from .reverse_order import reverse_order

# (number of layers, seed) -> base indices of all layers, the first to go first.
Criterion = Callable[[int, int], Sequence[int]]

CRITERIA: dict[str, Criterion] = {"reverse_order": reverse_order, "random": random_order}


def drop_count(drop: float | int, num_layers: int) -> int:
    """How many layers a `drop` setting means.

    Args:
        drop (`float` or `int`): A fraction between 0 and 1, floored to whole layers as in arXiv:2411.15558
            (0.25 is 8 of 32, 6 of 26, 7 of 30), or a count.
        num_layers (`int`): How many layers the model has.

    Returns:
        `int`: At least 1, and less than `num_layers`.

    Raises:
        CutError: The setting is out of range, or means no layer or all of them.
    """
    if isinstance(drop, bool) or not isinstance(drop, int | float) or not math.isfinite(drop) or drop <= 0:
        raise CutError(f"drop={drop!r} must be a fraction between 0 and 1, or a number of layers")
    if isinstance(drop, int):
        if drop >= num_layers:
            raise CutError(f"drop={drop} would drop all {num_layers} layers of the model; at least one must stay")
        return drop
    if drop >= 1:
        raise CutError(f"drop={drop} must be a fraction below 1, or a whole number of layers such as drop={int(drop)}")
    count = math.floor(Fraction(str(drop)) * num_layers)  # exact: 0.3 * 10 is 3, not 2.9999999999999996
    if count == 0:
        raise CutError(
            f"drop={drop} of {num_layers} layers is less than one layer; the smallest useful drop is {1 / num_layers:.3g}"
        )
    return count


def select_layers(
    num_layers: int,
    *,
    drop: float | int = 0.25,
    criterion: str = "reverse_order",
    protect_first: int = 0,
    protect_last: int = 0,
    contiguous: bool = False,
    seed: int = 42,
    protected: Collection[int] = (),
) -> list[int]:
    """Choose the layers to drop.

    Args:
        num_layers (`int`): How many decoder layers the model has.
        drop (`float` or `int`, defaults to 0.25): See `drop_count`.
        criterion (`str`, defaults to `"reverse_order"`): A key of `CRITERIA`.
        protect_first (`int`, defaults to 0): Layers at the start that must stay.
        protect_last (`int`, defaults to 0): Layers at the end that must stay.
        contiguous (`bool`, defaults to `False`): Drop one block of neighbouring layers: of all such blocks the one
            that goes first by the sum of its layers' ranks.
        seed (`int`, defaults to 42): For criteria that draw.
        protected (`Collection[int]`): Further layers that must stay, as the architecture demands.

    Returns:
        `list[int]`: Base indices, ascending.

    Raises:
        CutError: A setting is out of range, or more layers would go than may.
    """
    count = drop_count(drop, num_layers)
    if criterion not in CRITERIA:
        raise CutError(f"criterion {criterion!r} is unknown; choose one of {', '.join(sorted(CRITERIA))}")
    for name, value in (("protect_first", protect_first), ("protect_last", protect_last)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise CutError(f"{name}={value!r} must be a number of layers, 0 or more")
    free = {i for i in range(protect_first, num_layers - protect_last) if i not in protected}
    if count > len(free):
        raise CutError(
            f"{count} of {num_layers} layers should go, but only {len(free)} may "
            f"(protect_first={protect_first}, protect_last={protect_last}, by architecture {sorted(protected)})"
        )
    order = list(CRITERIA[criterion](num_layers, seed))
    if not contiguous:
        return sorted([i for i in order if i in free][:count])
    rank = {layer: position for position, layer in enumerate(order)}
    blocks = [range(start, start + count) for start in range(num_layers - count + 1)]
    blocks = [block for block in blocks if all(i in free for i in block)]
    if not blocks:
        raise CutError(f"no {count} neighbouring layers may all go; the layers that may are {sorted(free)}")
    return list(min(blocks, key=lambda block: sum(rank[i] for i in block)))
