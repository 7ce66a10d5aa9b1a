"""A process that is both the Hub and its client, so that one start serves many cases.

    found = run_child("tests.publish_faults", tmp_path)

The module is run with `-m`. It calls `start` first, before anything imports the Hub's client, which reads its settings
when it is imported; and `finish` last, with what it found.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.hub_server import HubServer, client_env

TOKEN = "hf_" + "Secret0123456789" * 2


def start(**options: Any) -> tuple[HubServer, Path]:
    """Start the Hub, and point this process at it.

    Args:
        options: For `HubServer`; `TOKEN` may write everywhere unless they say otherwise.

    Returns:
        `tuple[HubServer, Path]`: The Hub, and a folder to work in.
    """
    place = Path(sys.argv[1])
    hub = HubServer(**{"writers": {TOKEN: None}} | options).__enter__()
    env = client_env(hub, place / "home", TOKEN)
    os.environ.clear()
    os.environ.update(env)
    # Everything that anybody says, so that the test can look for the token in it.
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    return hub, place


def hurry() -> None:
    """Wait hardly at all where a push would wait for seconds between its attempts."""
    from huggingface_hub.utils import _http

    from hf_layerprune.publish.hub import upload

    real = time.sleep
    _http.time = SimpleNamespace(sleep=lambda seconds: real(min(seconds, 0.02)), time=time.time)
    upload.FIRST_WAIT = 0.02


def finish(found: Any) -> None:
    """Hand over what was found."""
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))


def run_child(module: str, place: Path, timeout: float = 600) -> Any:
    """Run a module in a process of its own.

    Args:
        module (`str`): Its name.
        place (`Path`): A folder for it to work in.
        timeout (`float`): Seconds.

    Returns:
        What it hands over. That its output holds no token is checked.
    """
    command = [sys.executable, "-m", module, str(place)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stderr) > 1000  # or else the next line proves nothing
    assert TOKEN not in done.stdout + done.stderr
    return json.loads((place / "found.json").read_text())
