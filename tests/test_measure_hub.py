"""Measuring what is on the Hub, and calibrating on it: models, adapters, benchmarks and texts, each at one commit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_layerprune.cli import main
from hf_layerprune.records.fingerprints import compute_identity, fingerprint, weights_hash
from hf_layerprune.records.metrics import Metrics

from .hub_server import HubServer, client_env
from .measure_datasets import write_datasets
from .measure_models import find, write_model

pytestmark = pytest.mark.processes
SOURCES = ("org/rows", "org/rows:validation:other", "org/rows:train:number", "org/rows:nosuch", "org/none")
SIX = ("piqa", "hellaswag", "openbookqa", "arc_easy", "arc_challenge", "winogrande")

# One process that cuts, measures and reads everything, since the client library reads its settings when it is imported.
WORKER = """
import json, sys
from pathlib import Path
from hf_layerprune.calibration.rows import load_calibration
from hf_layerprune.cli import main
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.measure.evaluate import EvalRequest, evaluate
from tests.measure_models import byte_tokenizer
for line in sys.stdin:
    order, answer = json.loads(line), {}
    try:
        if "command" in order:
            assert main(order["command"]) == 0
        elif "calibration" in order:
            rows = load_calibration(order["calibration"], byte_tokenizer(), samples=4, length=32, seed=5)
            answer["text"] = byte_tokenizer().decode(rows.input_ids[0])
        else:
            if "output" in order:
                order["output"] = Path(order["output"])
            evaluate(EvalRequest(**{k: tuple(v) if isinstance(v, list) else v for k, v in order.items()}))
        print(json.dumps(answer), flush=True)
    except LayerPruneError as error:
        print(json.dumps({"error": str(error)}), flush=True)
"""


def ask(server: HubServer, home: Path, *orders: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    said = "".join(json.dumps(order) + "\n" for order in orders)
    command = [sys.executable, "-c", WORKER]
    env = client_env(server, home) | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=env, input=said, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")], done.stderr


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    base = write_model(root / "base")
    assert main(["prune", str(base), str(root / "cut"), "--drop-layers", "3-4"]) == 0
    rows = root / "rows"
    rows.mkdir()
    for split in ("train", "validation"):
        lines = [{"text": f"{split} text {i}", "other": f"{split} other {i}", "number": i} for i in range(50)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"org/base": base, "org/cut": root / "cut", "org/adapter": root / "adapter"}  # which is made below
    return found | write_datasets(root / "datasets") | {"datasets/org/rows": rows}


@pytest.fixture(scope="module")
def asked(repos: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path, str]:
    """What the process answers, the folder of its results, and what it says. Not one file of these is local to it."""
    folder = tmp_path_factory.mktemp("measured")
    words = ["prune", "org/base", str(repos["org/adapter"]), "--drop-layers", "6-7", "--adapter", "--no-tune-lm-head"]
    order = {"model": "org/cut", "base": "org/base", "output": str(folder / "cut.json"), "length": 64}
    adapter = {"model": "org/adapter", "base": "org/base", "output": str(folder / "adapter.json")}
    with HubServer(repos) as server:
        answers, said = ask(
            server,
            folder / "home",
            order | {"tasks": SIX, "texts": ["wikitext2"], "windows": 4},
            {"model": "org/base", "tasks": ["piqa"], "texts": [], "revision": "no-such-branch"},
            {"model": "org/none", "tasks": ["piqa"], "texts": []},
            {"command": words},
            adapter | {"tasks": ["piqa"], "texts": []},
            *({"calibration": source} for source in SOURCES),
        )
    return answers, folder, said


@pytest.fixture(scope="module")
def measured(asked: tuple[list[dict[str, Any]], Path, str]) -> tuple[list[dict[str, Any]], Path]:
    return asked[0][: -len(SOURCES)], asked[1]


def test_six_of_the_papers_tasks_and_wikitext2(
    repos: dict[str, Path], measured: tuple[list[dict[str, Any]], Path]
) -> None:
    """Without one local file: the models, the data and the text come from the Hub."""
    answers, folder = measured
    assert answers[0] == {}
    assert "no-such-branch" in answers[1]["error"]
    assert "org/none" in answers[2]["error"]
    found = Metrics.load_file(folder / "cut.json")
    # The hashes are those of the files, though nobody looked at them there.
    assert found.weights == weights_hash(fingerprint(repos["org/cut"]))
    assert weights_hash(fingerprint(repos["org/base"])) in found.models
    assert found.models[found.weights] | {"parameters": 0} == {
        "role": "cut", "name": "org/cut", "layers": 6, "parameters": 0, "identity": compute_identity(repos["org/cut"]).parts
    }  # fmt: skip
    for task in SIX:
        record = find(found, found.weights, "acc", task)
        assert (record["samples"], record["shots"]) == (4, 0)
        assert record["settings"]["chat_template"] is False
        assert record["chance"] == (0.5 if task in ("piqa", "winogrande") else 0.25)
        assert (find(found, found.weights, "acc_norm", task) is None) == (task == "winogrande")
    assert find(found, found.weights, "acc", "arc_easy")["dataset"] == "allenai/ai2_arc"
    assert find(found, found.weights, "kl", "wikitext2")["dataset"] == "Salesforce/wikitext"
    assert len([one for one in found.comparisons if one.get("test") == "mcnemar_exact"]) == 11


def test_an_adapter_on_the_hub(repos: dict[str, Path], measured: tuple[list[dict[str, Any]], Path]) -> None:
    answers, folder = measured
    assert answers[3:] == [{}, {}]
    found = Metrics.load_file(folder / "adapter.json")
    assert found.weights == weights_hash(fingerprint(repos["org/adapter"]))
    assert found.models[found.weights]["layers"] == 6
    assert found.models[found.weights]["role"] == "cut"
    assert find(found, found.weights, "acc", "piqa")


def test_calibration_on_a_data_set_on_the_hub(asked: tuple[list[dict[str, Any]], Path, str]) -> None:
    plain, other, number, no_split, none = asked[0][-len(SOURCES) :]
    assert "train text" in plain["text"]
    assert "validation" not in plain["text"]
    assert "alidation other" in other["text"]
    assert "don't evaluate on it" in asked[2]
    assert "no text in 'number', only text, other;" in number["error"]
    assert no_split["error"].startswith("can't read calibration org/rows:nosuch")
    assert none["error"].startswith("can't read calibration org/none")
