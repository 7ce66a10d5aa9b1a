"""Helpers for runs of `recipes/sft_tail.py`: settings for the machine, trained parameters."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hf_layerprune.errors import LayerPruneError
from hf_layerprune.records.lineage import Lineage


def engine_settings(settings: dict[str, Any], engine: dict[str, Any], accelerator: bool) -> dict[str, Any]:
    """Adapt the settings to the machine without changing the result.

    Args:
        settings (`dict[str, Any]`): The training settings.
        engine (`dict[str, Any]`): accelerate's config.
        accelerator (`bool`): Whether there is a GPU or another accelerator.

    Returns:
        `dict[str, Any]`: Settings to replace.

    Raises:
        LayerPruneError: The batch can't be divided among the processes.
    """
    changed: dict[str, Any] = {}
    if not accelerator:
        changed = {"use_cpu": True, "fp16": False}  # float16 training needs a GPU
        if not settings.get("bf16"):
            changed["bf16"] = False
    processes, steps = int(engine.get("num_processes") or 1), settings.get("gradient_accumulation_steps", 1)
    if processes > 1:
        if steps % processes:
            raise LayerPruneError(
                f"{processes} processes can't share {steps} batches a step; use a number of processes that divides it"
            )
        changed["gradient_accumulation_steps"] = steps // processes
    return changed


def trained_parameters(heal: Path) -> int:
    """The number of trained parameters: those of the adapter, or without one, those of all changed tensors."""
    adapter = heal / "adapter" / "adapter_model.safetensors"
    if adapter.is_file():
        with safe_open(adapter, framework="pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    lineage: Any = Lineage.load(heal / "model")
    changed, total = set(lineage.entries[-1]["changed_tensors"]), 0
    for path in (heal / "model").glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in changed & set(file.keys()))
    return total
