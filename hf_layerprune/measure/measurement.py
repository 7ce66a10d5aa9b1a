"""What `eval` and `bench` share: the models of a request, the file for the numbers, and how a number is recorded."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import LayerPruneError
from ..families import layer_count
from ..records.figures.metric_names import BYTES, SECONDS, get_metric
from ..runtime.devices import pick_device
from .paired import PairedDifference, compare_pairs, require_scipy
from .requests import BenchRequest, EvalRequest, Workload
from .store import Store, check_output
from .subject import Subject, describe_placement, identify

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {BYTES: "B", SECONDS: "s"}


class Measurement:
    """A model, its base if there is one, and the store for their numbers. No model is loaded yet.

    Raises:
        CheckpointError: A model can't be read, or existing numbers belong to another one.
        LayerPruneError: Model and base are the same, or the numbers can't be written.
    """

    # Whether layers may be read from disk each time they run; not where time or memory is measured.
    may_stay_on_disk = False

    def __init__(self, request: EvalRequest | BenchRequest) -> None:
        if request.output is not None:  # before weights are hashed
            check_output(request.output, str(request.model), request.base)
        if request.base is not None:
            require_scipy()
        self.model = identify(request.model, request.revision)
        self.base = identify(request.base, request.base_revision) if request.base is not None else None
        self.subjects = [one for one in (self.base, self.model) if one is not None]
        if self.base is not None and self.model.weights in self.base.known_weights:
            same = self.base.weights == self.model.weights
            what = "has the same weights as" if same else "was made from"
            raise LayerPruneError(f"{request.base} {what} {request.model}; specify the dense model as the base")
        self.store = Store(self.model, self.base, output=request.output, history=request.history, force=request.force)
        self.placements: dict[str, dict[str, str]] = {}
        self.machine: dict[str, Any] = {}  # what else decides a speed
        self.request, self.device = request, pick_device(request.device, spread=True)

    def load(self, subject: Subject) -> PreTrainedModel:
        """Load the model or its base, and record that it is measured."""
        model = subject.load(self.request.dtype, self.device, mapped=self.may_stay_on_disk)
        # `num_parameters` also counts packed weights.
        self.add_model(subject, layer_count(model.config), model.num_parameters(), describe_placement(model))
        return model

    def add_model(self, subject: Subject, layers: int, parameters: int, placement: dict[str, str]) -> None:
        """Record the model or its base, which is measured in the data type and on the device of its placement."""
        self.placements[subject.weights] = placement
        role = "dense" if subject is self.base and subject.role == "model" else subject.role
        self.store.new.add_model(subject.identity, role=role, name=subject.name, layers=layers, parameters=parameters)

    def result(
        self, weights: str, kind: str, metric: str, value: float, settings: dict[str, Any], **details: Any
    ) -> dict[str, Any]:
        """A number, measured with some settings on the weights of a hash, as a record of `metrics.json`."""
        known = get_metric(metric, kind)
        return {
            "weights": weights,
            "kind": kind,
            "metric": metric,
            "value": value,
            "unit": _UNITS.get(known.unit) or known.label.partition(", ")[2] or None,
            "higher_is_better": known.higher_is_better,
            "settings": settings,
            **details,
            **self.placements[weights],
        }

    def compare(
        self, kind: str, metric: str, settings: dict[str, Any], difference: PairedDifference, **details: Any
    ) -> None:
        """Record a difference from the base, if there is one."""
        if self.base is None:
            return
        record = {"weights": self.model.weights, "base": self.base.weights, "kind": kind, "metric": metric}
        self.store.add(comparisons=[record | {"settings": settings} | asdict(difference) | details])

    def record_speeds(
        self,
        timed: Mapping[Workload, Mapping[str, Sequence[Mapping[str, float]]]],
        theory: Callable[[str, str, Workload], float | None],
        taken: float,
    ) -> None:
        """Record the runs of workloads: the metrics of each, by the hash of the weights. They took so many seconds in all.

        `theory` is the cost of a workload in any unit, for the hash of the weights and `"prefill"` or `"decode"`.
        """
        seconds = round(taken / max(1, len(timed)), 3)
        for work, runs in timed.items():
            costs = {
                phase: {weights: theory(weights, phase, work) for weights in runs} for phase in ("prefill", "decode")
            }
            for metric in runs[self.model.weights][0]:
                values = {weights: [run[metric] for run in repeats] for weights, repeats in runs.items()}
                phase = "decode" if metric.startswith("decode") else "prefill"
                self.record("speed", metric, asdict(work), values, costs[phase], seconds)

    def record(
        self,
        kind: str,
        metric: str,
        settings: dict[str, Any],
        values: Mapping[str, Sequence[float]],
        cost: Mapping[str, float | None],
        seconds: float | None = None,
    ) -> None:
        """Record what was measured several times, and its comparison with the base and the cost that theory names.

        The repeats, and the costs in any unit (`None` if not known), are by the hash of the weights. `machine` is added
        to the settings.
        """
        settings = settings | self.machine
        results = []
        for weights, repeats in values.items():
            details = {"spread": [min(repeats), max(repeats)], "samples": len(repeats), "seconds": seconds}
            results.append(self.result(weights, kind, metric, statistics.median(repeats), settings, **details))
        self.store.add(results=results)
        if self.base is None:
            return
        ours, theirs = values[self.model.weights], values[self.base.weights]
        # The ratio of two runs that follow each other is not affected by whatever slowed down both.
        share = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        shares = {"share": share}
        mine, dense = cost[self.model.weights], cost[self.base.weights]
        if mine and dense:
            shares["theoretical_share"] = dense / mine if metric.endswith("per_second") else mine / dense
        self.compare(kind, metric, settings, compare_pairs(ours, theirs), **shares)
