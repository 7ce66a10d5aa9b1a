"""Random order: the baseline that every criterion must beat (arXiv:2411.15558, section 3)."""

from __future__ import annotations

from random import Random


def random_order(num_layers: int, seed: int) -> list[int]:
    """All layers in an order drawn once from the seed."""
    return Random(seed).sample(range(num_layers), num_layers)
