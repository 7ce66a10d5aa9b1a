"""The commands run where the modules of POSIX systems do not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from .tiny_models import tiny_model

# What Windows lacks. An entry of None makes the import fail, whoever asks for it; psutil's part for Linux comes first.
BLOCKED = """
import json, sys

import psutil

sys.modules.update({"fcntl": None, "resource": None})
from hf_layerprune.cli import main

print(*[main(words) for words in json.loads(sys.argv[1])])
"""


def test_commands_without_posix_modules(tmp_path: Path) -> None:
    """What other runs left stays, since it can't be told from what they are writing."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    left = tmp_path / ".cut.partial-0123abcd"
    left.mkdir()
    words = [["prune", "base", "cut", "--drop-layers", "1"], ["verify", "cut"], ["card", "cut"]]
    command = [sys.executable, "-c", BLOCKED, json.dumps(words)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.splitlines()[-1] == "0 0 0", done.stderr
    for said in ("dropped layer 1 of 8", "YES", "README.md"):
        assert said in done.stdout
    assert left.exists()
