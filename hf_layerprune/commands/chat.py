"""`hf-layerprune chat MODEL`."""

from __future__ import annotations

import os
import subprocess

from ..options import ScreenOptions
from ..publish.requests import ChatRequest as Request
from . import Answer

HELP = "chat with a pruned model, next to its dense base"
DESCRIPTION = """Serve a chat with MODEL on this machine and, with --base, the same chat with the dense model next to it: the
page that push --space publishes. Its address is printed."""
Screen = ScreenOptions  # a page, not a result


def run(request: Request) -> Answer:
    from ..publish.space import local_run

    words, environment = local_run(request)
    if os.name == "posix":  # replace this process, so that a signal to it ends the server
        os.execve(words[0], words, environment)
    return Answer(code=subprocess.call(words, env=environment))
