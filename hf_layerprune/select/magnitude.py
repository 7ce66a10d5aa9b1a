"""Magnitude: a layer with small weights matters little.

Published (Shortened LLaMA, arXiv:2402.02834, and arXiv:2411.15558, section 3): the sum over a layer's weights of their
p-norms, `sum_k |W_k|_p`. Paper: as the code of arXiv:2411.15558 has it, without the p-th root, so that l2 is the sum of
squares. Biases don't count; the norms' weights do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..runtime.walk import Batch
from .passes import Observer
from .scores import Scores


class Magnitude(Observer):
    """Sums up weights.

    Args:
        name (`str`): `"magnitude_l1"` or `"magnitude_l2"`.
        variant (`str`): `"published"` or `"paper"`.
        num_layers (`int`): How many layers the base has.
    """

    needs_states = False

    def __init__(self, name: str, variant: str, num_layers: int) -> None:
        self.name, self.variant, self.power = name, variant, int(name[-1])
        self.found: list[float | None] = [None] * num_layers

    def begin(self, alive: Sequence[int], batches: Sequence[Batch]) -> None:
        """Nothing is needed."""

    def weights(self, index: int, layer: nn.Module) -> None:
        """Sum over one layer."""
        total = 0.0
        for _, parameter in weight_matrices(layer, index):
            size = parameter.detach().float().abs().pow(self.power).sum(dtype=torch.float64).item()
            total += size ** (1 / self.power) if self.variant == "published" else size
        self.found[index] = total

    def scores(self) -> Scores:
        """By layer."""
        alive = tuple(i for i, score in enumerate(self.found) if score is not None)
        return Scores(self.name, self.variant, alive, layers=self.found)


def weight_matrices(layer: nn.Module, index: int) -> list[tuple[str, nn.Parameter]]:
    """The weights of a layer that count: all but biases.

    Raises:
        UnsupportedModelError: They are packed.
    """
    found = [(name, parameter) for name, parameter in layer.named_parameters() if not name.endswith("bias")]
    packed = [name for name, parameter in found if not parameter.is_floating_point()]
    if packed:
        raise UnsupportedModelError(
            f"layer {index} keeps its weights packed ({packed[0]}), and a sum over packed numbers means nothing; load "
            "the model without quantisation, or choose by another criterion"
        )
    return found


def observer(name: str, variant: str, num_layers: int) -> Magnitude:
    """Who looks on."""
    return Magnitude(name, variant, num_layers)
