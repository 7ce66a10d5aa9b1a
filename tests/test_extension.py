"""A new criterion, repair, tuning method and metric: one object each in its registry, and they are there everywhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from hf_layerprune.cli import main
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.heal.methods import METHODS, Tuning, parse_method
from hf_layerprune.publish.card.render import Card
from hf_layerprune.records.figures.metric_names import METRICS, Metric
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.repair.fit import Fitter
from hf_layerprune.repair.registry import REPAIRS, RepairMethod
from hf_layerprune.select.passes import Observer
from hf_layerprune.select.registry import CRITERIA, KINDS, Criterion
from hf_layerprune.select.scores import Scores

from .options_page import page
from .publish_records import lineage_of, metrics_of
from .tiny_models import tiny_model

FEW = ["--calibration-samples", "8", "--calibration-length", "16"]


class Spread(Observer):
    """The layers whose weights vary least go first."""

    def __init__(self, num_layers: int) -> None:
        self.layers: list[float | None] = [None] * num_layers

    def on_layer_weights(self, index: int, layer: nn.Module) -> None:
        self.layers[index] = sum(p.float().var().item() for p in layer.parameters() if p.dim() > 1)

    def scores(self) -> Scores:
        alive = tuple(i for i, score in enumerate(self.layers) if score is not None)
        return Scores("spread", "original", alive, layers=self.layers)


class Doubling(Fitter):
    """Doubles the norm in front of a cut: no good repair, but one that shows."""

    def before_layer(self, i: int, run: Any, batches: Any, probe: Any) -> None:
        if i + 1 in self.first_of:
            name = "post_attention_layernorm.weight"
            self.tensors[i, name] = self.walk.layers[i].get_parameter(name).detach() * 2

    def after_block(self, first: int, end: int, batches: Any) -> None:
        self.records.append({"layers": [first, end - 1]})


@pytest.fixture
def extended(monkeypatch: pytest.MonkeyPatch) -> None:
    for room, name, what, value in (
        ("select", "spread", "observer", lambda criterion, variant, num_layers, lengths: Spread(num_layers)),
        ("repair", "doubling", "fitter", lambda walk, cuts, name: Doubling(walk, cuts)),
    ):
        module = ModuleType(name)
        setattr(module, what, value)
        monkeypatch.setitem(sys.modules, f"hf_layerprune.{room}.{name}", module)
    spread = Criterion("spread", "spread", "weights", "spread of the weights", "a test", "variance")
    monkeypatch.setitem(CRITERIA, "spread", spread)
    doubling = RepairMethod(
        "doubling", "doubling", "a norm, doubled", "after arXiv:2507.18212", needs_layer_before=True
    )
    monkeypatch.setitem(REPAIRS, "doubling", doubling)
    first = Tuning("first", "the first N layers", lambda width: 0.1 / width, lambda cut, n: cut.keep[:n], "N")
    monkeypatch.setitem(METHODS, "first", first)
    monkeypatch.setitem(METRICS, "surprise", Metric("surprise per haiku"))


@pytest.mark.usefixtures("extended")
def test_help_errors_and_docs_know_them(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("prune", "rank"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said = " ".join(capsys.readouterr().out.split())
        assert "spread" in said
        assert "doubling" in said
    for words in (["--criterion", "spraed"], ["--repair", "dubbling"]):
        assert main(["prune", "base", "out", *words]) == 2
        assert f"did you mean {'spread' if 'spraed' in words else 'doubling'}?" in capsys.readouterr().err
    with pytest.raises(LayerPruneError, match="firstN"):
        parse_method("frist2")
    assert parse_method("lm_head+first2").learning_rate(100) == pytest.approx(0.001)
    text = page()
    assert "spread" in text
    assert "doubling" in text


@pytest.mark.usefixtures("extended")
def test_they_prune_and_are_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(0.1 if i in (2, 5) else 1.0)
    model.save_pretrained(tmp_path / "base")
    before = model.model.layers[1].post_attention_layernorm.weight.clone()
    words = ["prune", str(tmp_path / "base"), str(tmp_path / "out"), "--drop", "2", "--criterion", "spread", *FEW]
    assert main([*words, "--repair", "doubling", "--calibration", "self"]) == 0
    said = caplog.messages
    assert said[0].startswith("the dense model writes ")
    assert "fitting the repair doubling to the calibration rows" in said
    (entry,) = Lineage.load(tmp_path / "out").entries
    assert entry["settings"]["drop_layers"] == [2, 5]
    assert (entry["settings"]["criterion"], entry["settings"]["repair"]) == ("spread", "doubling")
    from transformers import AutoModelForCausalLM

    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(pruned.model.layers[1].post_attention_layernorm.weight, before * 2)


@pytest.mark.usefixtures("extended")
def test_the_card_shows_them() -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    prune = lineage.entries[0]
    prune["settings"] |= {"criterion": "spread", "repair": "doubling"}
    prune["repair"]["method"] = "doubling"
    lineage.entries[1]["settings"]["method"] = "first2"
    sample = next(record for record in metrics.results if record["kind"] == "text")
    metrics.add(results=[sample | {"metric": "surprise"}])
    text = Card.from_records(lineage, metrics).render()
    for name in (
        "spread",
        "doubling",
        "first2",
        "surprise per haiku",
        "The cut was repaired with a norm, doubled, and",
    ):
        assert name in text, name
    assert "{Prune\\&Comp: " in text  # the paper in the repair's `source`


def test_every_entry_defines_what_its_kind_asks_for() -> None:
    for criterion in CRITERIA.values():
        function = KINDS[criterion.kind].partition("(")[0]
        assert callable(getattr(criterion.load(), function)), criterion.name
    assert all(callable(repair.load().fitter) for repair in REPAIRS.values())
