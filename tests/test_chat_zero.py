"""The chat on ZeroGPU: what the package `spaces` does there is done by a stand-in, as there is no such GPU to borrow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.chat_models import pruned_model, tiny_chat_model

SPACE = Path(__file__).parents[1] / "spaces" / "chat"
# Like the real one, it wraps a generator, and wants to be there before torch is.
STAND_IN = """
import functools, sys

came_first = "torch" not in sys.modules
lent_to = []

def GPU(function):
    @functools.wraps(function)
    def lent(*args):
        lent_to.append(function.__name__)
        yield from function(*args)
    return lent
"""
SCRIPT = """
import json, sys
import app, chat, spaces

app.prepare(*sys.argv[1:])
loaded = chat.models.done.is_set()
settings = {"temperature": 0, "top_p": 1, "max_tokens": 5, "seed": 1}
states = list(chat.run(["pruned", "dense"], [5, 6, 7], settings))[-1]
print(json.dumps({
    "first": spaces.came_first, "loaded": loaded, "lent": spaces.lent_to, "tokens": [s["tokens"] for s in states],
    "shared": [s["shared_bytes"] for s in states],
}))
"""


def test_zero_gpu(tmp_path: Path) -> None:
    base = tiny_chat_model(tmp_path / "base")
    pruned = pruned_model(base, tmp_path / "pruned")
    (tmp_path / "spaces.py").write_text(STAND_IN)
    path = os.pathsep.join([str(SPACE), str(tmp_path), str(SPACE.parents[1])])
    env = os.environ | {"PYTHONPATH": path, "SPACES_ZERO_GPU": "true", "GRADIO_ANALYTICS_ENABLED": "False"}
    words = [sys.executable, "-c", SCRIPT, str(pruned), str(base)]
    found = json.loads(
        subprocess.run(words, env=env, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    )
    assert found["first"]  # it patches torch
    assert found["loaded"]  # weights are handed over when the page starts, not later
    assert found["lent"] == ["run"]  # the GPU is lent for an answer, and for nothing else
    assert found["tokens"] == [5, 5]
    assert found["shared"] == [0, 0]  # each model's tensors are moved on their own
