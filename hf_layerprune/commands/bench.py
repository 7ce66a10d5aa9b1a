"""`hf-layerprune bench MODEL`."""

from __future__ import annotations

from ..errors import shown
from ..measure.requests import BenchRequest as Request

HELP = "measure speed, memory and size"
DESCRIPTION = """Time MODEL, and with --base the dense model beside it, in turns: prefill and decode throughput at several
batch sizes and prompt lengths, time to first token, and load time and peak memory in processes of their own. Each
number is the median of its repeats, with the lowest and the highest, and goes to metrics.json in the model's folder."""


def run(request: Request) -> None:
    from ..measure.bench import bench
    from ..measure.report import report

    print(shown(report(bench(request), ("size", "speed", "memory"))))
