"""Reverse order: the deeper a layer, the less it matters (arXiv:2411.15558, section 3)."""

from __future__ import annotations


def order(num_layers: int, count: int, seed: int, variant: str = "original") -> list[int]:
    """All layers, last first."""
    return list(range(num_layers - 1, -1, -1))
