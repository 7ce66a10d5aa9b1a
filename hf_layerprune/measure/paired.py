"""Differences between a model and its base over the same questions or the same windows of a text.

Two models that answer the same questions make many of the same mistakes, so the difference of their scores has a much
smaller error than either score. Every difference here is paired, with its standard error and a significance test: the
exact McNemar test for right and wrong answers, the paired t test for everything else.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import LayerPruneError

Model = TypeVar("Model")

# A share of the base's margin over chance is reported only if that margin is at least this many standard errors.
_MARGIN = 2


@dataclass(frozen=True)
class PairedDifference:
    """The difference of a number from the base's.

    Args:
        difference (`float`): The value minus the base's.
        stderr (`float`, *optional*): Standard error of the paired difference.
        share (`float`, *optional*): The value divided by the base's.
        share_of_margin (`float`, *optional*): The value's margin over chance divided by the base's; `None` if the base
            is not clearly better than chance.
        test (`str`, *optional*): `"mcnemar_exact"` or `"paired_t"`.
        p_value (`float`, *optional*): The probability of a difference at least this large between equally good models.
        samples (`int`, *optional*): Number of pairs.
    """

    difference: float
    stderr: float | None = None
    share: float | None = None
    share_of_margin: float | None = None
    test: str | None = None
    p_value: float | None = None
    samples: int | None = None


def compare_values(value: float, base: float) -> PairedDifference:
    """Compare a number of the model with the base's, without a test."""
    return PairedDifference(value - base, share=value / base if base else None)


def compare_pairs(ours: Sequence[float], theirs: Sequence[float], chance: float | None = None) -> PairedDifference:
    """Compare measurements by question, by window of a text, or by run.

    Args:
        ours (`Sequence[float]`): The model's score on each question (1 for a right answer and 0 for a wrong one, or a
            value in between), its mean negative log-likelihood of each window, or its value of each run.
        theirs (`Sequence[float]`): The base's values for the same questions, windows or runs in the same order.
        chance (`float`, *optional*): For questions, the accuracy of random guessing.
    """
    from scipy.stats import binomtest, sem, ttest_rel

    mean, base = sum(ours) / len(ours), sum(theirs) / len(theirs)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    several = len(ours) > 1
    stderr = float(sem(differences)) if several else None
    test, p_value = None, None
    if set(ours) | set(theirs) <= {0, 1}:
        gained, lost = differences.count(1), differences.count(-1)
        test, p_value = "mcnemar_exact", float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
    elif stderr is not None and math.isfinite(stderr) and any(differences):
        test, p_value = "paired_t", float(ttest_rel(ours, theirs).pvalue)
    kept = None
    if chance is not None and several and base - chance > _MARGIN * sem(theirs):
        kept = (mean - chance) / (base - chance)
    share = mean / base if base else None
    return PairedDifference(math.fsum(differences) / len(ours), stderr, share, kept, test, p_value, len(ours))


def in_turns(models: Sequence[Model], rounds: int) -> Iterator[Model]:
    """Each model once a round, in alternating order, so that a slow phase of the machine affects all of them."""
    for number in range(rounds):
        yield from models if number % 2 else models[::-1]


def require_scipy() -> None:
    """Refuse, before anything is measured, to compare models without scipy."""
    if importlib.util.find_spec("scipy") is None:
        raise LayerPruneError('comparing a model with its base needs scipy: pip install "hf-layerprune[eval]"')
