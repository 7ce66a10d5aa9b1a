"""`card`, `push` and `verify` one after the other; and that they start without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_layerprune.cli import main

from .tiny_models import tiny_model


def test_from_the_cut_to_its_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    model = tmp_path / "model"
    assert main(["prune", str(tmp_path / "base"), str(model), "--drop", "2"]) == 0

    assert main(["card", str(model), "--license", "mit"]) == 0
    assert (model / "README.md").is_file()
    capsys.readouterr()
    assert main(["push", str(model), "someone/small", "--dry-run"]) == 1
    assert "names the base by a path on your disk" in capsys.readouterr().out
    assert main(["verify", str(model)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"YES: {model} matches its records"
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert main(["verify", str(model)]) == 1
    assert "NO   weights   their hash is" in capsys.readouterr().out


def test_what_needs_no_torch_imports_none(tmp_path: Path) -> None:
    """Help, and the rooms of a card, which a page or a Space may use without torch."""
    script = """
import sys
from hf_layerprune.cli import build_parser
build_parser()
from hf_layerprune.publish.card import escape, plots, regions, render, style, tables
from hf_layerprune.publish.hub import leaks
from hf_layerprune.records import licences, lineage
assert not {"torch", "transformers", "matplotlib"} & sys.modules.keys()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
