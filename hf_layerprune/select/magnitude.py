"""Magnitude: layers with small weights are assumed to matter least.

Original (Shortened LLaMA, arXiv:2402.02834, and arXiv:2411.15558, section 3): the sum of the p-norms of a layer's
weights, `sum_k |W_k|_p`. Paper (the code of arXiv:2411.15558): without the p-th root, so l2 is the sum of squares. The
weights of norms are included; biases are not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..runtime.precision import is_packed
from .passes import Observer, damaged_weights_error
from .registry import ORIGINAL, Criterion
from .scores import Scores


class Magnitude(Observer):
    """Sums the weight norms of each layer; the name ends in the power."""

    def __init__(self, name: str, variant: str, num_layers: int) -> None:
        self.name, self.variant, self.power = name, variant, int(name[-1])
        self.sums: list[float | None] = [None] * num_layers
        self.refused: UnsupportedModelError | None = None

    def on_layer_weights(self, index: int, layer: nn.Module) -> None:
        total = 0.0
        try:
            matrices = weight_matrices(layer, index)
        except UnsupportedModelError as error:  # raised by `scores`: other criteria may share this pass
            self.refused = self.refused or error
            return
        for parameter in matrices:
            size = parameter.detach().float().abs().pow(self.power).sum(dtype=torch.float64).item()
            total += size ** (1 / self.power) if self.variant == ORIGINAL else size
        if not math.isfinite(total) and (broken := damaged_weights_error(index, layer)):
            raise broken
        self.sums[index] = total

    def scores(self) -> Scores:
        if self.refused:
            raise self.refused
        alive = tuple(i for i, score in enumerate(self.sums) if score is not None)
        return Scores(self.name, self.variant, alive, layers=self.sums)


def weight_matrices(layer: nn.Module, index: int) -> list[nn.Parameter]:
    """All weights of a layer except biases.

    Raises:
        UnsupportedModelError: The weights are packed (quantised).
    """
    matrices = {name: parameter for name, parameter in layer.named_parameters() if not name.endswith("bias")}
    for name, parameter in matrices.items():
        if is_packed(parameter):
            raise UnsupportedModelError(
                f"layer {index} has packed weights ({name}), whose norms are meaningless; load the model without "
                "quantisation, or use another criterion"
            )
    return list(matrices.values())


def observer(criterion: Criterion, variant: str, num_layers: int, lengths: Sequence[int]) -> Magnitude:
    return Magnitude(criterion.name, variant, num_layers)
