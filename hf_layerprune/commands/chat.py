"""`hf-layerprune chat MODEL`."""

from __future__ import annotations

import os
import subprocess
from dataclasses import MISSING, dataclass

<<<<<<< HEAD
from ..options import MODEL, MODEL_HELP, Options, option, whole
=======
from ..options import add, gather
from ..publish.requests import ChatRequest
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)

HELP = "talk to a pruned model, beside its dense base"
DESCRIPTION = """Open the chat of spaces/chat on this machine, with MODEL, and with BASE beside it: the page that
push --space publishes. Its address is printed."""


<<<<<<< HEAD
@dataclass
class Request(Options):
    """What to talk to."""

    model: str = option(MISSING, f"{MODEL_HELP}; an adapter too", MODEL)
    base: str | None = option(None, "The dense model to compare with (the one MODEL was made of)", MODEL)
    port: int | None = option(None, "Serve on this port (the first free one from 7860)", whole(1, 65_535, "PORT"))
    host: str | None = option(None, "Serve on this address; 0.0.0.0 for every one (127.0.0.1)")
=======
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, ChatRequest)
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)


def run(request: Request) -> int:
    from ..publish.space import local_run

<<<<<<< HEAD
    words, environment = local_run(request.model, request.base, port=request.port, host=request.host)
=======
    words, environment = local_run(gather(args, ChatRequest))
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)
    if os.name == "posix":  # no process between the terminal and the page: what ends this one ends the page
        os.execve(words[0], words, environment)
    return subprocess.call(words, env=environment)
