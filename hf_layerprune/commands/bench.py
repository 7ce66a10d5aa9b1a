"""`hf-layerprune bench MODEL`."""

from __future__ import annotations

import argparse

from ..errors import shown
from ..measure.requests import BenchRequest
from ..options import add, gather

HELP = "measure speed, memory and size"
DESCRIPTION = """Time MODEL, and with --base the dense model beside it, in turns: prefill and decode throughput at several
batch sizes and prompt lengths, time to first token, and load time and peak memory in processes of their own. Each
number is the median of its repeats, with the lowest and the highest, and goes to metrics.json in the model's folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, BenchRequest)


def run(args: argparse.Namespace) -> None:
    """Measure."""
    from ..measure.bench import bench
    from ..measure.report import report

    print(shown(report(bench(gather(args, BenchRequest)), ("size", "speed", "memory"))))
