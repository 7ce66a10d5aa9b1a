"""Paired comparisons of answers, windows and values."""

from __future__ import annotations

import math
import random

import pytest
from scipy import stats

from hf_layerprune.measure.paired import PairedDifference, compare_pairs, compare_values


def test_a_paired_t_test_at_its_ends() -> None:
    assert compare_pairs([1.5], [2.0]).p_value is None
    assert compare_pairs([1.5, 2.0], [1.5, 2.0]).p_value is None
    assert compare_pairs([2.5, 3.5], [1.5, 2.5]).p_value == 0
    assert compare_pairs([math.nan, 1.5], [1.5, 2.0]).p_value is None
    assert compare_pairs([1, 0], [1, 0]).p_value == 1
    far = compare_pairs([100.0 + i % 2 for i in range(500)], [float(i % 2) / 2 for i in range(500)])
    assert 0 <= far.p_value < 1e-300


def test_answers() -> None:
    ours = [1, 1, 0, 0, 1, 0, 0, 0, 1, 0]
    theirs = [1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    found = compare_pairs(ours, theirs, chance=0.25)
    assert found.difference == pytest.approx(-0.3)
    assert found.share == pytest.approx(0.4 / 0.7)
    assert found.share_of_margin == pytest.approx(0.15 / 0.45)
    assert (found.test, found.samples) == ("mcnemar_exact", 10)
    assert found.p_value == pytest.approx(stats.binomtest(1, 5, 0.5).pvalue)
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert found.stderr == pytest.approx(stats.sem(differences))


def test_a_paired_difference_is_known_better_than_two_scores() -> None:
    """The reason for pairing: models that make the same mistakes."""
    draw = random.Random(0)
    theirs = [draw.random() < 0.6 for _ in range(1000)]
    ours = [int(right and draw.random() < 0.95) for right in theirs]
    theirs = [int(right) for right in theirs]
    found = compare_pairs(ours, theirs, 0.5)
    unpaired = math.hypot(stats.sem(ours), stats.sem(theirs))
    assert found.stderr < unpaired / 2
    assert found.p_value < 1e-6


def test_nothing_is_kept_of_a_margin_that_is_not_there() -> None:
    """A base near chance has no margin, and a share of noise says nothing."""
    guesses = [1, 0] * 20 + [1, 1]
    assert compare_pairs([1, 0] * 21, guesses, chance=0.5).share_of_margin is None
    assert compare_pairs([1, 0] * 21, guesses).share_of_margin is None
    assert compare_pairs([1, 1, 0, 0] * 25, [1, 1, 1, 0] * 25, chance=0.25).share_of_margin == pytest.approx(0.5)


def test_windows_and_plain_values() -> None:
    ours, theirs = [4.0, 4.2, 4.5], [3.0, 3.1, 3.7]
    found = compare_pairs(ours, theirs)
    assert found.difference == pytest.approx(2.9 / 3)
    assert found.stderr == pytest.approx(stats.sem([1.0, 1.1, 0.8]))
    assert found.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert compare_values(30.0, 20.0) == PairedDifference(10.0, share=1.5)
    assert compare_values(1.0, 0.0).share is None
