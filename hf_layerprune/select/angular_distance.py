"""Angular distance between the states at the two ends of a block (Gromov et al., arXiv:2403.17887, section 3.2).

`arccos(cos(x_l, x_l+n)) / pi` at the last token of each row, averaged over the rows. One pass scores blocks of every
length, since only one token per row has to be kept at each layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from ..runtime.walk import Batch
from .passes import Observer
from .registry import ORIGINAL, Criterion
from .scores import Scores


class AngularDistance(Observer):
    """Keeps the last token of each row at every layer."""

    def on_pass_begin(self, alive: Sequence[int], batches: Sequence[Batch]) -> None:
        self.alive = tuple(alive)
        self.ends = [self._last_tokens(batches)]

    def on_layer_end(self, index: int, batches: Sequence[Batch]) -> None:
        self.ends.append(self._last_tokens(batches))

    @staticmethod
    def _last_tokens(batches: Sequence[Batch]) -> torch.Tensor:
        return F.normalize(torch.cat([batch.hidden[:, -1].double().cpu() for batch in batches]), dim=-1)

    def scores(self) -> Scores:
        points = torch.stack(self.ends)  # [layers + 1, rows, hidden]
        cosines = torch.einsum("ard,brd->abr", points, points).clamp(-1, 1)
        distances = (cosines.arccos() / torch.pi).mean(-1)
        n = len(self.alive)
        blocks = {
            self.alive[start:end]: distances[start, end].item()
            for start in range(n)
            for end in range(start + 1, n + 1)
            if end - start < n
        }
        return Scores("angular_distance", ORIGINAL, self.alive, blocks=blocks)


def observer(criterion: Criterion, variant: str, num_layers: int, lengths: Sequence[int]) -> AngularDistance:
    return AngularDistance()
