"""`hf-layerprune rank BASE [OUTPUT]`."""

from __future__ import annotations

from ..errors import shown
from ..options import AMOUNTS
from ..stages.requests import RankRequest as Request

HELP = "score every layer, and show what each criterion would drop"
DESCRIPTION = """Score the decoder layers of BASE, by one criterion or by all of them at once, and show which layers
each would drop; with --curve, the best cut of each depth and what it costs. With OUTPUT, write scores.json and the plots there. Nothing is pruned."""
EXCLUSIVE = AMOUNTS


def run(request: Request) -> None:
    from ..stages.rank import rank

    if request.curve:
        from ..stages.curve import make_curve

        print(shown(str(make_curve(request))))
        if request.output is not None:
            print(shown(f"\ncurve.json and the plot are in {request.output}"))
        return
    print(shown(str(rank(request))))
    if request.output is not None:
        print(shown(f"\nscores.json and the plots are in {request.output}"))
