"""`model_cards/`: each card is what its records give, and the command says which one is not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from hf_layerprune.cli import build_parser
from hf_layerprune.errors import CheckpointError
from hf_layerprune.options import options_from_args
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.records.fingerprints import identity_from_hashes
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.metrics import Metrics
from hf_layerprune.stages.prune import prune_settings
from hf_layerprune.stages.requests import PruneRequest
from hf_layerprune.versions import installed_version
from model_cards import __main__ as command, make

from .gguf_makers import smollm2
from .heal_makers import RECIPE, load_recipe
from .measure_models import write_gguf
from .publish_records import lineage_of, metrics_of
from .tiny_models import tiny_model

KEPT = command.models()


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of cards with one model in it."""
    folder = tmp_path / "shelf" / "SmolLM2-small"
    folder.mkdir(parents=True)
    lineage = lineage_of()
    for entry in lineage.entries:
        entry["files"] = {"config.json": "f" * 64}
    lineage.entries[0]["repair"]["input_weights"] = "b" * 64
    lineage.write(folder)
    metrics = metrics_of(lineage)
    metrics.models[metrics.weights]["identity"] = identity_from_hashes(lineage.entries[-1]["files"]).parts
    metrics.write(folder)
    monkeypatch.setattr(command, "HERE", folder.parent)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["model_cards", *words])
    return command.main()


def test_every_file_is_what_todays_code_writes() -> None:
    """`python -m model_cards --make WORK --data DATA` makes and measures them again."""
    check(command.HERE, KEPT)
    assert {folder.name for folder in KEPT} <= {model.name for model in make.MODELS}


def check(shelf: Path, folders: list[Path]) -> None:
    """Folders of cards are what today's code writes from records of what `make` makes today."""
    assert {folder.name: command.outdated(folder) for folder in folders} == {folder.name: [] for folder in folders}
    for model in (model for model in make.MODELS if shelf / model.name in folders):
        entries = Lineage.load(shelf / model.name).entries
        assert [entry["stage"] for entry in entries] == ["prune", "heal"][: 2 if model.taken == "model" else 1]
        assert entries[0]["settings"] | {"drop_layers": []} == asked(model)
        if model.same_layers:
            assert entries[0]["settings"]["drop_layers"] == make.dropped_by(shelf / model.same_layers)
        for entry in entries[1:]:
            told = yaml.safe_load((make.RECIPES / "configs" / "heal.yaml").read_text())
            told |= make.ON_WEB_TEXT if model.on_web_text else {}
            told |= {"num_train_epochs": model.epochs} if model.epochs else {}
            names = told.keys() & entry["settings"].keys() - {"method", "self_rows"}  # which `auto` and `make` choose
            assert len(names) > 3
            assert {name: entry["settings"][name] for name in names} == {name: told[name] for name in names}


def asked(model: make.Model) -> dict[str, Any]:
    """The settings that the records of a model's cut should have, but for the layers."""
    if model.taken:
        told = yaml.safe_load((make.RECIPES / "configs" / "heal.yaml").read_text())
        words = ["--criterion", told["criterion"], "--repair", told["repair"]]
        words += ["--contiguous"] if told["contiguous"] else []
        words += [word.replace("_", "-") if word.startswith("--") else word for word in model.words]
    else:
        words = ["--drop-layers", "0"] if model.same_layers else [*model.made]
    request = options_from_args(build_parser().parse_args(["prune", "base", "out", *words]), PruneRequest)
    return prune_settings(request.with_calibration(), [])


# Of the others, the cut is the same as that of one of these.
CUTS = [folder for folder in KEPT if folder.name in (make.LAST.name, make.HEALED.name, make.FEWER.name)]


# Older versions unpack another tokenizer from a GGUF file, or none.
@pytest.mark.skipif(
    installed_version("transformers") < Version("5.17"), reason="this transformers unpacks a GGUF file in another way"
)
@pytest.mark.parametrize("folder", CUTS, ids=lambda folder: folder.name)
def test_the_records_agree_with_the_base(folder: Path) -> None:
    """The cut is repeated from the base's file; there are no weights that could be proven."""
    agrees(folder, smollm2())


def agrees(folder: Path, base: Path) -> None:
    found = verify(VerifyRequest(str(folder), base=str(base)))
    assert found.consistent, found.lines
    assert not found.good
    assert found.verdict.startswith("RECORDS ONLY: ")
    assert any(line.what == "cut" and "as lineage.json says" in line.text for line in found.lines)


@pytest.mark.parametrize("folder", KEPT, ids=lambda folder: folder.name)
def test_the_records_name_no_path_of_a_disk(folder: Path) -> None:
    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from texts(part)

    told = [text for name in command.RECORDS for text in texts(json.loads((folder / name).read_text()))]
    assert [text for text in told if any(Path(word).is_absolute() for word in text.split())] == []


def test_the_list_names_every_card() -> None:
    text = (Path(command.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert [folder.name for folder in KEPT if f"[{folder.name}]({folder.name}/README.md)" not in text] == []


# How the rows of the README's table begin, and the models whose numbers they have.
README_ROWS = {
    "dense": None,
    "last 25 % dropped": make.LAST,
    "layers 12-18 dropped": make.CUT,
    "... repaired": make.REPAIRED,
    "... and healed on text that the dense model wrote": make.HEALED,
    "... or healed on web text": make.WEB,
    "layers 13-15 dropped": make.FEWER,
}


def test_the_readme_has_the_numbers_of_the_cards() -> None:
    text = (Path(command.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    table = text.split("| | layers | perplexity |")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert len(rows) == len(README_ROWS)
    for (start, model), (label, *cells) in zip(README_ROWS.items(), rows, strict=True):
        assert label.startswith(start)
        assert cells == readme_cells(model)


def readme_cells(model: make.Model | None) -> list[str]:
    """Layers, perplexity, KL, agreement and mean accuracy, of a model or of the dense one, as the README writes them."""
    metrics = Metrics.load(command.HERE / (model or make.HEALED).name)
    weights = metrics.weights if model else next(w for w, one in metrics.models.items() if one["role"] == "dense")
    found = [result for result in metrics.results if result["weights"] == weights]
    text = {result["metric"]: result["value"] for result in found if result.get("task") == Path(make.TEXT).stem}
    tasks = [result for result in found if result["metric"] == "acc_norm"]
    assert len(tasks) == 3
    mean = 100 * sum(result["value"] for result in tasks) / 3
    error = 100 * sum(result["stderr"] ** 2 for result in tasks) ** 0.5 / 3
    perplexity = text["perplexity"]
    return [
        str(metrics.models[weights]["layers"]),
        f"{perplexity:.1f}" if perplexity < 1000 else f"{perplexity:.1e}".replace("e+0", "e"),
        f"{text['kl']:.3g}" if model else "",
        f"{100 * text['top1_agreement']:.0f} %" if model else "",
        f"{mean:.1f} ± {error:.1f}",
    ]


def test_drift_is_seen_and_mended(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch) == 0
    assert run(monkeypatch, "--check") == 0
    (shelf / "assets" / "layers.png").unlink()
    assert run(monkeypatch, "--check") == 1
    assert "SmolLM2-small: outdated: assets/layers.png" in capsys.readouterr().out
    metrics = Metrics.load(shelf)
    metrics.results[-1]["value"] += 1
    metrics.write(shelf)
    before = (shelf / "README.md").read_text()
    assert run(monkeypatch, "--check") == 1
    assert "SmolLM2-small: outdated: " in (said := capsys.readouterr().out)
    assert "README.md" in said
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
    assert Lineage.load(taken).base["hub_id"] == "org/base"


def test_the_models_are_made_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each stage is made before what stands on it, and what is missing is found before anything is made."""
    names = [model.name for model in make.MODELS]
    for number, model in enumerate(make.MODELS):
        assert {model.same_layers} - {""} <= set(names[:number])
        assert set(model.beside) <= set(names)
    with pytest.raises(make.LayerPruneError, match=r"has no piqa\.jsonl, arc_easy\.jsonl"):
        make.make(tmp_path / "work", tmp_path, make.Budget(rows=1, limit=1))
    assert not (tmp_path / "work").exists()
    with pytest.raises(SystemExit):
        run(monkeypatch, "--make", str(tmp_path / "work"))
    assert "--make needs --data" in capsys.readouterr().err


SHORT = {
    "eval": ["--length", "64"],
    "bench": ["--repeats", "1", "--load-repeats", "0", "--new-tokens", "2", "--prompt-lengths", "8"],
}


@pytest.mark.processes
def test_the_whole_way_of_a_tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All models are made from a tiny GGUF file, verified, and taken over; a second run makes nothing again."""
    base, data, shelf = write_gguf(tmp_path / "tiny.gguf", layers=8), tmp_path / "data", tmp_path / "shelf"
    shelf.mkdir()
    data.mkdir()
    for task in make.TASKS.split(","):
        rows = [{"query": f"river {i}", "choices": ["up", "down"], "gold": i % 2} for i in range(3)]
        (data / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    river = "the river rises in spring and falls in autumn. " * 20
    (data / make.TEXT).write_text(river)
    (data / "c4_sample.jsonl").write_text(2 * (json.dumps({"text": river}) + "\n"))
    (data / "alpaca_en_demo.json").write_text(json.dumps([{"instruction": "Rise.", "input": "", "output": river}] * 2))
    monkeypatch.setattr(make, "SAMPLES", dict.fromkeys(make.SAMPLES, 1))
    monkeypatch.setattr(command, "HERE", shelf)
    monkeypatch.setattr(make, "packed_base", lambda: base)
    monkeypatch.setattr(make, "MODELS", make.MODELS[:-1])  # the last one is made like the one in front of it
    own, launch, ran = make.hf_layerprune, subprocess.run, []

    def short(words: list[str]) -> int:
        ran.append(words[0])
        return own([*words, *SHORT.get(words[0], [])])

    def launch_once(command: list[str]) -> subprocess.CompletedProcess:
        """The first run of the recipe is launched; another one would only import the same again."""
        if ran.count("recipe"):
            recipe = load_recipe()
            recipe.main(*recipe.make_parser().parse_args_and_config(command[command.index(str(RECIPE)) + 1 :]))
            return subprocess.CompletedProcess(command, 0)
        ran.append("recipe")
        return launch(command)

    monkeypatch.setattr(make, "hf_layerprune", short)
    monkeypatch.setattr(make.subprocess, "run", launch_once)
    words = ["--make", str(tmp_path / "work"), "--data", str(data)]
    words += ["--rows", "2", "--samples", "8", "--length", "32", "--limit", "2", "--windows", "1"]
    assert run(monkeypatch, *words) == 0
    assert [folder.name for folder in command.models()] == sorted(model.name for model in make.MODELS)
    check(shelf, command.models())
    for folder in command.models():
        agrees(folder, base)
    ran.clear()
    monkeypatch.setattr(make, "MODELS", (make.CUT, make.HEALED))
    assert run(monkeypatch, *words) == 0
    assert set(ran) == {"card", "verify"}


def test_the_command() -> None:
    """As people start it, from the root of the repository."""
    root = Path(command.__file__).parents[1]
    done = subprocess.run([sys.executable, "-m", "model_cards", "--check"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(KEPT)
