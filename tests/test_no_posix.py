"""The commands run where the modules of POSIX systems do not exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_layerprune.cli import main

from .tiny_models import tiny_model

# What Windows lacks. An entry of None makes the import fail, whoever asks for it; psutil's part for Linux comes first.
BLOCKED = """
import sys

import psutil

sys.modules.update({"fcntl": None, "resource": None})
from hf_layerprune.cli import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("windows")
    tiny_model("llama").save_pretrained(place / "base")
    assert main(["prune", str(place / "base"), str(place / "cut"), "--drop-layers", "2"]) == 0
    return place


@pytest.mark.parametrize(("words", "says"), [
    (["prune", "base", "again", "--drop-layers", "1"], "dropped layers 1 of 8"),
    (["verify", "cut"], "YES"),
    (["card", "cut"], "README.md"),
])  # fmt: skip
def test_commands_without_posix_modules(place: Path, words: list[str], says: str) -> None:
    command = [sys.executable, "-c", BLOCKED, *words]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
