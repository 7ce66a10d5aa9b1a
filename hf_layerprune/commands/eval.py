"""`hf-layerprune eval MODEL`."""

from __future__ import annotations

import argparse

from ..errors import shown
from ..measure.requests import EvalRequest
from ..options import add, gather

HELP = "measure accuracy, perplexity, and the distance to the dense model"
DESCRIPTION = """Measure MODEL: zero-shot accuracy by lm-evaluation-harness, perplexity, and, with --base, how far it is
from the dense model. The numbers go to metrics.json in the model's folder, each with the hash of the weights that it
was measured on. Without --tasks, --tasks-from and --text, it is the paper's eight tasks and WikiText-2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, EvalRequest)


def run(args: argparse.Namespace) -> None:
    """Measure."""
    from ..measure.evaluate import evaluate
    from ..measure.report import report

    print(shown(report(evaluate(gather(args, EvalRequest)))))
