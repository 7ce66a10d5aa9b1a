"""Random order: the baseline that every criterion must beat (arXiv:2411.15558, section 3)."""

from __future__ import annotations

from random import Random

from .registry import ORIGINAL


def order(num_layers: int, count: int, seed: int, variant: str = ORIGINAL) -> list[int]:
    """All layers, the first to go first.

    Original: an order that the seed draws, so that a smaller cut is part of a larger one. Paper: the layers that stay
    are drawn, as its code does; seed 42 gives its layers.
    """
    if variant == ORIGINAL:
        return Random(seed).sample(range(num_layers), num_layers)
    kept = set(Random(seed).sample(range(num_layers), num_layers - count))
    return [i for i in range(num_layers) if i not in kept] + sorted(kept)
