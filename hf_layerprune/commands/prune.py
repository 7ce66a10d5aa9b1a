"""`hf-layerprune prune BASE OUTPUT`."""

from __future__ import annotations

from ..options import AMOUNTS
from ..stages.requests import PruneRequest as Request
from . import Answer, hint

HELP = "drop layers and write the remaining model"
DESCRIPTION = "Drop decoder layers of BASE and write the remaining model to OUTPUT."
EXCLUSIVE = (*AMOUNTS, "drop_layers")


def run(request: Request) -> Answer:
    from dataclasses import asdict

    from ..stages.prune import prune_to

    request.refuse_unused()
    done = prune_to(request)
    then = hint("eval", request.output, "--base", request.base, "--base-revision", request.revision)
    return Answer(str(done), data=asdict(done), then=then)
