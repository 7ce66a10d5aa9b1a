"""Perplexity without a layer, or without a block (Shortened LLaMA, arXiv:2402.02834, section 3).

The paper's code (arXiv:2411.15558) computes the same, on the text that it later reports: WikiText-2's test split in
rows of 128 tokens. With `steps` as many as layers go, it is the greedy removal of SLEB (arXiv:2402.09025).
"""

from __future__ import annotations

from .trials import Outcome

COMPARES = False  # with nothing: the dense model need not run


def score(outcome: Outcome) -> float:
    """The exponential of the mean loss of a token."""
    return outcome.perplexity
