"""`hf-layerprune prune BASE OUTPUT`."""

from __future__ import annotations

from ..options import AMOUNTS
from ..stages.requests import PruneRequest as Request
from . import Result, suggest

HELP = "drop layers and write the remaining model"
DESCRIPTION = "Drop decoder layers of BASE and write the remaining model to OUTPUT."
EXCLUSIVE = (*AMOUNTS, "drop_layers")


def run(request: Request) -> Result:
    from dataclasses import asdict

    from ..stages.prune import prune_to

    request.refuse_unused()
    done = prune_to(request)
    follow_up = suggest("eval", request.output, "--base", request.base, "--base-revision", request.revision)
    return Result(str(done), data=asdict(done), follow_up=follow_up)
