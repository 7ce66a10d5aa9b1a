"""`hf-layerprune rank BASE [OUTPUT]`."""

from __future__ import annotations

import argparse

from ..errors import shown
from ..options import add, gather
from ..stages.requests import RankRequest

HELP = "score every layer, and show what each criterion would drop"
DESCRIPTION = """Score the decoder layers of BASE, by one criterion or by all of them at once, and show which layers
each would drop. With OUTPUT, write scores.json and the plots there. Nothing is pruned."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, RankRequest)


def run(args: argparse.Namespace) -> None:
    """Rank."""
    from ..stages.rank import rank

    request = gather(args, RankRequest)
    print(shown(str(rank(request))))
    if request.output is not None:
        print(shown(f"\nscores.json and the plots are in {request.output}"))
