"""The cost of a model: size, load time, speed and memory, compared with its base and with theory.

metrics = bench(BenchRequest("pruned", base="org/base"))
"""

from __future__ import annotations

import logging
import statistics
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import LayerPruneError, boundary
from ..records.metrics import Metrics
from .cost import cache_bytes, decode_bytes, prefill_flops
from .opening import open_measurement
from .paired import compare_values, compare_windows
from .probe import Probe, Probed, probe
from .requests import BenchRequest
from .speed import Repeats, Timing, Workload, time_models
from .store import Store, now
from .subject import Subject, describe_device, describe_dtype, pick_device

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_UNITS = {
    "prefill_tokens_per_second": "tokens/s",
    "decode_tokens_per_second": "tokens/s",
    "time_to_first_token": "s",
    "load_seconds": "s",
    "peak_rss_bytes": "B",
    "peak_cuda_bytes": "B",
    "bytes_on_disk": "B",
    "kv_cache_bytes_per_token": "B",
}


def bench(request: BenchRequest) -> Metrics:
    """Measure size, speed and memory of a model and its base; the two are timed in turns.

    Args:
        request (`BenchRequest`): What to measure.

    Returns:
        `Metrics`: The numbers, including those that the file already had.

    Raises:
        CheckpointError: A model can't be read, or existing numbers belong to other weights.
        LayerPruneError: A setting is invalid, or a model does not fit into memory.
    """
    model, base, store = open_measurement(request)
    _Bench(request, store, [one for one in (base, model) if one is not None]).run()
    return store.metrics


def _workloads(request: BenchRequest) -> list[Workload]:
    """All combinations of batch size and prompt length."""
    return [
        Workload(batch, length, request.new_tokens)
        for batch in request.batch_sizes
        for length in request.prompt_lengths
    ]


class _Bench:
    """One run for a model alone, or for a model and its base."""

    def __init__(self, request: BenchRequest, store: Store, subjects: list[Subject]) -> None:
        self.request, self.store, self.subjects = request, store, subjects
        self.model, self.base = subjects[-1], subjects[0] if len(subjects) > 1 else None
        self.where: dict[str, dict[str, str]] = {}

    def run(self) -> None:
        """Measure everything, starting with the probes, for which no other model may be in memory."""
        probes = self._probe()
        live = {subject.weights: self._load(subject) for subject in self.subjects}
        self._record_size(live)
        if probes:
            self._record_probes(probes, live)
        start = perf_counter()
        with boundary("the models can't be timed", kind=LayerPruneError):
            timed = time_models(
                live, _workloads(self.request), repeats=self.request.repeats, progress=self.request.progress
            )
        seconds = (perf_counter() - start) / max(1, len(timed))
        for work, timings in timed.items():
            self._record_timings(work, timings, live, seconds)

    def _load(self, subject: Subject) -> PreTrainedModel:
        model = subject.load(self.request.dtype, self.request.device)
        self.where[subject.weights] = {"dtype": describe_dtype(model), "device": describe_device(model)}
        most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        longest = max(self.request.prompt_lengths) + self.request.new_tokens
        if most is not None and longest > most:
            raise LayerPruneError(
                f"{subject.name} has a context of {most} tokens, but prompts with new tokens are {longest} long; "
                "use shorter --prompt-lengths or fewer --new-tokens"
            )
        self.store.add_model(subject, model)
        return model

    # --- each in its own process ------------------------------------------------------------------------------

    def _probe(self) -> dict[str, list[Probed]]:
        """Load each model in fresh processes, in turns; the first one fills the file cache and is not counted."""
        request, device = self.request, pick_device(self.request.device)
        if not request.load_repeats:
            return {}
        probes: dict[str, list[Probed]] = {subject.weights: [] for subject in self.subjects}
        total = (request.load_repeats + 1) * len(self.subjects)
        with tqdm(total=total, desc="loading", unit="process", disable=not request.progress) as bar:
            for repeat in range(request.load_repeats + 1):
                for subject in self.subjects if repeat % 2 else self.subjects[::-1]:
                    what = Probe(
                        subject.source,
                        subject.revision,
                        request.dtype,
                        device,
                        max(request.batch_sizes),
                        max(request.prompt_lengths),
                        request.new_tokens,
                    )
                    probes[subject.weights].append(probe(what))
                    bar.update()
        return {weights: probed[1:] for weights, probed in probes.items()}

    def _record_probes(self, probes: dict[str, list[Probed]], live: dict[str, PreTrainedModel]) -> None:
        work = Workload(max(self.request.batch_sizes), max(self.request.prompt_lengths), self.request.new_tokens)
        weights_bytes = {weights: float(_weight_bytes(model)) for weights, model in live.items()}
        # Python and its libraries take the same memory for every model.
        idle = statistics.median(one.idle_rss_bytes for probed in probes.values() for one in probed)
        costs: dict[str, tuple[str, dict[str, Any], dict[str, float]]] = {
            "load_seconds": ("speed", {"cache": "warm"}, weights_bytes),
            "peak_rss_bytes": ("memory", _settings(work), {w: idle + size for w, size in weights_bytes.items()}),
            "peak_cuda_bytes": ("memory", _settings(work), weights_bytes),
        }
        for metric, (kind, settings, cost) in costs.items():
            values = {weights: [getattr(one, metric) for one in probed] for weights, probed in probes.items()}
            if not any(None in one for one in values.values()):
                self._record(kind, metric, settings, {w: tuple(map(float, one)) for w, one in values.items()}, cost)

    # --- side by side ---------------------------------------------------------------------------------------

    def _record_size(self, live: dict[str, PreTrainedModel]) -> None:
        records = []
        for subject in self.subjects:
            model = live[subject.weights]
            sizes = {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "bytes_on_disk": subject.bytes_on_disk,
                "kv_cache_bytes_per_token": cache_bytes(model),
            }
            for metric, value in sizes.items():
                kind = "memory" if metric.startswith("kv") else "size"
                if value:
                    records.append(self._result(subject.weights, kind, metric, value, {}))
        self.store.add(results=records)
        if self.base is None:
            return
        values = {(one["weights"], one["metric"]): one for one in records}
        for (weights, metric), ours in values.items():
            theirs = values.get((self.base.weights, metric))
            if weights == self.model.weights and theirs is not None:
                self._add_comparison(ours["kind"], metric, {}, compare_values(ours["value"], theirs["value"]).fields())

    def _record_timings(
        self,
        work: Workload,
        timings: dict[str, list[Timing]],
        live: dict[str, PreTrainedModel],
        seconds: float,
    ) -> None:
        flops = {w: float(prefill_flops(model, work.batch, work.prompt_tokens)) for w, model in live.items()}
        held = work.prompt_tokens + work.new_tokens // 2
        bytes_ = {w: decode_bytes(model, work.batch, held) for w, model in live.items()}
        per_run = {w: [timing.metrics(work) for timing in runs] for w, runs in timings.items()}
        for metric in per_run[self.model.weights][0]:
            values = {w: tuple(run[metric] for run in runs) for w, runs in per_run.items()}
            cost = bytes_ if metric.startswith("decode") else flops
            self._record("speed", metric, _settings(work), values, cost, round(seconds, 3))

    # --- records --------------------------------------------------------------------------------------------

    def _record(
        self,
        kind: str,
        metric: str,
        settings: dict[str, Any],
        values: dict[str, tuple[float, ...]],
        cost: dict[str, float],
        seconds: float | None = None,
    ) -> None:
        """Record a number that was measured several times, and its comparison with the base.

        Args:
            kind (`str`): Its kind.
            metric (`str`): Its name.
            settings (`dict[str, Any]`): The workload.
            values (`dict[str, tuple[float, ...]]`): One value per repeat, by weights.
            cost (`dict[str, float]`): The theoretical cost that it is proportional to, by weights.
            seconds (`float`, *optional*): The duration of the measurement.
        """
        records = []
        for weights, numbers in values.items():
            repeats = Repeats(numbers)
            record = self._result(weights, kind, metric, repeats.median, settings)
            record |= {"spread": list(repeats.spread), "samples": len(numbers), "seconds": seconds}
            records.append(record)
        self.store.add(results=records)
        if self.base is None:
            return
        ours, theirs = values[self.model.weights], values[self.base.weights]
        # The ratio of two runs that follow each other is not affected by whatever slowed down both.
        fields = compare_windows(ours, theirs).fields()
        fields["share"] = statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
        kept = cost[self.model.weights] / cost[self.base.weights]
        fields["theoretical_share"] = 1 / kept if metric.endswith("per_second") else kept
        self._add_comparison(kind, metric, settings, fields)

    def _result(self, weights: str, kind: str, metric: str, value: float, settings: dict[str, Any]) -> dict[str, Any]:
        where = dict(self.where[weights])
        if kind in ("speed", "memory") and metric != "kv_cache_bytes_per_token":
            settings = settings | self._machine()
        return {
            "weights": weights,
            "kind": kind,
            "metric": metric,
            "value": value,
            "unit": _UNITS.get(metric),
            "higher_is_better": metric.endswith("per_second"),
            "settings": settings,
            **where,
        }

    def _machine(self) -> dict[str, Any]:
        return {"threads": torch.get_num_threads()} if pick_device(self.request.device) == "cpu" else {}

    @property
    def _dense(self) -> Subject:
        assert self.base is not None, "there is a base where two models are compared"
        return self.base

    def _add_comparison(self, kind: str, metric: str, settings: dict[str, Any], fields: dict[str, Any]) -> None:
        if kind in ("speed", "memory") and metric != "kv_cache_bytes_per_token":
            settings = settings | self._machine()
        record = {"weights": self.model.weights, "base": self._dense.weights, "kind": kind, "metric": metric}
        self.store.add(comparisons=[record | {"settings": settings, **fields, "date": now()}])


def _settings(work: Workload) -> dict[str, int]:
    return {"batch": work.batch, "prompt_tokens": work.prompt_tokens, "new_tokens": work.new_tokens}


def _weight_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
