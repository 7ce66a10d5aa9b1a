"""Reverse order: the deeper a layer, the less it matters (arXiv:2411.15558, section 3)."""

from __future__ import annotations

import logging

logger = logging.getLogger(__name__)

PAPER_SIZE = 5e9  # parameters; the paper's models have 6 to 9 billion


def order(num_layers: int, count: int, seed: int, variant: str = "original") -> list[int]:
    """All layers, last first."""
    return list(range(num_layers - 1, -1, -1))


def advise_small(parameters: int) -> None:
    """Say of a small model that a block in the middle is better to drop."""
    if parameters < PAPER_SIZE:
        logger.info(
            "the last layers go, as in the paper, whose models have 7B and 8B parameters; on small models, dropping a block in "
            "the middle does far better (criterion auto, contiguous)"
        )
