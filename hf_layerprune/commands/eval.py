"""`hf-layerprune eval MODEL`."""

from __future__ import annotations

from ..measure.requests import EvalRequest as Request
from . import Result, measurement_result

HELP = "measure accuracy, perplexity, and the distance to the dense model"
DESCRIPTION = """Measure MODEL: zero-shot accuracy by lm-evaluation-harness, perplexity, and, with --base, how far it is
from the dense model. The numbers go to metrics.json in the model's folder, each with the hash of the weights that it
was measured on. Without --tasks, --tasks-from and --text, it measures the paper's eight tasks and WikiText-2. With
--require, the exit code is 1 if a number misses its bound; push then refuses the model."""


def run(request: Request) -> Result:
    from ..measure.evaluate import evaluate
    from ..measure.report import report

    metrics = evaluate(request)
    missed = [str(outcome.bound) for outcome in metrics.outcomes if not outcome.met] if request.require else []
    return measurement_result(request, metrics, report(metrics), missed)
