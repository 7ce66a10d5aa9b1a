"""Differences between a model and its base over the same questions or the same windows of a text.

Two models that answer the same questions make many of the same mistakes, so the difference of their scores has a much
smaller error than either score. Every difference here is paired, with its standard error and a significance test: the
exact McNemar test for right and wrong answers, the paired t test for everything else.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import LayerPruneError

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
    mean, base = sum(ours) / len(ours), sum(theirs) / len(theirs)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    difference, stderr = math.fsum(differences) / len(differences), _stderr(differences)
    p_value: float | None
    if set(ours) | set(theirs) <= {0, 1}:
        p_value, test = mcnemar(differences.count(1), differences.count(-1)), "mcnemar_exact"
    else:
        p_value, test = paired_t(ours, theirs), "paired_t"
    kept, error = None, _stderr(theirs)
    if chance is not None and error is not None and base - chance > _MARGIN * error:
        kept = (mean - chance) / (base - chance)
    share = mean / base if base else None
    return PairedDifference(difference, stderr, share, kept, test if p_value is not None else None, p_value, len(ours))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact McNemar test.

    Args:
        gained (`int`): Number of questions that only the model answers correctly.
        lost (`int`): Number of questions that only the base answers correctly.

    Returns:
        `float`: The p-value of a sign test on the questions where the two differ; 1 if they never differ.
    """
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue) if gained + lost else 1.0


def paired_t(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Two-sided paired t test.

    Returns:
        `float`, *optional*: The p-value of the mean difference; `None` for fewer than two pairs, or if a number is not
            finite.
    """
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    stderr = _stderr(differences)
    if stderr is None or not math.isfinite(stderr):
        return None
    if stderr == 0:  # scipy returns nan if all differences are the same
        return float(not any(differences))
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0).pvalue)


def require_statistics() -> None:
    """Check, before anything is measured, that models can be compared.

    Raises:
        LayerPruneError: scipy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise LayerPruneError('comparing a model with its base needs scipy: pip install "hf-layerprune[eval]"')


def _stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean."""
    n = len(values)
    if n < 2:
        return None
    mean = math.fsum(values) / n
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
