"""`hf-layerprune chat MODEL`."""

from __future__ import annotations

import time
from contextlib import suppress

from ..options import ScreenOptions
from ..publish.requests import ChatRequest as Request
from . import Answer

HELP = "chat with a pruned model, next to its dense base"
DESCRIPTION = """Serve a chat with MODEL on this machine and, with --base, the same chat with the dense model next to it: the
page that push --space publishes. Its address is printed."""
Screen = ScreenOptions  # a page, not a result


def run(request: Request) -> Answer:
    from ..publish.space import serving

    with serving(request) as address:
        print(f"chat with {request.model}: {address} (Ctrl-C stops it)", flush=True)
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
    return Answer("stopped", code=130)
