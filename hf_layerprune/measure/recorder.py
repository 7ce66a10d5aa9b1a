"""What timing a model in transformers and in other engines share: how repeats become a record."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .measurement import Measurement
from .paired import compare_pairs
from .requests import BenchRequest
from .workload import Workload


class Recorder(Measurement):
    """A model, and its base if there is one, and the numbers that were measured on both in turns.

    Args:
        request (`BenchRequest`): What to measure.

    Raises:
        CheckpointError: A model can't be read, or existing numbers belong to another one.
        LayerPruneError: Model and base are the same, or the numbers can't be written.
    """

    def __init__(self, request: BenchRequest) -> None:
        super().__init__(request)
        self.request = request
        self.subjects = [one for one in (self.base, self.model) if one is not None]
        self.machine: dict[str, Any] = {}

    @property
    def workloads(self) -> list[Workload]:
        """What is timed."""
        request = self.request
        return [
            Workload(n, length, request.new_tokens) for n in request.batch_sizes for length in request.prompt_lengths
        ]

    def record(
        self,
        kind: str,
        metric: str,
        settings: dict[str, Any],
        values: Mapping[str, Sequence[float]],
        cost: Mapping[str, float],
        seconds: float | None = None,
    ) -> None:
        """Record what was measured several times, and its comparison with the base and the cost that theory names.

        Args:
            kind (`str`): As in `metrics.json`.
            metric (`str`): As in `metrics.json`.
            settings (`dict[str, Any]`): How it was measured.
            values (`Mapping[str, Sequence[float]]`): The repeats, by the hash of the weights.
            cost (`Mapping[str, float]`): What theory says it takes, by the hash of the weights; any unit.
            seconds (`float`, *optional*): What the measurement took.
        """
        settings = settings | self.machine
        results = []
        for weights, repeats in values.items():
            more = {"spread": [min(repeats), max(repeats)], "samples": len(repeats), "seconds": seconds}
            results.append(self.result(weights, kind, metric, statistics.median(repeats), settings, **more))
        self.store.add(results=results)
        if self.base is None:
            return
        ours, theirs = values[self.model.weights], values[self.base.weights]
        # The ratio of two runs that follow each other is not affected by whatever slowed down both.
        share = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        theory = cost[self.model.weights] / cost[self.base.weights]
        theory = 1 / theory if metric.endswith("per_second") else theory
        difference = compare_pairs(ours, theirs)
        self.compare(kind, metric, settings, difference, share=share, theoretical_share=theory)
