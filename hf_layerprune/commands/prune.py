"""`hf-layerprune prune BASE OUTPUT`."""

from __future__ import annotations

from ..errors import shown
from ..options import AMOUNTS
from ..stages.requests import PruneRequest as Request

HELP = "drop layers and write the model that is left"
DESCRIPTION = "Drop decoder layers of BASE and write the model that is left to OUTPUT."
EXCLUSIVE = (*AMOUNTS, "drop_layers")


def run(request: Request) -> None:
    from ..stages.prune import prune_to

    print(shown(str(prune_to(request))))
