"""Loads one model in a separate process, uses it once, and prints time and memory as a line of JSON.

    python -m hf_layerprune.measure.probe '{"source": "org/name", "dtype": "auto", "device": "cpu", ...}'

A process does not return all memory that it once had, and mapped files count only once they are read. So the peak
memory of a model is measured in a process that does nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from ..errors import LayerPruneError


@dataclass(frozen=True)
class Probe:
    """What to load and run.

    Args:
        source (`str`): A Hub id, a folder, or a GGUF file.
        revision (`str`, *optional*): The commit on the Hub.
        dtype (`str`): The type of the weights.
        device (`str`): The device.
        batch (`int`): Prompts per batch.
        prompt_tokens (`int`): Tokens per prompt.
        new_tokens (`int`): Tokens to generate after each prompt.
    """

    source: str
    revision: str | None
    dtype: str
    device: str
    batch: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Probed:
    """The time and memory of a probe.

    Args:
        load_seconds (`float`): Time to load the model and read one token, without imports.
        idle_rss_bytes (`int`): Memory of the process before loading: Python, torch and transformers.
        peak_rss_bytes (`int`): Peak resident memory of the process, including mapped weights.
        peak_cuda_bytes (`int`, *optional*): Peak memory of torch's allocator on a GPU.
    """

    load_seconds: float
    idle_rss_bytes: int
    peak_rss_bytes: int
    peak_cuda_bytes: int | None


def probe(what: Probe) -> Probed:
    """Run a probe in a fresh process.

    Args:
        what (`Probe`): What to load and run.

    Returns:
        `Probed`: Time and memory.

    Raises:
        LayerPruneError: The process failed, for example for lack of memory.
    """
    command = [sys.executable, "-m", "hf_layerprune.measure.probe", json.dumps(asdict(what))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "it was killed; is there enough memory?").splitlines()[-1]
        raise LayerPruneError(f"loading {what.source} in a separate process failed: {reason[:300]}")
    return Probed(**json.loads(done.stdout.strip().splitlines()[-1]))


def _probe(what: Probe) -> Probed:
    import torch

    from ..records.fingerprints import Identity
    from .cost import read_prompt
    from .speed import Workload, synchronise, time_once
    from .subject import Subject

    import_everything()
    idle = highest_rss()
    start = perf_counter()
    subject = Subject(what.source, what.source, Identity(""), "model", revision=what.revision)
    model = subject.load(what.dtype, what.device)
    with torch.no_grad():
        # Mapped weights are read on first use.
        read_prompt(model, torch.ones(1, 1, dtype=torch.long, device=model.device))
        synchronise(model)
        seconds = perf_counter() - start
        ids = torch.ones(what.batch, what.prompt_tokens, dtype=torch.long)
        time_once(model, ids, Workload(what.batch, what.prompt_tokens, what.new_tokens))
    cuda = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    return Probed(seconds, idle, highest_rss(), cuda)


def import_everything() -> None:
    """Import the modules that loading a model would import."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, GenerationMixin  # noqa: F401


def highest_rss() -> int:
    """Peak resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, the value of `getrusage` starts at the parent's peak
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    from ..records.lineage import peak_rss

    return peak_rss()


def main(argv: list[str]) -> None:
    """Run a probe and print its result."""
    fields: dict[str, Any] = json.loads(argv[0])
    print(json.dumps(asdict(_probe(Probe(**fields)))))


if __name__ == "__main__":
    main(sys.argv[1:])
