"""`hf-layerprune chat`: what it refuses before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_layerprune.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["/nowhere/at-all"], "/nowhere/at-all does not exist; specify a model folder"),
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
