from __future__ import annotations

import math

import pytest
from hypothesis import given, strategies as st

from hf_layerprune import CutError
from hf_layerprune.layer_ranges import format_layers, parse_layers
from hf_layerprune.options import CutOptions
from hf_layerprune.select import CRITERIA, drop_count, needs_model, select_layers


@pytest.mark.parametrize(("drop", "layers", "count"), [(0.25, 32, 8), (0.25, 26, 6), (0.25, 30, 7), (0.3, 10, 3), (0.29, 100, 29), (5, 32, 5)])  # fmt: skip
def test_drop_count(drop: float | int, layers: int, count: int) -> None:
    assert drop_count(drop, layers) == count


@given(st.integers(1, 99), st.integers(2, 200))
def test_fractions_are_floored_exactly(percent: int, layers: int) -> None:
    expected = percent * layers // 100
    if expected:
        assert drop_count(percent / 100, layers) == expected
    else:
        with pytest.raises(CutError, match="less than one layer"):
            drop_count(percent / 100, layers)


@pytest.mark.parametrize("drop", [0, -1, 0.0, 1.0, 1.5, 8, 9, True, math.nan, math.inf, "0.25", None])
def test_drop_out_of_range(drop: object) -> None:
    with pytest.raises(CutError, match="drop="):
        drop_count(drop, 8)  # type: ignore[arg-type]


@pytest.mark.parametrize("drop", [0.25, 1])
def test_a_model_of_one_layer_keeps_it(drop: float | int) -> None:
    with pytest.raises(CutError, match="only one layer, which must stay"):
        drop_count(drop, 1)


@given(
    layers=st.integers(2, 60),
    data=st.data(),
    criterion=st.sampled_from(sorted(name for name in CRITERIA if not needs_model(CutOptions(criterion=name)))),
    contiguous=st.booleans(),
    seed=st.integers(0, 99),
)
def test_selection(layers: int, data: st.DataObject, criterion: str, contiguous: bool, seed: int) -> None:
    count = data.draw(st.integers(1, layers - 1))
    first = data.draw(st.integers(0, layers - count))
    last = data.draw(st.integers(0, layers - count - first))
    chosen = select_layers(
        layers,
        CutOptions(
            drop=count, criterion=criterion, protect_first=first, protect_last=last, contiguous=contiguous, seed=seed
        ),
    )
    assert len(chosen) == count == len(set(chosen))
    assert chosen == sorted(chosen)
    assert chosen[0] >= first
    assert chosen[-1] < layers - last
    if contiguous:
        assert chosen == list(range(chosen[0], chosen[0] + count))
    if criterion == "reverse_order":
        assert chosen == list(range(layers - last - count, layers - last))


def test_random_is_the_seed() -> None:
    draws = {tuple(select_layers(30, CutOptions(criterion="random", seed=seed))) for seed in (1, 1, 2, 3)}
    assert len(draws) == 3


def test_architecture_protects() -> None:
    assert select_layers(8, CutOptions(drop=2), protected=[7]) == [5, 6]
    with pytest.raises(CutError, match="no block of 3 layers"):
        select_layers(8, CutOptions(drop=3, contiguous=True), protected=[2, 5])
    with pytest.raises(CutError, match="only 2 may"):
        select_layers(8, CutOptions(drop=3, protect_first=3, protect_last=3))
    with pytest.raises(CutError, match="is unknown; there are reverse_order, random"):
        select_layers(8, CutOptions(criterion="magic"))
    with pytest.raises(CutError, match="protect_first=-1"):
        select_layers(8, CutOptions(protect_first=-1))


@given(st.sets(st.integers(0, 300), min_size=1))
def test_layer_sets_round_trip(layers: set[int]) -> None:
    assert parse_layers(format_layers(layers)) == sorted(layers)


@given(st.text(alphabet="0123456789-, x٣", max_size=12))
def test_parser_never_crashes(text: str) -> None:
    try:
        layers = parse_layers(text)
    except CutError:
        return
    assert layers


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "neither a layer"), ("3-", "neither a layer"), ("5-3", "write 3-5"), ("-1", "neither a layer"), ("1;2", "neither a layer"), ("9" * 7, "neither a layer")],
)  # fmt: skip
def test_bad_layer_sets(text: str, message: str) -> None:
    with pytest.raises(CutError, match=message):
        parse_layers(text)
