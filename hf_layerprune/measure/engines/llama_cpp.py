"""llama.cpp, through its own `llama-bench`."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from ...errors import CutError, LayerPruneError
from ...options import refuse_unused
from ...screen import progress_bar
from ..paired import in_turns
from ..requests import BenchRequest, Workload
from . import EngineError, EngineTimings

_PROGRAM = "llama-bench"
# What stands before the type in "llama 256M Q4_0", "llama ?B (guessed) all F32", "llama4 17Bx16E (Scout) Q4_K - Medium".
_SIZE = re.compile(r"^\S+ \S+ (\(\w+\) )*")


class LlamaCpp:
    """Times GGUF files. It reads one prompt at a time."""

    name = "llama.cpp"
    runs_gguf = True
    max_batch: int | None = 1

    def check_available(self) -> None:
        """Refuse to start if `llama-bench` is not on the PATH."""
        if shutil.which(_PROGRAM) is None:
            raise LayerPruneError(
                f"llama.cpp's {_PROGRAM} is not on the PATH; install it: brew install llama.cpp, winget install "
                "llama.cpp, or a build from https://github.com/ggml-org/llama.cpp/releases"
            )

    def refuse_unused(self, request: BenchRequest) -> None:
        """Refuse options that llama-bench does not get: a data type, since the file has its own, and one of several GPUs."""
        refuse_unused(request, ("dtype",), "in llama.cpp, which runs a GGUF file in the types that it has")
        if ":" in request.device:
            raise CutError(
                f"llama.cpp runs on the CPU or on all GPUs, and not on one alone; leave device={request.device!r} out, or "
                "hide GPUs with CUDA_VISIBLE_DEVICES"
            )

    def time(
        self, models: Sequence[str], works: Sequence[Workload], repeats: int, *, dtype: str, device: str
    ) -> EngineTimings:
        """Time GGUF files, given by their paths, in turns, each run in a process of its own.

        The weights have the type of the file, whatever `dtype` says.

        Raises:
            EngineError: The engine does not run one of them.
        """
        runs: dict[Workload, dict[str, list[dict[str, float]]]] = {w: {m: [] for m in models} for w in works}
        last: dict[str, Any] = {}
        with progress_bar(total=repeats * len(models), desc="timing", unit="run") as bar:
            for model in in_turns(models, repeats):
                metrics, last = self._time_model(model, works, device)
                for work, found in metrics.items():
                    runs[work][model].append(found)
                bar.update()
        on = str(last.get("gpu_info") or "") if device != "cpu" else ""
        return EngineTimings(
            runs,
            dtype=_SIZE.sub("", str(last.get("model_type", ""))),
            device=f"cuda: {on}" if on else "cpu",
            version=f"{last.get('build_number')} ({last.get('build_commit')})",
            settings={"threads": last["n_threads"]} if isinstance(last.get("n_threads"), int) else {},
        )

    def _time_model(
        self, model: str, works: Sequence[Workload], device: str
    ) -> tuple[dict[Workload, dict[str, float]], dict[str, Any]]:
        """Time the reading of each prompt and the tokens after it; also returns what the program says about itself."""
        import torch

        lengths = ",".join(str(work.prompt_tokens) for work in works)
        # llama.cpp's threads wait for each other actively, so more than there are free cores slow it down a lot.
        more = ["-ngl", "0", "-t", str(torch.get_num_threads())] if device == "cpu" else []
        read = self._run_llama_bench(model, ["-p", lengths, "-n", "0", *more])
        written: dict[int, dict[str, Any]] = {}
        if new := works[0].new_tokens - 1:
            written = self._run_llama_bench(model, ["-p", "0", "-n", str(new), "-d", lengths, *more])
        found = {}
        for work in works:
            found[work] = {"prefill_tokens_per_second": float(read[work.prompt_tokens]["samples_ts"][0])}
            if new:
                found[work]["decode_tokens_per_second"] = float(written[work.prompt_tokens]["samples_ts"][0])
        return found, next(iter(read.values()))

    def _run_llama_bench(self, model: str, options: list[str]) -> dict[int, dict[str, Any]]:
        """One process; what it measured, by the length of the prompt."""
        command = [_PROGRAM, "-m", model, "-r", "1", "-o", "json", *options]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode:
            raise EngineError(_reason(done.stderr) or f"{_PROGRAM} ended with {done.returncode}", model)
        try:
            rows = json.loads(done.stdout)
            return {row["n_prompt"] or row["n_depth"]: row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"{_PROGRAM} answered {done.stdout[:100]!r} ({error})", model) from error


def _reason(log: str) -> str:
    """The most telling line of a log: the first that names an error, or else the last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "")[:300]
