"""The chat with a real model: SmolLM2-135M-Instruct without layers 12 to 18, as an adapter and as a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gradio_client import Client

from hf_layerprune.cli import main
from tests.chat_server import served

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


def test_records_of_a_real_cut(adapter: Path) -> None:
    found = weights.Source(str(adapter)).records
    assert found.layers() == (30, [*range(12), *range(19, 30)])
    assert found.lineage == json.loads((adapter / "lineage.json").read_text())
    assert chat.models.source.chats
