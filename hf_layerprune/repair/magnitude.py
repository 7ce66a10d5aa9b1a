"""Rescale the layers after a cut, to compensate for the growth of the hidden states in the dropped block.

Prune&Comp (arXiv:2507.18212) multiplies the hidden states at the cut by the ratio of their magnitudes after and before
the dropped block. Since every layer normalises its input, dividing the outputs of all layers after the cut by the
same ratio is equivalent, and leaves the embeddings, and a head tied to them, unchanged. Behind a cut at the tail there
is only the final norm, so there is nothing to rescale.
"""

from __future__ import annotations

import logging

import torch
from torch import nn

from ..errors import CutError
from ..families.layout import find_final_norm
from ..runtime.parts import relative_error
from ..runtime.walk import Batch, LayerWalk
from .fit import Fitter
from .writers import Run, find_writers, swap_parameters, zero_outputs

logger = logging.getLogger(__name__)

_TOLERANCE = 0.05
_ROUNDING = 1e-3


class MagnitudeFitter(Fitter):
    """Measures how a dropped block changes the magnitude of the states, and rescales the layers after it."""

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]], method: str) -> None:
        super().__init__(walk, cuts)
        if find_final_norm(walk.model, walk.stack) is None:
            raise CutError(
                'repair="magnitude" needs a norm before the head, and this model has none; use repair="linear"'
            )
        self.factor = 1.0
        if any(end < walk.num_layers for _, end in cuts):
            self.stop = walk.num_layers
        elif cuts:
            logger.warning(
                "the repair magnitude changes nothing when only the last layers are dropped: the final norm undoes it"
            )
            self.stop = 0

    def before_layer(self, i: int, run: Run, batches: list[Batch], probe: Batch) -> None:
        """Note what enters a dropped block, and rescale a kept layer after one."""
        if i in self.first_of:
            self.before = [batch.hidden for batch in batches]
        if i not in self.dropped and self.factor != 1.0:
            new = scale_writers(i, self.walk.layers[i], run, probe, self.factor)
            self.tensors |= {(i, name): value for name, value in new.items()}

    def after_block(self, first: int, end: int, batches: list[Batch]) -> None:
        """Measure the ratio of the L1 norms of the states after and before the block, averaged over tokens."""
        total, tokens = 0.0, 0
        for before, batch in zip(self.before, batches, strict=True):
            ratio = batch.hidden.float().abs().sum(-1) / before.float().abs().sum(-1).clamp(min=1e-12)
            total, tokens = total + ratio.double().sum().item(), tokens + ratio.numel()
        if end < self.walk.num_layers:
            self.factor /= total / tokens
        self.records.append({"layers": [first, end - 1], "size_ratio": round(total / tokens, 6)})


fitter = MagnitudeFitter


@torch.no_grad()
def scale_writers(index: int, layer: nn.Module, run: Run, batch: Batch, factor: float) -> dict[str, torch.Tensor]:
    """A layer's parameters, changed so that everything it adds to the residual stream is multiplied by a factor.

    The layer is tried on a batch of a few tokens.

    Raises:
        CutError: The layer can't be rescaled by its output projections alone.
    """
    writers = [writer for writer in find_writers(layer, run, batch, mixtures=True) if writer.norm is None]
    with zero_outputs(writers):
        rest = relative_error(run(batch.hidden, batch), batch.hidden)
    if not (writers and rest <= _ROUNDING):
        raise _rescale_error(
            index,
            "not everything that it adds to the hidden states comes from its output projections (a norm follows them, say)",
        )
    new = {name: value for writer in writers for name, value in writer.scaled(factor).items()}
    wanted = run(batch.hidden, batch).float() * factor
    with swap_parameters(layer, new):
        scaled = run(batch.hidden * factor, batch).float()
    if not relative_error(scaled, wanted) <= _TOLERANCE:  # such as a layer without an input norm
        raise _rescale_error(index, "what it adds depends on the magnitude of its input")
    return new


def _rescale_error(index: int, why: str) -> CutError:
    return CutError(
        f'repair="magnitude" can\'t rescale layer {index}: {why}; use repair="linear", or no repair for this model'
    )
