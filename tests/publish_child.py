"""A process that is both the Hub and its client, so that many cases need to start only one.

    found = run_child("tests.publish_flow", tmp_path)

The module is run with `-m`. It must call `start` before anything imports the Hub client, which reads its settings when it
is imported, and at the end `finish` with its findings.
"""

from __future__ import annotations

import contextlib
import io
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
        options: For `HubServer`; by default, `TOKEN` may write everywhere.

    Returns:
        `tuple[HubServer, Path]`: The Hub, and a folder to work in.
    """
    place = Path(sys.argv[1])
    hub = HubServer(**{"writers": {TOKEN: None}} | options).__enter__()
    env = client_env(hub, place / "home", TOKEN)
    os.environ.clear()
    os.environ.update(env)
    # Log everything, so that the test can search it for the token.
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    return hub, place


def hurry() -> None:
    """Shorten the pauses of the Hub's client between attempts from seconds to milliseconds."""
    from huggingface_hub.utils import _http

    real = time.sleep
    _http.time = SimpleNamespace(sleep=lambda seconds: real(min(seconds, 0.02)), time=time.time)


def cli(*words: object) -> tuple[int, str]:
    """Run the command line; returns the exit code and the output."""
    from hf_layerprune.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue() + err.getvalue()


def files(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    """The files of a repository."""
    found = hub.repos[repo].at(revision).files
    return {name: file.path.read_bytes() for name, file in found.items() if name != ".gitattributes"}


def finish(found: Any) -> None:
    """Pass the findings to the test."""
    Path(sys.argv[1], "found.json").write_text(json.dumps(found))


def run_child(module: str, place: Path) -> Any:
    """Run a module in its own process, and check that its output contains no token.

    Args:
        module (`str`): The module.
        place (`Path`): Its working folder.

    Returns:
        Its findings.
    """
    command = [sys.executable, "-m", module, str(place)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stderr) > 1000  # otherwise the next line would prove nothing
    assert TOKEN not in done.stdout + done.stderr
    return json.loads((place / "found.json").read_text())
