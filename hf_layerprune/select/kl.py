"""Divergence from the dense model without a layer, or without a block: KL(dense || cut) of the next token.

Unlike perplexity it means something on any text, also on one that a model wrote, and sees changes that a text's own next
tokens don't show.
"""

from __future__ import annotations

from .trials import Outcome

COMPARES = True  # with the dense model


def score(outcome: Outcome) -> float:
    """Mean over all positions, in nats."""
    return outcome.divergence
