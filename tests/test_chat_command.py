"""`hf-layerprune chat`: what it refuses before anything starts, and what it prints."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_layerprune.cli import main
from hf_layerprune.publish.requests import ChatRequest
from hf_layerprune.publish.space import serve


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere/at-all"], "/nowhere/at-all does not exist; specify a model folder"),
        ([str(Path(__file__).parent)], "has no config.json, so it is not a model folder"),
        (["org/name", "--base", "./nowhere"], "nowhere does not exist"),
        (["org/name", "--host", "192.0.2.1"], "can't listen on 192.0.2.1, port 7860 ("),
    ],
)
def test_a_model_that_is_not_there_is_told_before_anything_starts(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *words]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("port", ["web", "99999"])
def test_a_port_of_the_environment_that_is_none(
    port: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GRADIO_SERVER_PORT", port)
    assert main(["chat", "org/name"]) == 1
    assert f"can't listen on 127.0.0.1, port {port} (" in capsys.readouterr().err


def test_without_gradio_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("gradio", "mcp") else find(name))
    assert main(["chat", str(tmp_path)]) == 1
    assert 'the chat needs gradio and mcp: pip install "hf-layerprune[space]"' in capsys.readouterr().err


@pytest.mark.parametrize(("asked", "environment", "where"), [
    ({}, {}, ("127.0.0.1", "7860")),
    ({}, {"GRADIO_SERVER_NAME": "localhost", "GRADIO_SERVER_PORT": "7961"}, ("localhost", "7961")),
    ({"host": "127.0.0.1", "port": 7962}, {"GRADIO_SERVER_NAME": "localhost", "GRADIO_SERVER_PORT": "7"},
     ("127.0.0.1", "7962")),
])  # fmt: skip
def test_what_is_served_where(
    base: Path, cut_once: Path, monkeypatch: pytest.MonkeyPatch, asked: dict, environment: dict, where: tuple[str, str]
) -> None:
    built: list = []
    app = SimpleNamespace(build=lambda *models: built.append(models), CannotLoad=ValueError)
    app.launch = lambda *_, **__: (None, "http://here", "http://everywhere" if asked else None)
    monkeypatch.setitem(sys.modules, "app", app)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        monkeypatch.setenv(name, environment.get(name, ""))
        if name not in environment:
            monkeypatch.delenv(name)
    assert serve(ChatRequest(str(cut_once), **asked)) == ("http://everywhere" if asked else "http://here")
    assert (os.environ["GRADIO_SERVER_NAME"], os.environ["GRADIO_SERVER_PORT"]) == where
    serve(ChatRequest(str(cut_once), base="org/name", **asked))
    serve(ChatRequest("org/pruned", **asked))
    # Without another, the folder that the model was pruned from.
    assert built == [(str(cut_once), str(base)), (str(cut_once), "org/name"), ("org/pruned", None)]


@pytest.mark.processes
@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("locks", [True, False])
def test_two_chats_that_start_at_once(base: Path, tmp_path: Path, locks: bool) -> None:
    """One alone, too, where it can't have a lock."""
    env = {name: value for name, value in os.environ.items() if name not in ("TRANSFORMERS_VERBOSITY", "TQDM_DISABLE")}
    env["TMPDIR"] = str(tmp_path)
    if not locks:
        (tmp_path / f".hf-layerprune-chat-{os.getuid()}.lock").mkdir()
    words = [sys.executable, "-m", "hf_layerprune", "chat", str(base)]
    chats = [
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)
        for _ in range(1 + locks)
    ]
    try:
        lines = [chat.stdout.readline() if chat.stdout else "" for chat in chats]
        found = [
            re.fullmatch(rf"chat with {base}: http://127.0.0.1:(\d+)/ \(Ctrl-C stops it\)\n", line) for line in lines
        ]
        assert all(found), lines
        assert len({one and one[1] for one in found}) == len(chats)
        for chat in chats:
            chat.send_signal(signal.SIGINT)
        assert [chat.communicate(timeout=60)[0] for chat in chats] == ["stopped\n"] * len(chats)
        assert [chat.returncode for chat in chats] == [130] * len(chats)
    finally:
        for chat in chats:
            chat.kill()
