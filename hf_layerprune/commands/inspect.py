"""`hf-layerprune inspect MODEL`."""

from __future__ import annotations

from ..layer_ranges import format_layers
from ..options import option_flags, spell_options
from ..records.names import is_gguf_name
from ..stages.requests import InspectRequest as Request
from . import Result, suggest

HELP = "show what a model is made of"
DESCRIPTION = "Show layers, parameters by part, and what a cut would leave. No weights are loaded."
EXCLUSIVE = ("drop", "drop_layers")


def run(request: Request) -> Result:
    from dataclasses import asdict

    from ..stages.inspect import inspect_model, report

    anatomy = inspect_model(request)
    follow_up: tuple[str, ...] = ()
    if anatomy.refusal is None and request.drop_layers is not None:
        layers, stays_gguf = format_layers(anatomy.dropped), is_gguf_name(request.model) and anatomy.file_bytes
        output = "pruned.gguf" if stays_gguf else "pruned"
        follow_up = suggest("prune", request.model, output, "--drop-layers", layers, "--revision", request.revision)
    elif anatomy.refusal is None and "rank" not in anatomy.refused_at:
        follow_up = suggest("rank", request.model, "curve", "--curve", "--revision", request.revision)
    drop = None if request.drop_layers is not None else request.drop
    text = spell_options(report(request.model, anatomy, drop), option_flags(Request))
    return Result(text=text, data=asdict(anatomy) | {"parameters": anatomy.total}, follow_up=follow_up)
