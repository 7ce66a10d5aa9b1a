"""`model_cards/`: each card is what its records give, and the command says which one is not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_layerprune.errors import CheckpointError
from hf_layerprune.publish.card.writing import PICTURES, compose, read_card
from hf_layerprune.records.lineage import Lineage
from model_cards import __main__ as command
from model_cards import make

from .publish_records import lineage_of, metrics_of
from .tiny_models import tiny_model

KEPT = command.models()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards with one model in it."""
    folder = tmp_path / "shelf" / "SmolLM2-small"
    folder.mkdir(parents=True)
    lineage = lineage_of()
    lineage.write(folder)
    metrics_of(lineage).write(folder)
    monkeypatch.setattr(command, "HERE", folder.parent)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["model_cards", *words])
    return command.main()


def test_every_card_is_what_its_records_give() -> None:
    """`make cards` writes them anew."""
    for folder in KEPT:
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert compose(read_card(folder, weights=False), text) == text, folder.name
        drawn = {f"{name}.png" for name in read_card(folder, weights=False).pictures}
        assert {path.name for path in (folder / "assets").iterdir()} == drawn
        assert drawn <= {f"{name}.png" for name in PICTURES}


def test_the_list_names_every_card() -> None:
    text = (Path(command.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert [folder.name for folder in KEPT if f"[{folder.name}]({folder.name}/README.md)" not in text] == []


def test_drift_is_seen_and_mended(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    data = json.loads((shelf / "metrics.json").read_text())
    data["results"][-1]["value"] += 1
    (shelf / "metrics.json").write_text(json.dumps(data))
    before = (shelf / "README.md").read_text()
    assert run(monkeypatch, "--check") == 1
    assert "SmolLM2-small: differs from its records" in capsys.readouterr().out
    assert (shelf / "README.md").read_text() == before
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    assert (shelf / "README.md").read_text() != before


def test_what_is_taken_over_is_complete_and_public(shelf: Path, tmp_path: Path) -> None:
    from hf_layerprune.cli import main

    from .publish_records import measure_by_hand

    base, folder = tmp_path / "base", tmp_path / "tiny-6L"
    tiny_model("llama").save_pretrained(base)
    assert main(["prune", str(base), str(folder), "--drop", "2"]) == 0
    with pytest.raises(CheckpointError, match="names its base by a path"):
        command.take(folder)
    assert main(["card", str(folder), "--base-model", "org/base", "--name", "tiny-6L"]) == 0
    with pytest.raises(CheckpointError, match=r"has no metrics\.json; measure the model first"):
        command.take(folder)
    measure_by_hand(folder)
    taken = command.take(folder)
    assert sorted(path.name for path in taken.iterdir()) == ["lineage.json", "metrics.json"]
    assert str(tmp_path) not in (taken / "lineage.json").read_text()
    assert Lineage.of(taken).base["hub_id"] == "org/base"


def test_the_models_are_made_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage is made before what stands on it, and what is missing is found before anything is made."""
    names = [model.name for model in make.MODELS]
    for number, model in enumerate(make.MODELS):
        assert {model.of, *model.beside} - {""} <= set(names[:number])
    with pytest.raises(make.LayerPruneError, match=r"has no piqa\.jsonl, arc_easy\.jsonl"):
        make.make(tmp_path / "work", tmp_path, limit=1, rows=1)
    assert not (tmp_path / "work").exists()
    with pytest.raises(SystemExit):
        run(monkeypatch, "--make", str(tmp_path / "work"))
    assert "--make needs --data" in capsys.readouterr().err


def test_the_command() -> None:
    """As people start it, from the root of the repository."""
    root = Path(command.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "model_cards", "--check"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(KEPT)
