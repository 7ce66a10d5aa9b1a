"""Quantities as people write them, and that only one of them says how many layers go."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from hf_layerprune import CutError, LayerDropConfig
from hf_layerprune.options import AMOUNTS, BUDGETS, CutOptions, format_bytes, format_count
from hf_layerprune.options.quantities import BYTES, COUNT

COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1} | {
    f"{letter}iB": 1024**power for power, letter in enumerate("KMGT", 1)
}
A_VALUE = {
    "drop": 2, "target_params": "6.3B", "target_size": "12GB", "target_memory": "8GiB", "target_speedup": 1.3,
    "max_perplexity_ratio": 1.1, "max_kl": 0.2, "min_top1_agreement": 0.8,
}  # fmt: skip
decimals = st.decimals("0.001", 99999, places=3, allow_nan=False, allow_infinity=False)


@given(decimals, st.sampled_from(sorted(SIZES)), st.sampled_from(["", " "]), st.booleans())
def test_bytes_are_exact(number, unit: str, space: str, small: bool) -> None:
    text = f"{number}{space}{unit.lower() if small else unit}"
    wanted = math.floor(Fraction(str(number)) * SIZES[unit])
    if wanted < 1:
        with pytest.raises(ValueError, match="must be"):
            BYTES.check(text)
    else:
        assert BYTES.check(text) == BYTES.check(wanted) == wanted


@given(decimals, st.sampled_from(sorted(COUNTS)))
def test_counts_are_exact(number, unit: str) -> None:
    wanted = math.floor(Fraction(str(number)) * COUNTS[unit])
    if wanted:
        assert COUNT.check(f"{number}{unit}") == wanted


@given(st.integers(1, 10**15))
def test_what_is_spelled_reads_back_as_almost_the_same(value: int) -> None:
    assert BYTES.check(format_bytes(value)) == pytest.approx(value, rel=6e-4, abs=1)
    assert COUNT.check(format_count(value)) == pytest.approx(value, rel=6e-4, abs=1)


def test_a_number_just_below_a_unit_is_rounded_to_it() -> None:
    assert [format_count(count) for count in (999_940, 999_950, 10**6)] == ["999.9 k", "1 M", "1 M"]
    assert [format_bytes(size) for size in (999, 999_999_999)] == ["999 B", "1 GB"]


@given(st.text(max_size=12))
def test_anything_else_is_refused_in_plain_words(text: str) -> None:
    for kind in (BYTES, COUNT):
        try:
            assert 1 <= kind.check(text) <= 10**18
        except ValueError as error:
            assert str(error).startswith("must be a number of")  # noqa: PT017 (a kind raises nothing else)


@pytest.mark.parametrize("word", ["8 GBB", "8G", "-8GB", "8e9", "GB", "", "0", "0.0001B", "1e400", "٨GB", "8GB 9GB"])
def test_malformed_sizes(word: str) -> None:
    with pytest.raises(CutError, match=r"target_size=.* must be a number of bytes such as 12GB"):
        CutOptions(target_size=word)


@pytest.mark.parametrize("name", sorted(A_VALUE))
def test_each_alone_and_none_with_another(name: str) -> None:
    config = LayerDropConfig(**{name: A_VALUE[name]})
    assert [one for one in AMOUNTS if getattr(config, one) is not None] == [name]
    assert config.criterion == ("auto" if name in BUDGETS else "reverse_order")
    for other in sorted(A_VALUE.keys() - {name}):
        with pytest.raises(CutError, match=rf"({name}=\S+ and {other}=|{other}=\S+ and {name}=)\S+ each say how many"):
            LayerDropConfig(**{name: A_VALUE[name], other: A_VALUE[other]})


def test_a_quarter_where_nothing_is_said() -> None:
    assert LayerDropConfig().drop == 0.25
    assert LayerDropConfig(max_kl=0.1, criterion="kl").criterion == "kl"
    for name, value in (("target_speedup", 1), ("max_kl", 0), ("max_perplexity_ratio", 0.9), ("min_top1_agreement", 1), ("max_kl", math.nan), ("context", 0)):  # fmt: skip
        with pytest.raises(CutError, match=f"{name}=.* must be"):
            CutOptions(**{name: value})
