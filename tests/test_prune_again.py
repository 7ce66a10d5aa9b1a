"""A cut that is asked for again is taken up; one that has become another is not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_layerprune import prune_model
from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError, CutError
from hf_layerprune.stages import provenance
from hf_layerprune.stages.prune import is_already_pruned, prune_to
from hf_layerprune.stages.requests import PruneRequest

from .folders import snapshot
from .measure_models import write_model

FEW: dict[str, Any] = {"calibration_samples": 4, "calibration_length": 16}
TEXT: dict[str, Any] = {"drop": 2, "criterion": "block_influence", **FEW}
REPAIRED: dict[str, Any] = {"drop_layers": [3], "repair": "linear", "calibration_samples": 8, "calibration_length": 16}
SIZE: dict[str, Any] = {"target_size": "90KB"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("base") / "model")
    (folder.parent / "notes.txt").write_text("The river is wide, and the water is cold. " * 40)
    return folder


def test_python_writes_what_the_command_writes(base: Path, tmp_path: Path) -> None:
    assert main(["prune", str(base), str(tmp_path / "command"), "--drop-layers", "3-4"]) == 0
    done = prune_model(str(base), tmp_path / "call", drop_layers=[3, 4])
    assert (done.output, done.dropped, done.layers) == (str(tmp_path / "call"), [3, 4], 8)
    written = [snapshot(tmp_path / name) for name in ("command", "call")]
    lineages = [json.loads(files.pop("lineage.json")) for files in written]
    assert written[0] == written[1]
    assert lineages[0].keys() == lineages[1].keys()
    assert lineages[0]["entries"][0]["settings"] == lineages[1]["entries"][0]["settings"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_layer": [3]}, "option 'drop_layer' is unknown; did you mean drop_layers"),
        ({"drop_layers": [3], "criterion": "kl"}, "criterion='kl' has no effect with drop_layers"),
    ],
    ids=str,
)
def test_a_call_is_checked_as_a_command_is(base: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        prune_model(str(base), tmp_path / "call", **options)
    assert not (tmp_path / "call").exists()


@pytest.mark.parametrize(
    ("options", "change"),
    [
        (TEXT, {"calibration": "notes.txt"}),
        (TEXT, {"calibration_samples": 5}),
        (TEXT, {"seed": 7}),
        (REPAIRED, {"seed": 7}),
        (SIZE, {"target_dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_other_options_are_another_cut(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], change: dict[str, Any]
) -> None:
    monkeypatch.chdir(base.parent)
    folder = tmp_path / "pruned"
    request = PruneRequest(str(base), str(folder), **options)
    assert not is_already_pruned(request, folder)
    prune_to(request)
    assert is_already_pruned(request, folder)
    with pytest.raises(CheckpointError, match="holds a different cut"):
        is_already_pruned(PruneRequest(str(base), str(folder), **options | change), folder)


def test_what_is_not_used_may_differ(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pruned"
    prune_to(PruneRequest(str(base), str(folder), drop_layers=[3]))
    assert is_already_pruned(PruneRequest(str(base), str(folder), drop_layers=[3], seed=7, **FEW), folder)


def test_a_base_that_was_edited_is_another_base(base: Path, tmp_path: Path) -> None:
    """The file keeps its name and its size."""
    mine = Path(shutil.copytree(base, tmp_path / "base"))
    request = PruneRequest(str(mine), str(tmp_path / "pruned"), drop_layers=[3])
    prune_to(request)
    weights = load_file(mine / "model.safetensors")
    size = (mine / "model.safetensors").stat().st_size
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], 2)
    save_file(weights, mine / "model.safetensors", metadata={"format": "pt"})
    assert (mine / "model.safetensors").stat().st_size == size
    with pytest.raises(CheckpointError, match="one of another base"):
        is_already_pruned(request, tmp_path / "pruned")


def test_a_calibration_file_that_was_edited_is_another_text(base: Path, tmp_path: Path) -> None:
    notes = tmp_path / "notes.txt"
    shutil.copyfile(base.parent / "notes.txt", notes)
    request = PruneRequest(str(base), str(tmp_path / "pruned"), **REPAIRED, calibration=str(notes))
    prune_to(request)
    assert is_already_pruned(request, tmp_path / "pruned")
    notes.write_text(notes.read_text().replace("cold", "warm"))
    with pytest.raises(CheckpointError, match="another base or calibration text"):
        is_already_pruned(request, tmp_path / "pruned")


@pytest.mark.parametrize(
    ("commit", "change", "same"),
    [
        ("b" * 40, {}, True),
        ("b" * 40, {"README.md": "2"}, True),
        ("b" * 40, {"model.safetensors": "2"}, False),
        ("b" * 40, {"config.json": "2"}, False),
        ("b" * 40, {"more.safetensors": "1"}, False),
        ("a" * 40, {"model.safetensors": "2"}, True),  # of a file that is not in the cache, no hash is known
    ],
)
def test_another_commit_of_a_base_on_the_hub(
    monkeypatch: pytest.MonkeyPatch, commit: str, change: dict[str, str], same: bool
) -> None:
    """With the same weights and config, such as after an edit of its card, it is the same base."""

    def files(change: dict[str, str]) -> dict[str, Any]:
        hashes = {"config.json": "1", "model.safetensors": "1", "README.md": "1"} | change
        return {name: {"size": 1, "sha256": sha256} for name, sha256 in hashes.items()}

    repo = SimpleNamespace(commit=commit, get=lambda name: None, fingerprint=lambda: files(change))
    monkeypatch.setattr(provenance.Repo, "open", lambda name, revision: repo)
    recorded = {"id": "org/base", "commit": "a" * 40, "files": files({})}
    assert provenance.is_same_base(recorded, PruneRequest("org/base", "pruned", revision="v2")) is same
    assert not provenance.is_same_base(recorded | {"id": "org/other"}, PruneRequest("org/base", "pruned"))
