"""The cost of a model: size, load time, speed and memory, compared with its base and with theory.

metrics = bench(BenchRequest("pruned", base="org/base"))
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from ..errors import CutError, LayerPruneError, boundary
from ..records.metrics import Metrics
from ..runtime.windows import max_positions
from ..screen import progress_bar
from .cost import active_parameters, cache_bytes, theoretical_cost
from .engine_bench import EngineBench
from .measurement import Measurement
from .paired import compare_values, in_turns
from .probe import probe
from .requests import BenchRequest, Workload
from .speed import time_models

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bench(request: BenchRequest) -> Metrics:
    """Measure size, speed and memory of a model and its base; the two are timed in turns.

    The numbers that the file already had are returned as well.

    Raises:
        CheckpointError: A model can't be read, or existing numbers belong to other weights.
        LayerPruneError: A setting is invalid, a model does not fit into memory, or the engine is not installed or does not
            run a model.
    """
    run = _Bench(request) if request.engine == "transformers" else EngineBench(request)
    run.run()
    return run.store.metrics


class _Bench(Measurement):
    """One run for a model alone, or for a model and its base."""

    request: BenchRequest

    def __init__(self, request: BenchRequest) -> None:
        super().__init__(request)
        self.machine = {"threads": torch.get_num_threads()} if self.device == "cpu" else {}
        longest = max(request.prompt_lengths) + request.new_tokens
        for subject in self.subjects:
            if (most := max_positions(subject.config())) is not None and longest > most:
                raise CutError(
                    f"{subject.name} has a context of {most} tokens, but prompts with new tokens are {longest} long; "
                    "use shorter prompt_lengths or fewer new_tokens"
                )

    def run(self) -> None:
        """Measure everything, starting with the probes, for which no other model may be in memory."""
        request = self.request
        probes = self._probe()
        models = {subject.weights: self.load(subject) for subject in self.subjects}
        self._record_size(models)
        if probes:
            self._record_probes(probes, models)
        start = perf_counter()
        with boundary("the models can't be timed", kind=LayerPruneError):
            timed = time_models(models, request.workloads, repeats=request.repeats)
        taken = perf_counter() - start
        self.record_speeds(timed, lambda weights, phase, work: theoretical_cost(models[weights], phase, work), taken)

    @property
    def _largest_workload(self) -> Workload:
        """The workload whose memory is measured."""
        return Workload(max(self.request.batch_sizes), max(self.request.prompt_lengths), self.request.new_tokens)

    def _probe(self) -> dict[str, list[dict[str, float]]]:
        """Load each model in fresh processes, in turns; the first one fills the file cache and is not counted."""
        rounds = self.request.load_repeats + 1 if self.request.load_repeats else 0
        probes: dict[str, list[dict[str, float]]] = {subject.weights: [] for subject in self.subjects}
        total = rounds * len(self.subjects)
        with progress_bar(total=total, desc="loading", unit="process") as bar:
            for subject in in_turns(self.subjects, rounds):
                loaded = (subject.source, subject.revision, self.request.dtype, self.device)
                probes[subject.weights].append(probe(*loaded, self._largest_workload))
                bar.update()
        return {weights: runs[1:] for weights, runs in probes.items()} if rounds else {}

    def _record_probes(self, probes: dict[str, list[dict[str, float]]], models: Mapping[str, PreTrainedModel]) -> None:
        weights = {w: float(model.get_memory_footprint(return_buffers=False)) for w, model in models.items()}
        # Python and its libraries take the same memory for every model.
        idle = statistics.median(one["idle_rss_bytes"] for runs in probes.values() for one in runs)
        resident = {w: idle + size for w, size in weights.items()}
        work = asdict(self._largest_workload)
        for kind, metric, settings, cost in (
            ("speed", "load_seconds", {"cache": "warm"}, weights),
            ("memory", "peak_rss_bytes", work, resident),
            ("memory", "peak_cuda_bytes", work, weights),
        ):
            if all(metric in one for runs in probes.values() for one in runs):
                values = {w: [float(one[metric]) for one in runs] for w, runs in probes.items()}
                self.record(kind, metric, settings, values, cost)

    def _record_size(self, models: Mapping[str, PreTrainedModel]) -> None:
        total = {w: model.num_parameters() for w, model in models.items()}
        active = {w: active_parameters(model) for w, model in models.items()}
        for kind, metric, sizes in (
            ("size", "parameters", total),
            ("size", "active_parameters", active if active != total else {}),
            ("size", "bytes_on_disk", {subject.weights: subject.bytes_on_disk for subject in self.subjects}),
            ("memory", "kv_cache_bytes_per_token", {w: cache_bytes(model) for w, model in models.items()}),
        ):
            values = {w: size for w, size in sizes.items() if size}
            self.store.add(results=[self.result(w, kind, metric, value, {}) for w, value in values.items()])
            if self.base is not None and len(values) == 2:
                difference = compare_values(values[self.model.weights], values[self.base.weights])
                self.compare(kind, metric, {}, difference)
