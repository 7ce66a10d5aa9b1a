"""What a person sees on a real terminal: bars that go away, no colours, and nothing at all where it is asked for."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from hf_layerprune.cli import main

pytestmark = pytest.mark.processes
COMMAND = [sys.executable, "-c", "import sys; from hf_layerprune.cli import main; sys.exit(main())"]
COLOUR = re.compile(r"\x1b\[[0-9;]*[1-9][0-9;]*m")


def on_a_terminal(*words: str, **env: str) -> tuple[int, str]:
    """Run a command on a pseudo-terminal; its exit code, and all that it wrote there."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [*COMMAND, *words]
    shown = {name: value for name, value in os.environ.items() if not name.endswith("PROGRESS_BARS")} | env
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=shown)
    os.close(theirs)
    seen = b""
    try:
        while chunk := os.read(ours, 65536):
            seen += chunk
    except OSError:  # Linux reports the end of a pseudo-terminal as an error
        pass
    os.close(ours)
    return process.wait(timeout=60), seen.decode()


def test_bars_on_a_terminal_and_plain_text_elsewhere(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["prune", str(base), "--drop", "2", "--criterion", "block_influence", "--calibration-length", "64"]
    code, seen = on_a_terminal(*words, str(tmp_path / "a"), NO_COLOR="1")
    assert code == 0, seen
    assert "\r" in seen.replace("\r\n", "\n"), "there was a progress bar"
    assert not COLOUR.search(seen)
    assert main([*words, str(tmp_path / "b")]) == 0
    assert not set("\r\x1b") & set("".join(capfd.readouterr()))


def test_quiet_is_quiet_on_a_terminal(base: Path, tmp_path: Path) -> None:
    code, seen = on_a_terminal("prune", str(base), str(tmp_path / "a"), "--drop", "2", "--quiet")
    assert code == 0
    assert seen == f"dropped layers 6-7 of 8: 6 left, in {tmp_path / 'a'}\r\n"  # the result, and nothing else
