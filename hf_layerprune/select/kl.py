"""KL: the divergence KL(dense || cut) of the next-token distribution without a layer or a block.

Unlike perplexity, it is meaningful on any text, including text that the model wrote itself, and it detects changes
that don't affect the probability of the text's own next tokens.
"""

from __future__ import annotations

from .trials import Outcome


def score(outcome: Outcome) -> float:
    """Mean over all positions, in nats."""
    return outcome.kl
