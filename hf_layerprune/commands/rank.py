"""`hf-layerprune rank BASE [OUTPUT]`."""

from __future__ import annotations

from ..errors import shown
from ..options import AMOUNTS
from ..stages.requests import RankRequest as Request

HELP = "score every layer, and show what each criterion would drop"
DESCRIPTION = """Score the decoder layers of BASE, by one criterion or by all of them at once, and show which layers
each would drop. With OUTPUT, write scores.json and the plots there. Nothing is pruned."""
EXCLUSIVE = AMOUNTS


def run(request: Request) -> None:
    from ..stages.rank import rank

    print(shown(str(rank(request))))
    if request.output is not None:
        print(shown(f"\nscores.json and the plots are in {request.output}"))
