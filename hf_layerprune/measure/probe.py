"""Load one model in a process of its own, use it once, and print what that took, as a line of JSON.

    python -m hf_layerprune.measure.probe '{"source": "org/name", "dtype": "auto", "device": "cpu", ...}'

Memory that a process had once is not given back, and files that are mapped are counted where they are used. So the
peak of a model is that of a process which does nothing else.
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
    """What to load, and what to do with it.

    Args:
        source (`str`): A Hub id, a folder, or a GGUF file.
        revision (`str`, *optional*): The commit on the Hub.
        dtype (`str`): Of the weights.
        device (`str`): Where to.
        batch (`int`): Texts that are read at once.
        prompt_tokens (`int`): Tokens in each.
        new_tokens (`int`): Tokens that are written after each.
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
    """What it took.

    Args:
        load_seconds (`float`): Until the model has read its first token, imports not counted.
        idle_rss_bytes (`int`): Memory of the process before it loaded anything: Python, torch and transformers.
        peak_rss_bytes (`int`): The most memory that the process had resident, weights that are mapped included.
        peak_cuda_bytes (`int`, *optional*): The most that torch's allocator had in use on a GPU.
    """

    load_seconds: float
    idle_rss_bytes: int
    peak_rss_bytes: int
    peak_cuda_bytes: int | None


def probe(what: Probe) -> Probed:
    """Run a probe in a fresh process.

    Args:
        what (`Probe`): What to load and do.

    Returns:
        `Probed`: What it took.

    Raises:
        LayerPruneError: It failed there, such as for want of memory.
    """
    command = [sys.executable, "-m", "hf_layerprune.measure.probe", json.dumps(asdict(what))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "it was killed; is there enough memory?").splitlines()[-1]
        raise LayerPruneError(f"loading {what.source} in a process of its own failed: {said[:300]}")
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
        # Weights are read when they are used first.
        read_prompt(model, torch.ones(1, 1, dtype=torch.long, device=model.device))
        synchronise(model)
        seconds = perf_counter() - start
        ids = torch.ones(what.batch, what.prompt_tokens, dtype=torch.long)
        time_once(model, ids, Workload(what.batch, what.prompt_tokens, what.new_tokens))
    cuda = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None
    return Probed(seconds, idle, highest_rss(), cuda)


def import_everything() -> None:
    """Import what loading a model would import on its way."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, GenerationMixin  # noqa: F401


def highest_rss() -> int:
    """The most memory in bytes that this process had resident so far."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says starts at the parent's peak on Linux
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    from ..records.lineage import peak_rss

    return peak_rss()


def main(argv: list[str]) -> None:
    """Print what a probe found."""
    said: dict[str, Any] = json.loads(argv[0])
    print(json.dumps(asdict(_probe(Probe(**said)))))


if __name__ == "__main__":
    main(sys.argv[1:])
