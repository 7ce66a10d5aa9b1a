"""`hf-layerprune inspect MODEL`."""

from __future__ import annotations

import argparse

from ..errors import shown
from ..options import add, gather
from ..stages.requests import InspectRequest

HELP = "show what a model is made of"
DESCRIPTION = "Show layers, parameters by part, and what a cut would leave. No weight is loaded."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, InspectRequest)


def run(args: argparse.Namespace) -> None:
    """Inspect."""
    from ..stages.inspect import inspect_model

    print(shown(inspect_model(gather(args, InspectRequest))))
