"""Find the parameters that the output of a mixture of experts is a linear function of, by experiment.

These are the output projections of all experts, routed and shared, and their biases. A matrix that is applied to each of
them is applied to the output of the whole mixture, however tokens are routed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from ..runtime.precision import is_packed

_TOLERANCE = 0.03  # bfloat16 keeps two to three digits


def is_bank(module: nn.Module) -> bool:
    """Whether a module itself holds the weights of several experts; transformers keeps them in one tensor."""
    many = any(parameter.ndim > 2 for parameter in module.parameters(recurse=False))
    return many and not isinstance(module, nn.Conv1d | nn.Conv2d)


def is_mixture(module: nn.Module) -> bool:
    """Whether a module may be a mixture of experts."""
    return any(map(is_bank, module.modules()))


@torch.no_grad()
def find_output_axes(module: nn.Module, run: Callable[[], torch.Tensor]) -> dict[str, int] | None:
    """Find the parameters of a mixture that its output is made of.

    The channels of each parameter are shifted by one and scaled. If the part of the output that comes from it changes in the
    same way, it is such a parameter. In 16 bits, a small part would be lost to rounding, so it is first made as large as
    the whole; and each token counts the same, since the first one may be a thousand times as large as all others.

    Args:
        module (`nn.Module`): The mixture.
        run (`Callable[[], torch.Tensor]`): Runs it on a few tokens, and returns a copy of its output `[..., hidden]`.

    Returns:
        `dict[str, int]`, *optional*: By parameter, the dimension that is that of the output; `None` if the output is
            made of something else as well, or of the weights of single experts, which a few tokens may not all reach.
    """
    plain = run()
    width = plain.shape[-1]
    draw = torch.Generator().manual_seed(0)
    factors = (2.0 ** torch.randint(-1, 2, (width,), generator=draw)).to(plain)  # exact in any type

    def moved(values: torch.Tensor, axis: int) -> torch.Tensor:
        along = [width if one == axis % values.ndim else 1 for one in range(values.ndim)]
        return values.roll(1, axis) * factors.to(values.dtype).view(along)

    whole = plain.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)

    def share(part: torch.Tensor) -> float:
        """The size of a part of the output in that of the whole, over all tokens."""
        return (part.float() / whole).square().sum(-1).mean().sqrt().item()

    def agree(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return share(found - wanted) <= _TOLERANCE * share(wanted)

    axes: dict[str, int] = {}
    for name, parameter in module.named_parameters():
        if width not in parameter.shape or is_packed(parameter) or not parameter.any():
            continue
        own = parameter.data
        try:
            parameter.data = torch.zeros_like(own)
            rest = run()
            if torch.equal(rest, plain):
                return None
            if not 0 < (before := share(plain - rest)) < math.inf:  # too small to be squared, or too large
                continue
            large = own * 2.0 ** max(0, round(-math.log2(before)))  # exact
            parameter.data = large
            part = run() - rest
            for axis in (axis for axis, length in enumerate(own.shape) if length == width):
                parameter.data = moved(large, axis)
                if agree(run() - rest, moved(part, -1)):
                    axes[name] = axis
        finally:
            parameter.data = own
    if all(module.get_parameter(name).ndim < 3 for name in axes):
        return None
    values = {name: module.get_parameter(name).data for name in axes}
    try:
        for name, axis in axes.items():
            module.get_parameter(name).data = moved(values[name], axis)
        return axes if agree(run(), moved(plain, -1)) else None
    finally:
        for name, own in values.items():
            module.get_parameter(name).data = own
