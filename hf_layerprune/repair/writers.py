"""Find the linear modules of a decoder layer that write into the residual stream, by experiment.

A module is a writer if anything added to its output arrives unchanged in the layer's output, up to a constant factor
(the gain: 1 in most families, the residual multiplier in Granite). A matrix applied to its output can then be folded
into its weight. A module is also a writer if its output only goes through an RMS norm of which that is true (Gemma 2
and 3, OLMo 2). A mixture of experts is a writer as a whole, if the parameters that its output is made of are found
(`mixtures.py`). No model family is named here: packed weights simply fail the test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..runtime.parts import hook_scope
from ..runtime.precision import is_packed
from ..runtime.walk import Batch
from .mixtures import find_output_axes, is_bank, is_mixture
from .norms import Norm, find_norm

_TOLERANCE = 0.03  # bfloat16 keeps two to three digits
_ROUNDING = 2e-3  # a gain this close to 1 is taken as 1
Run = Callable[[torch.Tensor, Batch], torch.Tensor]


@dataclass(frozen=True)
class Writer:
    """A module whose output is added to the residual stream.

    Args:
        name (`str`): Its name inside the layer, such as `mlp.down_proj`.
        module (`nn.Module`): An `nn.Linear`, a `Conv1D` or a mixture of experts.
        gain (`float`): The factor between its output, or that of the norm after it, and what arrives in the
            residual stream.
        axes (`Mapping[str, int]`): The parameters that its output is a linear function of, by name in the module, each
            with the dimension that is that of the output.
        norm (`Norm`, *optional*): The norm between the module and the residual stream.
    """

    name: str
    module: nn.Module
    gain: float
    axes: Mapping[str, int]
    norm: Norm | None = None

    def fold_matrix(self, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
        """The writer's parameters, on the CPU, with a matrix folded in: the new output is `output @ matrix`.

        With a norm, `output` is the norm's, and the new one has that direction.
        """
        matrix = self._scale[:, None] * matrix.double().cpu() / self._scale
        return {f"{self.name}.{name}": _fold(parameter, matrix, axis) for name, parameter, axis in self._parameters()}

    def scaled(self, factor: float) -> dict[str, torch.Tensor]:
        """The writer's parameters, on the CPU, with its output multiplied by a factor."""
        return {
            f"{self.name}.{name}": (parameter.detach().double().cpu() * factor).to(parameter.dtype)
            for name, parameter, _ in self._parameters()
        }

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter, int]]:
        return ((name, self.module.get_parameter(name), axis) for name, axis in self.axes.items())

    def add_change(self, change: torch.Tensor) -> dict[str, torch.Tensor]:
        """The writer's parameters, on the CPU, with its weight changed: the new output adds `features @ change`."""
        new = (self.weight + change.double().cpu()) / self._scale
        dtype = self.module.get_parameter("weight").dtype
        return {f"{self.name}.weight": outputs_first(self.module, new.T).to(dtype).contiguous()}

    def weight_without(self, indices: torch.Tensor) -> torch.Tensor:
        """The module's weight, on the CPU, with zeros for some inputs."""
        weight = self.module.get_parameter("weight").detach().cpu().clone()
        outputs_first(self.module, weight)[:, indices] = 0
        return weight

    @property
    def output_module(self) -> nn.Module:
        """The module whose output is added to the residual stream: itself, or the norm after it."""
        return self.module if self.norm is None else self.norm.module

    @contextmanager
    def record_features(self, output: bool) -> Iterator[list[torch.Tensor]]:
        """Collect the features of a fit in each run of the layer inside a `with` block.

        Args:
            output (`bool`): Whether they are what the writer adds to the residual stream; otherwise, they are what its
                input contributes to it for each unit of [`weight`]: the input, divided by what the norm divides by.
        """
        seen: list[torch.Tensor] = []
        if output:
            hook = hook_output(self.output_module, lambda x: seen.append(x.clone().float() * self.gain))
        else:
            hook = hook_input(self.module, lambda x: seen.append(x.float() * self.output_factor(x)))
        with hook:
            yield seen

    def output_factor(self, x: torch.Tensor) -> torch.Tensor:
        """The factor between what an input `[..., in]` gives, times [`weight`], and what is written, `[..., 1]`."""
        gain = torch.full_like(x[..., :1], self.gain, dtype=torch.float32)
        return gain if self.norm is None else gain / self.norm.divisor(self.module.forward(x))

    @property
    def weight(self) -> torch.Tensor:
        """The weight, times the norm's scale, as `[in, hidden]`, in double precision on the CPU."""
        weight = self.module.get_parameter("weight").detach().double().cpu()
        return outputs_first(self.module, weight).T * self._scale

    @property
    def _scale(self) -> torch.Tensor:
        return torch.ones(1, dtype=torch.float64) if self.norm is None else self.norm.scale


def is_linear(module: nn.Module) -> bool:
    """Whether a module is linear, and nothing more, as modules of quantisers may be."""
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def outputs_first(module: nn.Module, parameter: torch.Tensor) -> torch.Tensor:
    """A weight as `[out, in]`, from how a linear module stores it (`Conv1D` as `[in, out]`), or the reverse; a bias stays."""
    return parameter.T if isinstance(module, Conv1D) and parameter.ndim == 2 else parameter


def _fold(parameter: torch.Tensor, matrix: torch.Tensor, axis: int) -> torch.Tensor:
    """A parameter, on the CPU, with a matrix applied along one of its dimensions, in double precision."""
    if parameter.ndim > 2 and axis > 0:  # one expert at a time, to save memory
        return torch.stack([_fold(one, matrix, axis - 1) for one in parameter])
    new = parameter.detach().cpu().double().movedim(axis, -1) @ matrix
    return new.movedim(-1, axis).to(parameter.dtype).contiguous()


def hook_output(
    module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor | None]
) -> AbstractContextManager[object]:
    """Observe or change a module's output inside a `with` block; `None` from `change` leaves it.

    Clone the output to keep it, since some families add to it in place (Llama 4's shared expert).
    """
    return module.register_forward_hook(lambda module, args, output: change(output))


def hook_input(module: nn.Module, observe: Callable[[torch.Tensor], None]) -> AbstractContextManager[object]:
    """Observe a module's input inside a `with` block."""
    return module.register_forward_pre_hook(lambda module, args: observe(args[0]))


@contextmanager
def swap_parameters(layer: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
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
def find_writers(layer: nn.Module, run: Run, batch: Batch, mixtures: bool = False) -> list[Writer]:
    """Find the modules of a layer that write into the residual stream, by running it on a few tokens.

    Args:
        layer (`nn.Module`): A decoder layer.
        run (`Run`): Runs it.
        batch (`Batch`): A few tokens.
        mixtures (`bool`, defaults to `False`): Whether mixtures of experts count. If not, what attention writes before one
            does not count either, since the experts respond to it. They don't count in a layer some of whose experts
            run only for other inputs, such as images.

    Returns:
        `list[Writer]`: In reverse order of execution: the MLP's output projection, then the attention's. Empty if the
            layer has none.
    """
    hidden = batch.hidden
    order: list[tuple[str, nn.Module, torch.Tensor]] = []
    idle = {module for module in layer.modules() if mixtures and is_bank(module)}

    def record(name: str, module: nn.Module, args: object, output: object) -> None:
        idle.discard(module)
        if isinstance(output, torch.Tensor):
            order.append((name, module, output.clone()))

    handles = [
        module.register_forward_hook(partial(record, name))
        for name, module in layer.named_modules()
        if _is_plain_linear(module, hidden.shape[-1]) or (mixtures and name and is_mixture(module))
    ]
    with hook_scope(*handles):
        run(hidden, batch)
    if idle:
        order = [one for one in order if _is_plain_linear(one[1], hidden.shape[-1])]
    names = [name for name, *_ in order]
    writers: list[Writer] = []
    for name, module, output in reversed(order):
        if names.count(name) > 1:  # run more than once: experts, or shared weights
            continue
        with zero_outputs(writers):  # later writers must not respond to the change
            norm, gain = None, _gain(module, run, batch)
            if gain is None and (norm := find_norm(layer, output, lambda: run(hidden, batch))) is not None:
                gain = _gain(norm.module, run, batch)
            if gain is not None and (axes := _output_axes(module, lambda: run(hidden, batch))):
                writers.append(Writer(name, module, gain, axes, norm))
    return writers


def _output_axes(module: nn.Module, run: Callable[[], object]) -> Mapping[str, int] | None:
    """The parameters that a module's output is a linear function of."""
    if isinstance(module, nn.Linear | Conv1D):
        axis = 1 if isinstance(module, Conv1D) else 0
        return {name: axis if parameter.ndim > 1 else 0 for name, parameter in module.named_parameters()}
    seen: list[torch.Tensor] = []

    def output() -> torch.Tensor:
        run()
        return seen.pop()

    with hook_output(module, lambda x: seen.append(x.clone())):
        return find_output_axes(module, output)


def _is_plain_linear(module: nn.Module, hidden_size: int) -> bool:
    if not is_linear(module):
        return False
    weight = module.get_parameter("weight")
    return not is_packed(weight) and len(outputs_first(module, weight)) == hidden_size


def zero_outputs(writers: list[Writer]) -> AbstractContextManager[None]:
    """Set the outputs of writers to zero inside a `with` block."""
    return hook_scope(*(hook_output(writer.module, torch.zeros_like) for writer in writers))


def _gain(module: nn.Module, run: Run, batch: Batch) -> float | None:
    """The factor by which the module's output enters the layer's output, or `None` if it is not a constant."""
    hidden = batch.hidden
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    plain = run(hidden, batch).float()
    # Scaled to the output too: the first layer's input can be so small that the noise would be lost to rounding.
    size = max(hidden.float().std().item(), plain.std().item())
    gains = []
    for scale in (1.0, 4.0):  # a norm after the module would cancel the scale
        added = noise * scale * size
        with hook_output(module, partial(_add_if_same_size, added=added)):
            change = run(hidden, batch).float() - plain
        added = added.float()
        gain = ((change * added).sum() / added.square().sum()).item()
        # `not <=`, because the noise may overflow float16, and no comparison with NaN holds.
        if not (change - gain * added).norm() <= _TOLERANCE * abs(gain) * added.norm() or gain == 0:
            return None
        gains.append(gain)
    if abs(gains[0] - gains[1]) > _TOLERANCE * abs(gains[0]):
        return None
    return 1.0 if abs(gains[1] - 1) < _ROUNDING else gains[1]


def _add_if_same_size(output: torch.Tensor, added: torch.Tensor) -> torch.Tensor | None:
    """The sum in the shape of `output`, also `[batch * seq, hidden]`; `None` if the sizes differ (experts)."""
    return output + added.view_as(output) if output.numel() == added.numel() else None
