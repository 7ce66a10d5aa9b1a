"""`hf-layerprune inspect MODEL`."""

from __future__ import annotations

from ..errors import shown
from ..stages.requests import InspectRequest as Request

HELP = "show what a model is made of"
DESCRIPTION = "Show layers, parameters by part, and what a cut would leave. No weight is loaded."


def run(request: Request) -> None:
    from ..stages.inspect import inspect_model

    print(shown(inspect_model(request)))
