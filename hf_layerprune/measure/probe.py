"""Loads one model in a separate process, uses it once, and prints time and memory as a line of JSON.

    python -m hf_layerprune.measure.probe '{"source": "org/name", "dtype": "auto", "device": "cpu", ...}'

A process does not return all memory that it once had, and mapped files count only once they are read. So the peak
memory of a model is measured in a process that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, Any

from ..errors import LayerPruneError, one_line
from ..records.fingerprints import Identity
from ..records.lineage import peak_rss

if TYPE_CHECKING:
    from .requests import Workload


def probe(source: str, revision: str | None, dtype: str, device: str, work: Workload) -> dict[str, float]:
    """Load and run a model in a fresh process.

    Returns:
        `dict[str, float]`: `load_seconds`, the time to load the model and read one token, without imports and the set-up
            of GPUs; `idle_rss_bytes`, the memory of the process before both: Python, torch and transformers;
            `peak_rss_bytes`, its peak resident memory, including mapped weights; and on GPUs, `peak_cuda_bytes` of torch's
            allocator, of all together.

    Raises:
        LayerPruneError: The process failed, for example for lack of memory.
    """
    job = {"source": source, "revision": revision, "dtype": dtype, "device": device, "work": asdict(work)}
    command = [sys.executable, "-m", "hf_layerprune.measure.probe", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or "it was killed; is there enough memory?").splitlines()
        reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])  # C++ puts its frames after it
        raise LayerPruneError(
            f"loading {source} in a separate process failed: {reason[:300]}; --load-repeats 0 leaves these runs out"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def _probe(source: str, revision: str | None, dtype: str, device: str, work: dict[str, int]) -> dict[str, Any]:
    # Everything that loading a model would import.
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import AutoModelForCausalLM, GenerationMixin  # noqa: F401

    from ..runtime.devices import synchronise
    from ..runtime.model_class import model_without_weights
    from .cost import prefill
    from .requests import Workload
    from .speed import time_once
    from .subject import Subject

    subject = Subject(source, source, Identity(""), revision=revision)
    model_without_weights(subject.config())  # imports the model's code
    found: dict[str, Any] = {"idle_rss_bytes": peak_rss()}
    _start_accelerators(device)
    start = perf_counter()
    model = subject.load(dtype, device)
    with torch.no_grad():
        # Mapped weights are read on first use.
        prefill(model, torch.ones(1, 1, dtype=torch.long, device=model.device))
        synchronise(model.device)
        found["load_seconds"] = perf_counter() - start
        workload = Workload(**work)
        ids = torch.ones(workload.batch, workload.prompt_tokens, dtype=torch.long)
        time_once(model, ids, workload)
    if model.device.type == "cuda":
        found["peak_cuda_bytes"] = sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count())))
    return found | {"peak_rss_bytes": peak_rss()}


def _start_accelerators(device: str) -> None:
    """Let torch set up the accelerators that a model will be on, which takes seconds."""
    import torch

    from ..runtime.devices import pick_device

    name = pick_device(device, spread=True)
    if name != "cpu":
        for one in range(torch.accelerator.device_count()) if name == "all" else [name]:
            torch.zeros(1, device=one)
            torch.accelerator.synchronize(one)


if __name__ == "__main__":
    try:
        print(json.dumps(_probe(**json.loads(sys.argv[1]))))
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {one_line(str(error))}")
