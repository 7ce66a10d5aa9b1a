"""Reverse order: the deeper a layer, the less it matters (arXiv:2411.15558, section 3)."""

from __future__ import annotations


def reverse_order(num_layers: int, seed: int) -> list[int]:
    """All layers from the last to the first."""
    return list(range(num_layers - 1, -1, -1))
