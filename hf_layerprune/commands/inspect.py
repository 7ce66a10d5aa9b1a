"""`hf-layerprune inspect MODEL`."""

from __future__ import annotations

import argparse

from . import options

HELP = "show what a model is made of"
DESCRIPTION = "Show layers, parameters by part, and what a cut would leave. No weight is loaded."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help=options.BASE_HELP)
    parser.add_argument("--drop", type=options.drop, default=0.25, metavar="D", help="the cut to try out (0.25)")
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")


def run(args: argparse.Namespace) -> None:
    """Inspect."""
    from ..runtime.loading import load_config
    from ..stages.inspect import inspect_config, report

    config = load_config(args.model, revision=args.revision)
    print(report(args.model, inspect_config(config), args.drop))
