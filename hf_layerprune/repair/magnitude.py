"""Rescaling after a cut: what a dropped block did to the size of the hidden states.

Prune&Comp (arXiv:2507.18212) multiplies everything that reached the cut by the ratio of the hidden states' sizes behind
and before the dropped block. Every layer reads its input through a norm, which size does not pass, so dividing all that
the layers behind the cut add is the same thing: neither the embeddings nor a head that is tied to them change.
Behind a cut at the tail there is only the final norm, so there is nothing to rescale.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..errors import CutError
from ..families.layout import find_final_norm
from ..runtime.walk import Batch, LayerWalk
from .fit import Fitter
from .writers import Run, Writer, find_writers, silenced

logger = logging.getLogger(__name__)

_TOLERANCE = 0.05
_ROUNDING = 1e-3


class MagnitudeFitter(Fitter):
    """Measures how a dropped block changes the size of the states, and scales the layers behind it."""

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]], method: str) -> None:
        super().__init__(walk, cuts)
        if find_final_norm(walk.model, walk.stack) is None:
            raise CutError(
                'repair="magnitude" needs a norm before the head, and this model has none; use repair="linear"'
            )
        self.factor = 1.0
        if any(end < walk.num_layers for _, end in cuts):
            self.last = walk.num_layers
        elif cuts:
            logger.warning('repair="magnitude" has nothing to do behind the last layers: the final norm undoes it')
            self.last = 0

    def enter(self, first: int, batches: list[Batch]) -> None:
        """Keep the states in front of the block."""
        self.before = [batch.hidden for batch in batches]

    def step(self, i: int, run: Run, batches: list[Batch], probe: Batch) -> None:
        """Scale a layer behind a cut."""
        if i not in self.dropped and self.factor != 1.0:
            new = scaled_writers(i, self.walk.layers[i], run, probe, self.factor)
            self.tensors |= {(i, name): value for name, value in new.items()}

    def leave(self, first: int, end: int, batches: list[Batch]) -> None:
        """Measure: the mean over tokens of how much larger the states became, in the L1 norm."""
        total, tokens = 0.0, 0
        for before, batch in zip(self.before, batches, strict=True):
            ratio = batch.hidden.float().abs().sum(-1) / before.float().abs().sum(-1).clamp(min=1e-12)
            total, tokens = total + ratio.double().sum().item(), tokens + ratio.numel()
        if end < self.walk.num_layers:
            self.factor /= total / tokens
        self.records.append({"layers": [first, end - 1], "size_ratio": round(total / tokens, 6)})


fitter = MagnitudeFitter


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
    with silenced(writers):
        rest = run(batch.hidden, batch).float() - batch.hidden.float()
    if not writers or rest.norm() > _ROUNDING * batch.hidden.float().norm():
        raise _cannot(
            index,
            "it adds to the hidden states by more than its output projections (experts, a norm, or a bias of its own)",
        )
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
