"""Norms between a module that writes and the residual stream, as in Gemma 2 and 3 or OLMo 2."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.func import functional_call

from ..runtime.parts import agree, hook_scope

# The least scale of a channel, relative to the mean. Values are divided by it, and a norm may all but silence a channel.
_MIN_SCALE = 1e-2


@dataclass(frozen=True)
class Norm:
    """An RMS norm: it divides its input by the root of its mean square, and multiplies it by `offset + weight`.

    Args:
        name (`str`): Its name inside the layer, such as `post_feedforward_layernorm`.
        module (`nn.Module`): The norm, with `weight` `[hidden]` as its only parameter.
        offset (`float`): 1 in Gemma, otherwise 0.
    """

    name: str
    module: nn.Module
    offset: float

    @property
    def scale(self) -> torch.Tensor:
        """`offset + weight`, `[hidden]`, in double precision on the CPU, and nowhere too small to divide by."""
        scale = self.offset + self.module.get_parameter("weight").detach().double().cpu()
        min_scale = _MIN_SCALE * scale.abs().mean()
        return torch.where(scale.abs() < min_scale, min_scale * torch.where(scale < 0, -1.0, 1.0).to(scale), scale)

    def weight_for(self, scale: torch.Tensor) -> torch.Tensor:
        """The weight, on the CPU, that gives the norm this scale."""
        return (scale - self.offset).to(self.module.get_parameter("weight").dtype)

    def divisor(self, x: torch.Tensor) -> torch.Tensor:
        """What the norm divides an input `[..., hidden]` by, `[..., 1]`, its epsilon included."""
        scale = self.offset + self.module.get_parameter("weight").float()
        return (x * scale).norm(dim=-1, keepdim=True) / self.module(x).float().norm(dim=-1, keepdim=True).clamp(1e-12)


@torch.no_grad()
def find_norm(layer: nn.Module, x: torch.Tensor, run: Callable[[], object]) -> Norm | None:
    """Find the RMS norm in a layer that reads a module's output `x`.

    `run` calls the layer with the input that produced `x`. Returns `None` if no module or more than one reads `x`, or if the
    one that does is not an RMS norm.
    """
    readers: list[tuple[str, nn.Module]] = []

    def record_reader(name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        read = args[0] if args else None
        if isinstance(read, torch.Tensor) and read.numel() == x.numel() and torch.equal(read.reshape(x.shape), x):
            readers.append((name, module))

    norms = [
        module.register_forward_pre_hook(partial(record_reader, name))
        for name, module in layer.named_modules()
        if [(kind, value.shape) for kind, value in module.named_parameters()] == [("weight", x.shape[-1:])]
    ]
    with hook_scope(*norms):
        run()
    if len(readers) != 1 or not x.any():
        return None
    name, module = readers[0]
    weight, x = module.get_parameter("weight"), x * (1e3 / x.float().std()).to(x.dtype)  # so that no epsilon counts
    without, ones = (
        functional_call(module, {"weight": torch.full_like(weight, value)}, (x.clone(),)).float()
        for value in (0.0, 1.0)
    )
    unit = ones - without
    if not unit.any():  # the weight is not a factor
        return None
    norm = Norm(name, module, round((without * unit).sum().item() / unit.square().sum().item(), 2))
    wanted = x.float() / x.float().square().mean(-1, keepdim=True).sqrt()
    return norm if norm.offset in (0.0, 1.0) and agree(wanted, unit.to(x.dtype)) else None
