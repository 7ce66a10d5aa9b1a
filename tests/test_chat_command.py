"""`hf-layerprune chat`, as a process of its own, and what 200 turns do to its memory."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from gradio_client import Client

from hf_layerprune.cli import main
from tests.chat_models import pruned_model, tiny_chat_model

RUN = [sys.executable, "-c", "import sys; from hf_layerprune.cli import main; sys.exit(main())", "chat"]


def test_chat_and_two_hundred_turns(tmp_path: Path) -> None:
    base = tiny_chat_model(tmp_path / "base")
    pruned = pruned_model(base, tmp_path / "pruned")
    # The base is named nowhere: the history of the model knows it.
    env = os.environ | {"MAX_CONTEXT": "512", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen([*RUN, str(pruned)], stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            client = Client(url, verbose=False)
            assert client.predict(api_name="/about")["model"] == str(pruned)
            server = psutil.Process(process.pid).children()[0]
            said: list[dict[str, str]] = []
            used = []
            for turn in range(200):
                answer = client.predict(f"ba be {turn}", said, max_tokens=3, seed=turn, api_name="/chat")
                said += [{"role": "user", "content": f"ba be {turn}"}, {"role": "assistant", "content": answer or "-"}]
                used.append(server.memory_info().rss)
            assert used[-1] < 1.02 * used[49]
            assert server.num_threads() < 40
            both = client.predict("ba", max_tokens=3, api_name="/compare")
            assert both["dense"]["weights_bytes"] > both["pruned"]["weights_bytes"]
        finally:
            process.send_signal(signal.SIGINT)
            server.send_signal(signal.SIGINT)  # a terminal sends it to both
        assert process.wait(20) == 0
    assert not server.is_running()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere/at-all"], "/nowhere/at-all does not exist; name a model folder"),
        ([str(Path(__file__).parent)], "has no config.json, so it is not a model folder"),
        (["org/name", "--base", "./nowhere"], "nowhere does not exist"),
    ],
)
def test_a_model_that_is_not_there_is_told_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *words]) == 1
    assert message in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gradio", "mcp") else find(name))
    assert main(["chat", str(tmp_path)]) == 1
    assert 'the chat needs gradio and mcp: pip install "hf-layerprune[space]"' in capsys.readouterr().err
