"""Perplexity of the model without a layer or a block (Shortened LLaMA, arXiv:2402.02834, section 3).

The code of arXiv:2411.15558 computes the same, on the text it also reports results on: the test split of WikiText-2 in
rows of 128 tokens. With one layer per step, this is the greedy removal of SLEB (arXiv:2402.09025).
"""

from __future__ import annotations

from .trials import Outcome


def score(outcome: Outcome) -> float:
    """The exponential of the mean loss per token."""
    return outcome.perplexity
