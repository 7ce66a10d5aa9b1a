"""Paired comparisons, held against scipy and against their definitions."""

from __future__ import annotations

import math
import random
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from hf_layerprune.measure.paired import PairedDifference, compare_pairs, compare_values, mcnemar, paired_t
from hf_layerprune.measure.store import Store
from hf_layerprune.records.metrics import Metrics

COUNTS = st.integers(min_value=0, max_value=400)
FINITE = st.floats(-1e3, 1e3, allow_nan=False)


@given(COUNTS, COUNTS)
@settings(max_examples=100, deadline=None)
def test_mcnemar_is_twice_the_tail_of_a_fair_coin(gained: int, lost: int) -> None:
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    assert mcnemar(gained, lost) == pytest.approx(min(1.0, 2 * tail / 2**n), rel=1e-8, abs=1e-200)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=40))
@settings(max_examples=200, deadline=None)
def test_paired_t_is_scipys(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    differences = [a - b for a, b in pairs]
    if (
        max(differences) - min(differences) < 1e-9 * max(map(abs, differences), default=0)
        or len(set(differences)) == 1
    ):
        return  # scipy loses all digits there
    if max(map(abs, differences)) < 1e-100:
        return  # and squares of these are zero
    expected = stats.ttest_rel(ours, theirs)
    assert paired_t(ours, theirs) == pytest.approx(expected.pvalue, rel=1e-5, abs=1e-12)


def test_paired_t_at_its_ends() -> None:
    assert paired_t([1.0], [2.0]) is None
    assert paired_t([1.0, 2.0], [1.0, 2.0]) == 1
    assert paired_t([2.0, 3.0], [1.0, 2.0]) == 0
    assert paired_t([math.nan, 1.0], [1.0, 2.0]) is None
    assert 0 <= paired_t([100.0 + i % 2 for i in range(500)], [float(i % 2) / 2 for i in range(500)]) < 1e-300


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


def test_scores_between_right_and_wrong() -> None:
    found = compare_pairs([0.5, 0.25, 1.0], [0.75, 0.5, 0.5])
    assert found.test == "paired_t"
    assert found.p_value == pytest.approx(stats.ttest_rel([0.5, 0.25, 1.0], [0.75, 0.5, 0.5]).pvalue)


def test_windows_and_plain_values() -> None:
    ours, theirs = [4.0, 4.2, 4.5], [3.0, 3.1, 3.7]
    found = compare_pairs(ours, theirs)
    assert found.difference == pytest.approx(2.9 / 3)
    assert found.stderr == pytest.approx(stats.sem([1.0, 1.1, 0.8]))
    assert found.p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue)
    assert compare_values(30.0, 20.0) == PairedDifference(10.0, share=1.5)
    assert compare_values(1.0, 0.0).share is None


def test_only_what_is_known_and_finite_is_recorded() -> None:
    store = Store(Metrics("a" * 64), None)
    key = {"weights": "a" * 64, "base": "b" * 64, "kind": "text", "metric": "nll"}
    unknown = PairedDifference(1.0, math.inf, math.nan, None, None, None, 3)
    store.add(comparisons=[key | asdict(unknown), key | asdict(PairedDifference(math.nan))])
    (one,) = store.metrics.comparisons
    assert one == key | {"difference": 1.0, "samples": 3, "date": one["date"]}
