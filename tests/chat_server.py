"""The chat, served from this process on a free port."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
SPACE = Path(__file__).parents[1] / "spaces" / "chat"
sys.path.insert(0, str(SPACE))  # its files import each other as they do on the Hub

import app  # noqa: E402
import chat  # noqa: E402


def free_port() -> int:
    """A free port."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def served(model: Path | str, base: Path | str | None = None, *, loaded: bool = True) -> Iterator[str]:
    """Serve a model.

    Args:
        model (`Path` or `str`): The model.
        base (`Path` or `str`, *optional*): Its dense base.
        loaded (`bool`): Wait for the weights.

    Yields:
        `str`: The address.
    """
    chat.models = None
    page = app.prepare(str(model), str(base) if base else None)
    if loaded and chat.models is not None:
        assert chat.models.done.wait(120)
    _, url, _ = app.launch(page, prevent_thread_lock=True, quiet=True, server_port=free_port())
    try:
        yield url
    finally:
        page.close()


def answers_under_way() -> int:
    """The number of answers that are being generated."""
    return sum(thread.name == "answer" for thread in threading.enumerate())
