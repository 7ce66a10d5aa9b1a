"""How measured numbers are written for people."""

from __future__ import annotations

import pytest
from hypothesis import given, strategies as st

from hf_layerprune.records.figures import numbers


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e300, max_value=1e300))
def test_numbers_stay_close(value: float) -> None:
    text = numbers.format_number(value).replace(numbers.MINUS, "-").replace(",", "")
    mantissa, _, power = text.partition(f" {numbers.TIMES} 10")
    exponent = int(power.translate(str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-"))) if power else 0
    assert float(f"{mantissa}e{exponent}") == pytest.approx(value, rel=0.06 if power else 0.006, abs=1e-300)
    assert len(text) < 16


@pytest.mark.parametrize(("made", "text"), [
    (numbers.format_number(19.9), "19.9"),
    (numbers.format_number(2.8e8), f"2.8 {numbers.TIMES} 10⁸"),
    (numbers.format_number(9.99e5), "999,000"),
    (numbers.format_number(9.996), "10.0"),
    (numbers.format_number(999.9), "1,000"),
    (numbers.format_count(134_515_008), "134.5 M"),
    (numbers.format_count(8.03e9), "8.03 B"),
    (numbers.format_count(999_999), "1.00 M"),
    (numbers.format_size(269_060_552), "269.1 MB"),
    (numbers.format_duration(0.2887), "289 ms"),
    (numbers.format_duration(0.9997), "1.0 s"),
    (numbers.format_duration(960), "16 min 00 s"),
    (numbers.format_duration(7_300), "2 h 01 min"),
    (numbers.format_ratio(0.816), f"{numbers.TIMES} 0.82"),
    (numbers.format_metric("acc", 0.474), "47.4"),
    (numbers.in_percent(-0.0004), "0.0"),
    (numbers.format_metric("peak_rss_bytes", 8.12e8), "812.0 MB"),
    (numbers.format_metric("time_to_first_token", 0.05), "50 ms"),
    (numbers.format_metric("decode_tokens_per_second", 31.46), "31.5"),
    (numbers.with_error("62.6", 62.6, 1.878, share=False), "62.6 ± 1.9"),
    (numbers.with_error("67.0", 0.67, 0.0333, share=True), "67.0 ± 3.3"),
])  # fmt: skip
def test_how_numbers_are_written(made: str, text: str) -> None:
    assert made == text
