"""`hf-layerprune inspect MODEL`."""

from __future__ import annotations

from ..options import option_flags, spell_options
from ..stages.requests import InspectRequest as Request
from . import Result, suggest

HELP = "show what a model is made of"
DESCRIPTION = "Show layers, parameters by part, and what a cut would leave. No weights are loaded."


def run(request: Request) -> Result:
    from dataclasses import asdict

    from ..stages.inspect import inspect_model, report

    anatomy = inspect_model(request)
    follow_up = (
        suggest("rank", request.model, "curve", "--curve", "--revision", request.revision)
        if anatomy.refusal is None and "rank" not in anatomy.refused_at
        else ()
    )
    text = spell_options(report(request.model, anatomy, request.drop), option_flags(Request))
    return Result(text=text, data=asdict(anatomy) | {"parameters": anatomy.total}, follow_up=follow_up)
