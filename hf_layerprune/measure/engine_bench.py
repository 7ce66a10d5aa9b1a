"""The speed of a model in another engine than transformers, compared with its base and with theory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from ..cut.gguf import gguf_layer_count
from ..errors import CutError, LayerPruneError
from ..families import layer_count
from ..files.gguf_header import GGUFHeader, architecture_of, integer_value, read_header
from ..runtime.loading import load_config
from .cost import empty_model, share_in_use, theoretical_cost
from .engines import EngineError, EngineTimings
from .engines.llama_cpp import LlamaCpp
from .engines.vllm import Vllm
from .measurement import Measurement
from .requests import BenchRequest, Workload
from .subject import Subject

# By their names in `ENGINES`.
_ENGINES: dict[str, type[LlamaCpp | Vllm]] = {LlamaCpp.name: LlamaCpp, Vllm.name: Vllm}
_EXPERTS = re.compile(r"blk\.(\d+)\.\w+_exps\.")


class EngineBench(Measurement):
    """One run in an engine, for a model alone, or for a model and its base."""

    request: BenchRequest

    def __init__(self, request: BenchRequest) -> None:
        self.engine = _ENGINES[request.engine]()
        self.engine.refuse_unused(request)
        self.engine.check_available()  # before gigabytes are hashed
        super().__init__(request)
        self.paths = self._model_paths()

    def run(self) -> None:
        """Time the models, and record the numbers."""
        workloads = self.request.workloads
        if (most := self.engine.max_batch) is not None:
            workloads = [work for work in workloads if work.batch <= most]
            if not workloads:
                raise CutError(
                    f"{self.engine.name} is timed with up to {most} prompts at once; use batch_sizes=[{most}]"
                )
        start = perf_counter()
        timed = self._time(workloads)
        taken = perf_counter() - start
        costs = {one.weights: _cost(self.paths[one.weights]) for one in self.subjects}
        for one in self.subjects:
            cost = costs[one.weights]
            self.add_model(one, cost.layers, cost.parameters, {"dtype": timed.dtype, "device": timed.device})
        self.store.versions[self.engine.name] = timed.version
        self.machine = {"engine": self.engine.name, "weights": timed.dtype, **timed.settings}
        paths = {weights: str(path) for weights, path in self.paths.items()}
        runs = {work: {w: found[path] for w, path in paths.items()} for work, found in timed.runs.items()}
        self.record_speeds(runs, lambda weights, phase, work: costs[weights].estimate(phase, work), taken)

    def _time(self, workloads: list[Workload]) -> EngineTimings:
        where: dict[str, Any] = {"dtype": self.request.dtype, "device": self.device}
        models = [str(self.paths[one.weights]) for one in self.subjects]  # the base's first
        try:
            return self.engine.time(models, workloads, self.request.repeats, **where)
        except EngineError as error:
            failed = error
        if self.base is None:
            why = "specify its base with --base to see whether the engine knows the architecture"
        else:
            try:
                self.engine.time(models[:1], workloads, 1, **where)
                why = f"it runs {models[0]}, so it knows the architecture, and it is the cut or its file that it can't take"
            except EngineError as error:
                failed = EngineError(str(error), models[1]) if failed.model == models[0] else failed
                why = f"it does not run {models[0]} either, so it does not know the architecture"
        raise LayerPruneError(f"{self.engine.name} does not run {failed.model}: {failed}; {why}")

    def _model_paths(self) -> dict[str, Path]:
        """What the engine reads, by the hash of the weights."""
        named = dict(zip([one.weights for one in self.subjects[::-1]], self.request.gguf, strict=False))
        paths = {}
        for subject in self.subjects:
            path = named.get(subject.weights, Path(subject.source)).expanduser()
            if self.engine.runs_gguf and not path.is_file():
                raise LayerPruneError(
                    f"{self.engine.name} runs GGUF files, and {path} is not one; convert it (docs/engines.md says how), and "
                    "specify the file of MODEL, then that of BASE, each with --gguf"
                )
            if not self.engine.runs_gguf and not path.is_dir():
                raise LayerPruneError(
                    f"{self.engine.name} is timed on model folders, and {path} is not one; specify a folder"
                )
            if path != Path(subject.source):
                _check_conversion(path, subject)
            paths[subject.weights] = path
        return paths


def _check_conversion(path: Path, subject: Subject) -> None:
    """Refuse a GGUF file that can't be a conversion of the model."""
    found, model = _cost(path), _cost(Path(subject.source))
    if found.layers != model.layers or abs(found.parameters / model.parameters - 1) > 1e-3:
        raise LayerPruneError(
            f"{path} has {found.layers} layers and {found.parameters:,} parameters, and {subject.name} has "
            f"{model.layers} and {model.parameters:,}; specify the file that was made from it"
        )


class _Cost(NamedTuple):
    """The size of a model, and its theoretical cost of a workload, by `"prefill"` or `"decode"`; in any unit."""

    layers: int
    parameters: int
    estimate: Callable[[str, Workload], float | None]


def _cost(path: Path) -> _Cost:
    """Of a model folder, operations and bytes, counted on a model without weights; of a quantised one, no bytes."""
    if path.is_file():
        return _gguf_cost(path)
    import torch

    config = load_config(path)
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."), torch.float32)
    model = empty_model(config, dtype)

    def estimate(phase: str, work: Workload) -> float | None:
        quantised = getattr(config, "quantization_config", None)
        return None if phase == "decode" and quantised else theoretical_cost(model, phase, work)

    return _Cost(layer_count(config), model.num_parameters(), estimate)


def _gguf_cost(path: Path) -> _Cost:
    """The layers' parameters per prompt token, and the bytes per generated token; of experts, those in use."""
    header = read_header(path)
    shares = _expert_shares(header)
    sizes = {tensor.name: math.prod(tensor.dimensions) for tensor in header.tensors}
    tied = "output.weight" not in sizes
    layers = {name: float(size) for name, size in sizes.items() if name.startswith("blk.")}
    read = {one.name: float(one.size) for one in header.tensors if tied or one.name != "token_embd.weight"}

    def estimate(kind: str, work: Workload) -> float:
        counted, batch = (read, work.batch) if kind == "decode" else (layers, 1)
        return sum(size * share_in_use(shares.get(name, 1), batch) for name, size in counted.items())

    return _Cost(gguf_layer_count(path), sum(sizes.values()), estimate)


def _expert_shares(header: GGUFHeader) -> dict[str, float]:
    """The share of the experts that a token uses, by each tensor that holds the weights of several."""
    architecture = architecture_of(header)
    used, experts = (header.keys.get(f"{architecture}.expert_{name}") for name in ("used_count", "count"))
    if used is None or experts is None:
        return {}
    total, shares = max(integer_value(header, experts), 1), {}
    for tensor in header.tensors:
        if found := _EXPERTS.match(tensor.name):
            layer = int(found[1]) if used.is_array else 0  # one number for all layers, or one for each
            if layer < len(used.values):
                shares[tensor.name] = min(used.values[layer] / total, 1)
    return shares
