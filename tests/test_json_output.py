"""The keys of what `--json` prints, on which scripts rely; `inspect`, `prune` and `recipes` are in `test_cli.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_layerprune.cli import main

from .measure_models import write_model, write_tasks

SCORES = (
    "base calibration commit contiguous count criteria drop num_layers peak_memory_bytes protect required schema_version seconds "
    "seed variant versions"
)
CURVE = "calibration chosen decode dense identity knee num_layers points repair schema_version steps"
POINT = "bytes cut dropped found_by layers parameters repaired speedup"
METRICS = "comparisons models results schema_version weights"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("json")
    write_tasks(place / "tasks", 4)
    assert main(["prune", str(write_model(place / "base")), str(place / "pruned"), "--drop", "2"]) == 0
    return place / "pruned"


@pytest.mark.parametrize(("words", "code", "keys", "inside"), [
    ("rank BASE --criterion magnitude_l1", 0, SCORES, {}),
    ("rank BASE --curve --curve-up-to 2 --calibration-samples 8 --calibration-length 16", 0, CURVE, {"points": POINT}),
    ("eval MODEL --tasks asked --tasks-from TASKS --text none", 0, METRICS, {}),
    ("bench MODEL --repeats 1 --load-repeats 0 --batch-sizes 1 --prompt-lengths 8 --new-tokens 2", 0, METRICS, {}),
    ("card MODEL --license mit", 0, "changed folder", {}),
    ("push MODEL me/model --dry-run", 1, "checks files left_out", {"checks": "level name text"}),
    ("push MODEL me/model", 1, "refusals", {"refusals": "level name text"}),
    ("verify MODEL", 0, "checks good verdict", {"checks": "good text what"}),
])  # fmt: skip
def test_keys(
    pruned: Path, words: str, code: int, keys: str, inside: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {"MODEL": pruned, "BASE": pruned.parent / "base", "TASKS": pruned.parent / "tasks"}
    assert main([str(paths.get(word, word)) for word in words.split()] + ["--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert " ".join(sorted(found)) == keys
    for name, parts in inside.items():
        assert {" ".join(sorted(one)) for one in found[name]} == {parts}
    if keys == METRICS:
        assert found == json.loads((pruned / "metrics.json").read_text())
