"""`hf-layerprune inspect MODEL`."""

from __future__ import annotations

from ..stages.requests import InspectRequest as Request
from . import Answer, hint

HELP = "show what a model is made of"
DESCRIPTION = "Show layers, parameters by part, and what a cut would leave. No weights are loaded."


def run(request: Request) -> Answer:
    from dataclasses import asdict

    from ..stages.inspect import inspect_model, report

    anatomy = inspect_model(request)
    then = (
        hint("rank", request.model, "curve", "--curve", "--revision", request.revision)
        if anatomy.refusal is None and "rank" not in anatomy.refused_at
        else ()
    )
    text = report(request.model, anatomy, request.drop)
    return Answer(text=text, data=asdict(anatomy) | {"parameters": anatomy.total}, then=then)
