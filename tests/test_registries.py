"""A criterion or a repair is one file and one entry in its registry; everything else knows of it by itself."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest

from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.cli import main
from hf_layerprune.errors import CutError
from hf_layerprune.options import CutOptions
from hf_layerprune.repair.fit import Fitter, fit_repair
from hf_layerprune.repair.registry import REPAIRS, RepairMethod
from hf_layerprune.select import choose_layers, find_criterion, score_layers
from hf_layerprune.select.registry import CRITERIA, KINDS, Criterion

from .tiny_models import LAYERS, tiny_input, tiny_model


def add(monkeypatch: pytest.MonkeyPatch, room: str, name: str, **contents: Any) -> None:
    """A file of that name in a room."""
    module = ModuleType(f"hf_layerprune.{room}.{name}")
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "select", "widest_first", order=lambda n, count, seed, variant: [3, 1, *range(4, n), 0, 2])
    criterion = Criterion("widest_first", "widest_first", "count", "the widest first", "this test", "rank")
    monkeypatch.setitem(CRITERIA, criterion.name, criterion)


@pytest.fixture
def doubling(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubling(Fitter):
        def __init__(self, walk: Any, cuts: Any, method: str) -> None:
            super().__init__(walk, cuts)

        def leave(self, first: int, end: int, batches: Any) -> None:
            weight = self.walk.layers[first - 1].get_parameter("mlp.down_proj.weight")
            self.tensors[first - 1, "mlp.down_proj.weight"] = 2 * weight
            self.records.append({"layers": [first, end - 1]})

    add(monkeypatch, "repair", "doubling", fitter=Doubling)
    monkeypatch.setitem(REPAIRS, "doubling", RepairMethod("doubling", "doubling", "twice", "this test", True))


@pytest.mark.usefixtures("by_name")
def test_a_criterion(capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("llama")
    assert choose_layers(model, None, CutOptions(drop=2, criterion="widest_first")).drop_layers == [1, 3]
    assert score_layers(model, None, ["widest_first"])["widest_first"].layers[3] == 0
    with pytest.raises(CutError, match="did you mean widest_first"):
        find_criterion("widest_frst")
    for command in ("prune", "rank"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "widest_first" in capsys.readouterr().out


@pytest.mark.usefixtures("doubling")
def test_a_repair(capsys: pytest.CaptureFixture) -> None:
    model = tiny_model("llama")
    text = CalibrationSet.of(tiny_input(batch=4), "random tokens")
    repair = fit_repair(model, [3, LAYERS - 1], text, "doubling")
    weights = {index: model.model.layers[index].mlp.down_proj.weight for index in (2, LAYERS - 2)}
    assert all((repair.tensors[index, "mlp.down_proj.weight"] == 2 * w).all() for index, w in weights.items())
    assert CutOptions(repair="doubling").repair == "doubling"
    with pytest.raises(CutError, match="did you mean doubling"):
        CutOptions(repair="dubling")
    with pytest.raises(CutError, match="keep layer 0"):
        fit_repair(model, [0], text, "doubling")
    with pytest.raises(SystemExit):
        main(["prune", "--help"])
    assert "doubling" in capsys.readouterr().out


def test_every_entry_defines_what_its_kind_asks_for() -> None:
    for criterion in CRITERIA.values():
        function = KINDS[criterion.kind].partition("(")[0]
        assert callable(getattr(criterion.load(), function)), criterion.name
    assert all(callable(repair.load().fitter) for repair in REPAIRS.values())
