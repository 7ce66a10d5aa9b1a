"""The chat with a real model: SmolLM2-135M-Instruct without layers 12 to 18, as an adapter and as a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gradio_client import Client

from hf_layerprune.cli import main
from tests.chat_server import SPACE, served

import chat  # isort: skip
import weights  # isort: skip

pytestmark = pytest.mark.processes
DENSE = 269_030_016  # bytes of the base's parameters, in bfloat16
LAYER = 2 * 3_540_096


@pytest.fixture(scope="module")
def adapter(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    words = ["prune", str(smollm2_folder), str(folder), "--adapter", "--drop-layers", "12-18", "--no-tune-lm-head"]
    assert main(words) == 0
    return folder


def test_both_sides_of_an_adapter_in_little_more_than_one(adapter: Path) -> None:
    with served(adapter) as url:
        client = Client(url, verbose=False)
        asked = {"temperature": 0, "max_tokens": 16, "api_name": "/compare"}
        both = client.predict("What is the capital of France?", **asked)
        assert "Paris" in both["dense"]["text"]
        assert both["pruned"]["text"] not in ("", both["dense"]["text"])
        assert both["dense"]["weights_bytes"] == pytest.approx(DENSE, rel=1e-3)
        assert both["pruned"]["weights_bytes"] == pytest.approx(DENSE - 7 * LAYER, rel=1e-3)
        # All but the three layers that are tuned, and the norm behind them.
        together = sum(side["weights_bytes"] for side in both.values()) - both["pruned"]["shared_bytes"]
        assert together == pytest.approx(DENSE + 3 * LAYER, rel=1e-3)
        assert both["pruned"]["seconds_to_first_token"] > 0
        # No trace of one in the other: again, and each alone.
        assert client.predict("What is the capital of France?", **asked)["dense"]["text"] == both["dense"]["text"]
        alone = client.predict("What is the capital of France?", **(asked | {"api_name": "/chat"}))
        assert alone == both["pruned"]["text"]
        system = {"system_prompt": "You answer in one word.", "temperature": 0, "max_tokens": 4}
        assert client.predict("Hello", **system, api_name="/chat")


def test_what_both_take_of_the_machine(smollm2_folder: Path, adapter: Path) -> None:
    """The same by what the system says, after both have worked: one and the tuned layers, not two."""
    script = """
import json, sys, psutil, torch, peft, hf_layerprune.adapter, weights
from source import Source
torch.set_num_threads(1)
before = psutil.Process().memory_info().rss
models = weights.Models(Source(sys.argv[1])) if sys.argv[2] == "both" else None
if models:
    models.load()
found = [side.model for side in models.sides.values()] if models else [weights.load(sys.argv[1])]
with torch.no_grad():
    for model in found:
        model(torch.arange(16)[None], use_cache=False)
print(len(found), psutil.Process().memory_info().rss - before)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(SPACE), str(Path(__file__).parents[1])])}

    def measured(model: Path, what: str) -> tuple[int, int]:
        words = [sys.executable, "-c", script, str(model), what]
        out = subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout
        count, taken = out.split()
        return int(count), int(taken)

    one, dense = measured(smollm2_folder, "one")
    two, both = measured(adapter, "both")
    assert (one, two) == (1, 2)
    print(f"dense alone {dense / 1e6:.0f} MB, dense and pruned {both / 1e6:.0f} MB")
    assert both < 1.35 * dense


def test_records_of_a_real_cut(adapter: Path) -> None:
    found = weights.Source(str(adapter)).records
    assert found.layers() == (30, [*range(12), *range(19, 30)])
    assert found.lineage == json.loads((adapter / "lineage.json").read_text())
    assert chat.models.source.chats
