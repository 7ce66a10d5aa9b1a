"""`hf-layerprune chat MODEL`."""

from __future__ import annotations

import argparse

from ..options import MODEL_HELP

HELP = "talk to a pruned model, beside its dense base"
DESCRIPTION = (
    "Open the chat of spaces/chat on this machine, with MODEL, and with BASE beside it: the page that push --space "
    "publishes. Its address is printed."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help=f"{MODEL_HELP}; an adapter too")
    parser.add_argument("--base", metavar="BASE", help="the dense model to compare with (the one MODEL was made of)")
    parser.add_argument("--port", type=int, metavar="P", help="serve on this port (the first free one from 7860)")
    parser.add_argument("--host", metavar="H", help="serve on this address, 0.0.0.0 for every one (127.0.0.1)")


def run(args: argparse.Namespace) -> int:
    """Chat."""
    import os
    import subprocess

    from ..publish.space import local_run

    words, environment = local_run(args.model, args.base, port=args.port, host=args.host)
    if os.name == "posix":  # no process between the terminal and the page: what ends this one ends the page
        os.execve(words[0], words, environment)
    return subprocess.call(words, env=environment)
