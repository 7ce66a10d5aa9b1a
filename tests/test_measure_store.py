"""Numbers belong to weights: which are added, replaced, taken over or refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_layerprune import CheckpointError, LayerPruneError
from hf_layerprune.cli import main
from hf_layerprune.measure.subject import identify
from hf_layerprune.records.fingerprints import fingerprint, weights_hash
from hf_layerprune.records.lineage import Lineage, stage_entry
from hf_layerprune.records.metrics import Metrics

from .measure_models import measure, write_model


def test_numbers_are_added_and_replaced(cut: Path, tasks: Path) -> None:
    measure(cut, tasks, tasks=("asked",), texts=())
    first = Metrics.load(cut).results
    measure(cut, tasks, tasks=("begun",), texts=())
    assert Metrics.load(cut).results[:2] == first
    assert len(Metrics.load(cut).results) == 4
    measure(cut, tasks, tasks=("asked", "begun"), texts=())
    assert len(Metrics.load(cut).results) == 4
    measure(cut, tasks, tasks=("asked",), texts=(), limit=5)
    assert len(Metrics.load(cut).results) == 6  # fewer questions are another number


def test_numbers_of_other_weights_are_refused(cut: Path, tasks: Path) -> None:
    measure(cut, tasks, tasks=("asked",), texts=())
    before = (cut / "metrics.json").read_bytes()
    model = AutoModelForCausalLM.from_pretrained(cut)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(cut)
    with pytest.raises(CheckpointError, match=r"holds numbers of other weights .*--force.*--output"):
        measure(cut, tasks, tasks=("begun",), texts=())
    assert (cut / "metrics.json").read_bytes() == before
    found = measure(cut, tasks, tasks=("begun",), texts=(), force=True)
    assert {one["task"] for one in Metrics.load(cut).results} == {"begun"}
    assert found.weights == weights_hash(fingerprint(cut))


@pytest.mark.parametrize("content", ["nonsense", "{}", '{"schema_version": 99}'])
def test_a_damaged_file_is_replaced_if_forced(cut: Path, tasks: Path, content: str) -> None:
    (cut / "metrics.json").write_text(content)
    with pytest.raises(CheckpointError, match="restore the file, or delete it"):
        measure(cut, tasks, tasks=("begun",), texts=())
    assert (cut / "metrics.json").read_text() == content
    measure(cut, tasks, tasks=("asked", "begun"), texts=(), force=True)
    assert {one["task"] for one in Metrics.load(cut).results} == {"asked", "begun"}


def test_a_card_is_suggested_for_the_numbers_that_it_shows(
    cut: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", str(cut), "--tasks-from", str(tasks), "--tasks", "asked", "--text", "none"]
    assert main(words) == 0
    assert f"next: hf-layerprune card {cut}" in capsys.readouterr().out
    assert main([*words, "--output", str(tmp_path / "numbers.json")]) == 0
    assert "next:" not in capsys.readouterr().out
    # Two rows of one task say what tells them apart.
    assert main([*words, "--batch-size", "1"]) == 0
    out = capsys.readouterr().out
    assert "\nasked (batch size auto)  acc " in out
    assert "\nasked (batch size 1)     acc " in out
    assert main([*words, "--limit", "1"]) == 0
    assert "\nasked (first 1 question, batch size auto) " in capsys.readouterr().out


def test_a_base_that_the_history_does_not_know(base: Path, cut: Path, tasks: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    with pytest.raises(
        CheckpointError, match=r"the history of cut does not contain the weights of other .*--output FILE"
    ):
        measure(cut, tasks, base=str(other))
    found = measure(cut, tasks, base=str(other), output=tmp_path / "both.json", tasks=("asked",), texts=())
    assert len(found.comparisons) == 2
    (cut / "lineage.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no lineage\.json, so it is unknown whether it was made from base"):
        measure(cut, tasks, base=str(base))
    with pytest.raises(LayerPruneError, match="has the same weights"):
        measure(cut, tasks, base=str(cut))
    assert not (cut / "metrics.json").exists()


def test_a_model_and_its_base_the_wrong_way_round(base: Path, cut: Path, tasks: Path) -> None:
    with pytest.raises(LayerPruneError, match=r"cut was made from .*base; specify the dense model as the base"):
        measure(base, tasks, base=str(cut))
    assert not (base / "metrics.json").exists()


def test_numbers_of_earlier_stages_are_taken_over(base: Path, cut: Path, tasks: Path, tmp_path: Path) -> None:
    measure(cut, tasks, base=str(base), tasks=("asked",), texts=())
    healed = Path(shutil.copytree(cut, tmp_path / "healed"))
    (healed / "metrics.json").unlink()
    model = AutoModelForCausalLM.from_pretrained(healed)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(healed)
    with stage_entry("heal", {}) as entry:
        pass
    Lineage.load(healed).record(healed, entry)
    found = measure(healed, tasks, tasks=("asked",), texts=(), history=(cut,))
    assert sorted(one["role"] for one in found.models.values()) == ["cut", "dense", "healed"]
    assert len([one for one in found.results if one["metric"] == "acc"]) == 3
    assert {one["weights"] for one in found.comparisons} == {weights_hash(fingerprint(cut))}
    found.check_belongs(healed, Lineage.load(healed))
    stranger = write_model(tmp_path / "stranger", seed=3)
    measure(stranger, tasks, tasks=("asked",), texts=())
    with pytest.raises(CheckpointError, match=r"is not an earlier stage of healed"):
        measure(healed, tasks, tasks=("asked",), texts=(), history=(stranger,))
    with pytest.raises(CheckpointError, match=r"has no metrics\.json; measure it with"):
        measure(healed, tasks, tasks=("asked",), texts=(), history=(base,))


@pytest.mark.parametrize("words", [[], ["--dtype", "bfloat16"]])
def test_a_cut_stands_beside_its_repair(base: Path, tasks: Path, tmp_path: Path, words: list[str]) -> None:
    """Both ways to a repaired model note the weights of the plain cut, though nobody ever sees them."""
    plain, repaired = tmp_path / "plain", tmp_path / "repaired"
    cut = ["--drop-layers", "3-4", *words]
    small = ["--calibration-samples", "4", "--calibration-length", "32"]
    assert main(["prune", str(base), str(plain), *cut]) == 0
    assert main(["prune", str(base), str(repaired), *cut, "--repair", "linear", *small]) == 0
    measure(plain, tasks, base=str(base), tasks=("asked",), texts=())
    found = measure(repaired, tasks, base=str(base), tasks=("asked",), texts=(), history=(plain,))
    assert sorted(one["role"] for one in found.models.values()) == ["cut", "dense", "repaired"]
    found.check_belongs(repaired, Lineage.load(repaired))


@pytest.mark.parametrize(
    ("entry", "role"),
    [
        ({"stage": "prune"}, "cut"),
        ({"stage": "prune", "repair": {"kind": "linear"}}, "repaired"),
        ({"stage": "repair"}, "repaired"),
        ({"stage": "heal"}, "healed"),
    ],
)
def test_roles(cut: Path, entry: dict[str, Any], role: str) -> None:
    lineage = Lineage.load(cut)
    lineage.record(cut, entry)
    assert identify(cut).role == role
