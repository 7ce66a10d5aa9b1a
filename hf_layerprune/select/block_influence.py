"""Block influence: how much a layer changes the direction of the hidden states.

Original (ShortGPT, arXiv:2403.03853, section 3): `1 - E[cos(x_in, x_out)]` over tokens, between the states that enter
and leave the layer. Paper (the code of arXiv:2411.15558): a single cosine between the states of all tokens, flattened
into one vector, so the few tokens with very large states dominate it. The last layer gets no score there, and is
therefore never dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from ..runtime.devices import sum_dtype
from ..runtime.walk import Batch
from .passes import Observer
from .registry import ORIGINAL, Criterion
from .scores import Scores


class BlockInfluence(Observer):
    """Compares the states that enter and leave each layer."""

    def __init__(self, variant: str, num_layers: int) -> None:
        self.variant, self.num_layers = variant, num_layers

    def on_pass_begin(self, alive: Sequence[int], batches: Sequence[Batch]) -> None:
        self.alive = tuple(alive)
        # Sums per layer: cosines and their number, or products and squares.
        self.sums = torch.zeros(self.num_layers, 3, dtype=torch.float64)

    def on_batch_output(self, index: int, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        before, after = before.float().flatten(0, -2), after.float().flatten(0, -2)
        if self.variant == ORIGINAL:
            cosines = F.cosine_similarity(before, after, dim=-1)
            sums: list[Any] = [cosines.sum(dtype=sum_dtype(cosines.device)), len(cosines), 0]
        else:
            sums = [
                (x * y).sum(dtype=sum_dtype(x.device)) for x, y in ((before, after), (before, before), (after, after))
            ]
        self.sums[index] += torch.tensor([float(value) for value in sums], dtype=torch.float64)

    def scores(self) -> Scores:
        a, b, c = self.sums.unbind(1)
        influence = (1 - a / (b if self.variant == ORIGINAL else (b * c).sqrt())).tolist()
        scored = self.alive if self.variant == ORIGINAL else self.alive[:-1]
        layers = [influence[i] if i in scored else None for i in range(self.num_layers)]
        return Scores("block_influence", self.variant, self.alive, layers=layers)


def observer(criterion: Criterion, variant: str, num_layers: int, lengths: Sequence[int]) -> BlockInfluence:
    return BlockInfluence(variant, num_layers)
