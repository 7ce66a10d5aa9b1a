"""Magnitude: a layer with small weights matters little.

Original (Shortened LLaMA, arXiv:2402.02834, and arXiv:2411.15558, section 3): the sum over a layer's weights of their
p-norms, `sum_k |W_k|_p`. Paper: as the code of arXiv:2411.15558 has it, without the p-th root, so that l2 is the sum of
squares. Biases don't count; the norms' weights do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .passes import Observer
from .registry import ORIGINAL, Criterion
from .scores import Scores


class Magnitude(Observer):
    """Sums up weights.

    Args:
        name (`str`): `"magnitude_l1"` or `"magnitude_l2"`.
        variant (`str`): `"original"` or `"paper"`.
        num_layers (`int`): How many layers the base has.
    """

    def __init__(self, name: str, variant: str, num_layers: int) -> None:
        self.name, self.variant, self.power = name, variant, int(name[-1])
        self.sums: list[float | None] = [None] * num_layers

    def weights(self, index: int, layer: nn.Module) -> None:
        """Sum over one layer."""
        total = 0.0
        for _, parameter in weight_matrices(layer, index):
            size = parameter.detach().float().abs().pow(self.power).sum(dtype=torch.float64).item()
            total += size ** (1 / self.power) if self.variant == ORIGINAL else size
        self.sums[index] = total

    def scores(self) -> Scores:
        """By layer."""
        alive = tuple(i for i, score in enumerate(self.sums) if score is not None)
        return Scores(self.name, self.variant, alive, layers=self.sums)


def weight_matrices(layer: nn.Module, index: int) -> list[tuple[str, nn.Parameter]]:
    """The weights of a layer that count: all but biases.

    Raises:
        UnsupportedModelError: They are packed.
    """
    matrices = [(name, parameter) for name, parameter in layer.named_parameters() if not name.endswith("bias")]
    packed = [name for name, parameter in matrices if not parameter.is_floating_point()]
    if packed:
        raise UnsupportedModelError(
            f"layer {index} keeps its weights packed ({packed[0]}), and a sum over packed numbers means nothing; load "
            "the model without quantisation, or choose by another criterion"
        )
    return matrices


def observer(criterion: Criterion, variant: str, num_layers: int, lengths: Sequence[int]) -> Magnitude:
    """What looks on."""
    return Magnitude(criterion.name, variant, num_layers)
