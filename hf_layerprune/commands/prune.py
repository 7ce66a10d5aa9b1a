"""`hf-layerprune prune BASE OUTPUT`."""

from __future__ import annotations

import argparse

from ..errors import shown
from ..options import add, gather
from ..stages.requests import PruneRequest

HELP = "drop layers and write the model that is left"
DESCRIPTION = "Drop decoder layers of BASE and write the model that is left to OUTPUT."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    which = parser.add_mutually_exclusive_group()
    add(which, PruneRequest, "drop", "drop_layers")
    add(parser, PruneRequest, skip=("drop", "drop_layers"))


def run(args: argparse.Namespace) -> None:
    """Prune."""
    from ..stages.prune import prune_to

    print(shown(str(prune_to(gather(args, PruneRequest)))))
