"""What `eval` and `bench` have in common: the words that say where numbers go and how a model is loaded."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..options import DTYPES

_NAMES = ("dtype", "device", "revision", "base_revision", "output", "history", "force")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words."""
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="of the weights; auto: as they are")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="D",
        help="cpu, cuda, cuda:1, mps, all (GPUs), or auto: a GPU if there is one",
    )
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--base-revision", metavar="REVISION", help="branch, tag or commit of BASE on the Hub")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the numbers here, not to metrics.json in the model's folder"
    )
    parser.add_argument(
        "--history",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="take over the numbers of this earlier stage of MODEL; repeatable",
    )
    parser.add_argument("--force", action="store_true", help="replace numbers of other weights")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def values(args: argparse.Namespace) -> dict[str, Any]:
    """What was said, as the requests of `measure` take it."""
    found = {name: getattr(args, name) for name in _NAMES}
    return found | {"history": tuple(args.history), "progress": not args.quiet}


def whole(text: str) -> int:
    """A number of 1 or more, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)
