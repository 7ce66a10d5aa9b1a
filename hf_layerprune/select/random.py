"""Random order: the baseline that every criterion must beat (arXiv:2411.15558, section 3)."""

from __future__ import annotations

from random import Random

from .registry import ORIGINAL


def order(num_layers: int, count: int, seed: int, variant: str = ORIGINAL) -> list[int]:
    """All layers, in the order in which to drop them.

    Original: a random order, so a smaller cut is a subset of a larger one. Paper: the layers that stay are drawn, as
    in the paper's code; seed 42 reproduces its layers.
    """
    if variant == ORIGINAL:
        return Random(seed).sample(range(num_layers), num_layers)
    kept = set(Random(seed).sample(range(num_layers), num_layers - count))
    return [i for i in range(num_layers) if i not in kept] + sorted(kept)
