"""What `eval` and `bench` share: the models of a request, the file for the numbers, and how a number is recorded."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import LayerPruneError
from ..families import layer_count
from ..records.figures.metric_names import BYTES, SECONDS, metric_named
from .paired import PairedDifference, require_statistics
from .requests import BenchRequest, EvalRequest
from .store import Store
from .subject import Subject, describe, identify, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = {BYTES: "B", SECONDS: "s"}


class Measurement:
    """A model, its base if there is one, and the store for their numbers. No model is loaded yet.

    Args:
        request (`EvalRequest` or `BenchRequest`): What to measure.

    Raises:
        CheckpointError: A model can't be read, or existing numbers belong to another one.
        LayerPruneError: Model and base are the same, or the numbers can't be written.
    """

    def __init__(self, request: EvalRequest | BenchRequest) -> None:
        if request.base is not None:
            require_statistics()
        self.model = identify(request.model, request.revision)
        self.base = identify(request.base, request.base_revision) if request.base is not None else None
        self.store = Store.open(
            self.model, self.base, output=request.output, history=request.history, force=request.force
        )
        if self.base is not None and self.base.weights == self.model.weights:
            raise LayerPruneError(f"{request.model} and {request.base} have the same weights; name another base")
        self.where: dict[str, dict[str, str]] = {}
        self._dtype, self.device = request.dtype, pick_device(request.device)

    def load(self, subject: Subject) -> PreTrainedModel:
        """Load the model or its base, and record that it is measured."""
        model = subject.load(self._dtype, self.device)
        self.where[subject.weights] = describe(model)
        role = "dense" if subject is self.base and subject.role == "model" else subject.role
        parameters = model.num_parameters()  # also of packed weights
        self.store.add_model(subject, role=role, layers=layer_count(model.config), parameters=parameters)
        return model

    def result(
        self, weights: str, kind: str, metric: str, value: float, settings: dict[str, Any], **more: Any
    ) -> dict[str, Any]:
        """A number, measured with some settings on the weights of a hash, as a record of `metrics.json`."""
        known = metric_named(metric, kind)
        return {
            "weights": weights,
            "kind": kind,
            "metric": metric,
            "value": value,
            "unit": _UNITS.get(known.unit) or known.label.partition(", ")[2] or None,
            "higher_is_better": known.higher_is_better,
            "settings": settings,
            **more,
            **self.where[weights],
        }

    def compare(
        self, kind: str, metric: str, settings: dict[str, Any], difference: PairedDifference, **more: Any
    ) -> None:
        """Record a difference from the base, if there is one."""
        if self.base is None:
            return
        record = {"weights": self.model.weights, "base": self.base.weights, "kind": kind, "metric": metric}
        self.store.add(comparisons=[record | {"settings": settings} | asdict(difference) | more])
