"""Rescaling after a cut: what a dropped block did to the size of the hidden states.

Prune&Comp (arXiv:2507.18212) multiplies everything that reached the cut by the ratio of the hidden states' sizes behind
and before the dropped block. Every layer reads its input through a norm, which size does not pass, so dividing all that
the layers behind the cut add is the same thing: neither the embeddings nor a head that is tied to them change.
Behind a cut at the tail there is only the final norm, so there is nothing to rescale.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import CutError
from ..runtime.walk import Batch
from .writers import Run, Writer, _silenced, find_writers

_TOLERANCE = 0.05


class SizeRatio:
    """Mean over tokens of how much larger hidden states became: `|after| / |before|`, in the L1 norm."""

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add tokens: hidden states `[..., hidden]` before the block and after it."""
        ratio = after.float().abs().sum(-1) / before.float().abs().sum(-1).clamp(min=1e-12)
        self._sum += ratio.double().sum().item()
        self._tokens += ratio.numel()

    @property
    def value(self) -> float:
        """The mean ratio."""
        return self._sum / self._tokens


@torch.no_grad()
def scaled_writers(index: int, layer: nn.Module, run: Run, batch: Batch, factor: float) -> dict[str, torch.Tensor]:
    """A layer's parameters after all that it adds to the residual stream is multiplied by a factor.

    Args:
        index (`int`): The layer's index in the base, for messages.
        layer (`nn.Module`): The layer.
        run (`Callable`): Runs it.
        batch (`Batch`): A few tokens, with the hidden states that enter the layer.
        factor (`float`): The factor.

    Returns:
        `dict[str, torch.Tensor]`: By the parameter's name inside the layer.

    Raises:
        CutError: The layer can't be rescaled by its output projections alone.
    """
    writers = find_writers(layer, run, batch)
    with _silenced(writers):
        rest = run(batch.hidden, batch).float() - batch.hidden.float()
    if not writers or rest.norm() > _TOLERANCE * batch.hidden.float().norm():
        raise _cannot(index, "it adds to the hidden states by more than its output projections (experts, or a norm)")
    new = {
        f"{writer.name}.{name}": (parameter.detach().double().cpu() * factor).to(parameter.dtype)
        for writer in writers
        for name, parameter in writer.module.named_parameters(recurse=False)
    }
    _check(index, run, batch, writers, factor)
    return new


def _check(index: int, run: Run, batch: Batch, writers: list[Writer], factor: float) -> None:
    """Refuse a layer that reads the size of its input, such as one without a norm in front."""
    wanted = run(batch.hidden, batch).float() * factor
    old = [parameter for writer in writers for parameter in writer.module.parameters(recurse=False)]
    data = [parameter.data for parameter in old]
    try:
        for parameter in old:
            parameter.data = parameter.data * factor
        found = run(batch.hidden * factor, batch).float()
    finally:
        for parameter, value in zip(old, data, strict=True):
            parameter.data = value
    if (found - wanted).norm() > _TOLERANCE * wanted.norm():
        raise _cannot(index, "what it adds depends on the size of its input")


def _cannot(index: int, why: str) -> CutError:
    return CutError(
        f'repair="magnitude" can\'t rescale layer {index}: {why}; use repair="linear", or no repair for this model'
    )
