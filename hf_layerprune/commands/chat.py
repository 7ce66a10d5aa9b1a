"""`hf-layerprune chat MODEL`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import NoReturn

from ..options import DisplayOptions
from ..publish.requests import ChatRequest as Request

HELP = "chat with a pruned model, next to its dense base"
DESCRIPTION = """Serve a chat with MODEL on this machine and, with --base, the same chat with the dense model next to it: the
page that push --space publishes. Its address is printed."""
Display = DisplayOptions  # a page, not a result


def run(request: Request) -> NoReturn:
    from ..publish.space import serve, stop_serving

    address = serve(request)
    with suppress(KeyboardInterrupt):
        print(f"chat with {request.model}: {address} (Ctrl-C stops it)", flush=True)
        while True:
            time.sleep(1)
    print("stopped", flush=True)
    stop_serving()
