"""Devices: find the specified one, wait for it, and move modules there temporarily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import CutError, boundary


def pick_device(name: str, *, spread: bool = False) -> str:
    """Resolve the name of a torch device: `"auto"` becomes a GPU if there is one.

    With `spread`, a model may be spread over all GPUs: `"all"` is a name too, and stays if there is a GPU.

    Raises:
        CutError: This machine has no such device.
    """
    if name == "auto" or (spread and name == "all"):
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return "cpu" if accelerator is None else "all" if name == "all" else accelerator.type
    hint = f"use cpu, cuda, cuda:1, mps{', auto or all' if spread else ' or auto'}"
    with boundary(f"{name!r} is not a device of this machine", hint, CutError):
        torch.empty(0, device=name)
    return name


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate puts weights of a module in place only while it runs; otherwise they can't be read or changed."""
    hooked = (part for part in module.modules() if hasattr(part, "_hf_hook"))
    return any(parameter.is_meta for part in hooked for parameter in part.parameters())


def has_lost_weights(module: nn.Module) -> bool:
    """Whether a module has weights on the meta device that nothing puts in place."""
    return any(p.is_meta for part in module.modules() if not hasattr(part, "_hf_hook") for p in part.parameters(False))


def sum_dtype(device: torch.device) -> torch.dtype:
    """The data type of sums over many tokens: float64, which MPS does not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def synchronise(device: torch.device) -> None:
    """Wait until an accelerator has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize()


@contextmanager
def moved_to(device: torch.device | None, *modules: nn.Module) -> Iterator[None]:
    """Move modules to a device, if one is specified, inside a `with` block; then restore their own tensors."""
    if device is None:
        yield
        return
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    home = [tensor.data for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to(device)
        yield
    finally:
        for tensor, data in zip(tensors, home, strict=True):
            tensor.data = data
