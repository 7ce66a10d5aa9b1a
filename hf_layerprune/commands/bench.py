"""`hf-layerprune bench MODEL`."""

from __future__ import annotations

from ..measure.requests import BenchRequest as Request
from . import Result, measurement_result

HELP = "measure speed, memory and size"
DESCRIPTION = """Time MODEL and, with --base, the dense model in alternation: prefill and decode throughput at several batch
sizes and prompt lengths, time to first token, and, in separate processes, load time and peak memory. Each number is the
median of its repeats, with the minimum and the maximum, and goes to metrics.json in the model's folder. With --engine,
measure throughput in that engine."""


def run(request: Request) -> Result:
    from ..measure.bench import bench
    from ..measure.report import report

    metrics = bench(request)
    return measurement_result(request, metrics, report(metrics, ("size", "speed", "memory")))
