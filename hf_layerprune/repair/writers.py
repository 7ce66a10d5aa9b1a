"""Find the linear modules of a decoder layer that write into the residual stream, by experiment.

A module is a writer if anything added to its output arrives unchanged in the layer's output, up to a constant factor
(the gain: 1 in most families, the residual multiplier in Granite). A matrix applied to its output can then be folded
into its weight. No model family is named here: modules followed by a norm (Gemma 2 and 3), experts and packed weights
simply fail the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..runtime.parts import hooked
from ..runtime.walk import Batch

_TOLERANCE = 0.03  # bfloat16 keeps two to three digits
_ROUNDING = 2e-3  # a gain this close to 1 is taken as 1
Run = Callable[[torch.Tensor, Batch], torch.Tensor]


@dataclass(frozen=True)
class Writer:
    """A linear module whose output is added to the residual stream.

    Args:
        name (`str`): Its name inside the layer, such as `mlp.down_proj`.
        module (`nn.Module`): An `nn.Linear` or a `Conv1D`.
        gain (`float`): The factor between its output and what arrives in the residual stream.
    """

    name: str
    module: nn.Module
    gain: float

    def folded(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The module's parameters, on the CPU, with a matrix folded in: the new output is `output @ matrix`."""
        new = {"weight": self.weight @ matrix.double().cpu()}
        bias: torch.Tensor | None = self.module.bias  # type: ignore[assignment]
        if bias is not None:
            new["bias"] = bias.detach().double().cpu() @ matrix.double().cpu()
        return self._as_kept(new)

    def moved(self, change: torch.Tensor) -> dict[str, torch.Tensor]:
        """The module's parameters, on the CPU, with its weight changed: the new output adds `input @ change`."""
        return self._as_kept({"weight": self.weight + change.double().cpu()})

    def without(self, indices: torch.Tensor) -> torch.Tensor:
        """The module's weight, on the CPU, with zeros for some inputs."""
        weight = self.weight.clone()
        weight[indices] = 0
        return self._as_kept({"weight": weight})["weight"]

    @property
    def weight(self) -> torch.Tensor:
        """The weight as `[in, hidden]`, as a `Conv1D` keeps it, in double precision on the CPU."""
        weight = self.module.get_parameter("weight").detach().double().cpu()
        return weight if isinstance(self.module, Conv1D) else weight.T

    def _as_kept(self, new: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if not isinstance(self.module, Conv1D):
            new["weight"] = new["weight"].T
        return {name: value.to(self.module.get_parameter(name).dtype).contiguous() for name, value in new.items()}


def outputs(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> AbstractContextManager[object]:
    """Observe or change a module's output inside a `with` block; `None` from `change` leaves it.

    Clone the output to keep it, since some families add to it in place (Llama 4's shared expert).
    """
    return module.register_forward_hook(lambda module, args, output: change(output))


def inputs(module: nn.Module, look: Callable[[torch.Tensor], None]) -> AbstractContextManager[object]:
    """Observe a module's input inside a `with` block."""
    return module.register_forward_pre_hook(lambda module, args: look(args[0]))


@contextmanager
def swapped(layer: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Replace some of a layer's parameters, by name, inside a `with` block."""
    parameters = {name: layer.get_parameter(name) for name in values}
    own = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = values[name].to(parameter.device, parameter.dtype)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = own[name]


@torch.no_grad()
def find_writers(layer: nn.Module, run: Run, batch: Batch) -> list[Writer]:
    """Find the modules of a layer that write into the residual stream, by running it on a few tokens.

    Returns:
        `list[Writer]`: In reverse order of execution: the MLP's output projection, then the attention's. Empty if the
            layer has none.
    """
    hidden = batch.hidden
    order: list[tuple[str, nn.Module]] = []
    handles = [
        module.register_forward_hook(lambda module, args, output, name=name: order.append((name, module)))
        for name, module in layer.named_modules()
        if _is_plain_linear(module, hidden.shape[-1])
    ]
    with hooked(*handles):
        run(hidden, batch)
    if len({name for name, _ in order}) != len(order):  # run more than once: experts, or shared weights
        order = [(name, module) for name, module in order if sum(name == other for other, _ in order) == 1]

    writers: list[Writer] = []
    for name, module in reversed(order):
        with silenced(writers):  # later writers must not respond to the change
            gain = _gain(module, run, batch)
        if gain is not None:
            writers.append(Writer(name, module, gain))
    return writers


def _is_plain_linear(module: nn.Module, hidden_size: int) -> bool:
    if not (type(module) is nn.Linear or isinstance(module, Conv1D)) or not module.weight.is_floating_point():
        return False
    out = module.weight.shape[1 if isinstance(module, Conv1D) else 0]
    return out == hidden_size and module.weight.dtype.itemsize > 1


def silenced(writers: list[Writer]) -> AbstractContextManager[None]:
    """Set the outputs of writers to zero inside a `with` block."""
    return hooked(*(writer.module.register_forward_hook(_zero) for writer in writers))


def _zero(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(output)


def _gain(module: nn.Module, run: Run, batch: Batch) -> float | None:
    """The factor by which the module's output enters the layer's output, or `None` if it is not a constant."""
    hidden = batch.hidden
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    plain = run(hidden, batch).float()
    # Scaled to the output too: the first layer's input can be so small that the noise would be lost to rounding.
    size = max(hidden.float().std().item(), plain.std().item())
    gains = []
    for scale in (1.0, 4.0):  # a norm behind the module would cancel the scale
        added = noise * scale * size
        with outputs(module, partial(_plus, added=added)):
            change = run(hidden, batch).float() - plain
        added = added.float()
        gain = ((change * added).sum() / added.square().sum()).item()
        if (change - gain * added).norm() > _TOLERANCE * abs(gain) * added.norm() or gain == 0:
            return None
        gains.append(gain)
    if abs(gains[0] - gains[1]) > _TOLERANCE * abs(gains[0]):
        return None
    return 1.0 if abs(gains[1] - 1) < _ROUNDING else gains[1]


def _plus(output: torch.Tensor, added: torch.Tensor) -> torch.Tensor | None:
    """The sum in the shape of `output`, also `[batch * seq, hidden]`; `None` if the sizes differ (experts)."""
    return output + added.view_as(output) if output.numel() == added.numel() else None
