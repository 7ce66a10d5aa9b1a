"""Divergence from the dense model without a layer, or without a block: KL(dense || cut) of the next token.

Unlike perplexity it needs no text that people wrote to be meaningful, and sees changes that the right answers of a text
don't show.
"""

from __future__ import annotations

from .trials import Outcome


def score(outcome: Outcome) -> float:
    """Mean over all positions, in nats."""
    return outcome.kl
