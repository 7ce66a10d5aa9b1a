"""Shared by all parts: steps, the settings of a run, the machine, the shapes of the models and the card's limits."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "bitsandbytes", "deepspeed")
# Llama-3.1-8B in its own numbers.
LARGE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 224, "num_hidden_layers": 8, "num_attention_heads": 4,
    "num_key_value_heads": 1, "vocab_size": 256, "max_position_embeddings": 512,
}  # fmt: skip


class Unavailable(Exception):
    """A step can't run on this machine, which does not count as a failure."""


@dataclass(frozen=True)
class Setting:
    """The settings of a run.

    Args:
        tiny (`bool`): A dry run on the CPU.
        work (`Path`): Where models are kept.
        data (`Path`, *optional*): A folder with tasks and texts.
        model (`str`, *optional*): The model of part e.
        rounds (`int`): Rounds of part e.
        method (`str`): What part e trains.
    """

    tiny: bool
    work: Path
    data: Path | None = None
    model: str | None = None
    rounds: int = 5
    method: str = "full"

    @property
    def device(self) -> str:
        return "cpu" if self.tiny else "cuda"

    @property
    def layers(self) -> int:
        return (TINY if self.tiny else LARGE)["num_hidden_layers"]


@dataclass(frozen=True)
class Step:
    """One measurement, in a process of its own.

    Args:
        name (`str`): Its name; the first letter is the part.
        run (`Callable`): Returns the numbers.
        minutes (`float`): Its time limit.
        resumes (`str`): What the next call does if the limit ended it.
        cards (`int`): Number of visible cards.
    """

    name: str
    run: Callable[[Setting], dict[str, Any]]
    minutes: float = 3
    resumes: str = "the next call starts it again"
    cards: int = 1


def machine(setting: Setting) -> dict[str, Any]:
    """The card, its driver, and the versions of the libraries."""
    import torch

    found: dict[str, Any] = {"card": "none (CPU)"}
    if setting.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found = {"card": card.name, "memory_gb": round(card.total_memory / 1e9, 1), "cuda": torch.version.cuda}
        with suppress(OSError, IndexError):
            words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            found["driver"] = subprocess.run(words, capture_output=True, text=True).stdout.strip().splitlines()[0]
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def environment() -> dict[str, str]:
    """The variables of a process that imports the repository and whatever this one does, offline."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}


def random_model(setting: Setting, drop: list[int] | None = None) -> Any:
    """A model of random bfloat16 numbers, made on the card, without the layers in `drop`."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from hf_layerprune import drop_layers

    numbers = TINY if setting.tiny else LARGE
    config = LlamaConfig(**numbers, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if drop:
        drop_layers(model, drop)
    return model


def middle(setting: Setting) -> list[int]:
    """A quarter of the layers, after the middle, where whole blocks can be dropped."""
    n = setting.layers
    first = n * 5 // 8
    return list(range(first, first + n // 4))


def last(setting: Setting) -> list[int]:
    """The last quarter, which the paper drops."""
    return list(range(setting.layers - setting.layers // 4, setting.layers))


def tokenizer() -> Any:
    """One token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(127)} | {"<unk>": 127}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="<unk>"
    )


def synchronise(setting: Setting) -> None:
    """Wait for the card."""
    import torch

    if setting.device == "cuda":
        torch.cuda.synchronize()


def reset_peak(setting: Setting) -> None:
    """Reset the peak."""
    import torch

    if setting.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes(setting: Setting) -> int:
    """The peak memory of tensors on the card; on the CPU, that of the process."""
    import torch

    from hf_layerprune.records.lineage import peak_rss

    return torch.cuda.max_memory_allocated() if setting.device == "cuda" else peak_rss()


def limits(setting: Setting) -> dict[str, float]:
    """The operations per second of a large bfloat16 product, and the bytes per second of a copy, on this card now."""
    import torch

    n = 64 if setting.tiny else 8192
    a, b = (torch.randn(n, n, device=setting.device).bfloat16() for _ in range(2))
    block = torch.empty((1 << 16) if setting.tiny else (2 << 30), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(block)

    def best(run: Callable[[], Any], count: int) -> float:
        times = []
        for _ in range(4):
            synchronise(setting)
            start = time.perf_counter()
            for _ in range(count):
                run()
            synchronise(setting)
            times.append((time.perf_counter() - start) / count)
        return min(times)

    product, copy = best(lambda: a @ b, 20), best(lambda: target.copy_(block), 10)
    return {"flops": 2 * n**3 / product, "bytes_per_second": 2 * block.numel() / copy}
