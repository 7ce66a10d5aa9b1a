"""Choose a subset of the features of a least-squares problem: those that, refitted together, explain most of the target.

The features shrink in rounds. What it costs to leave one out, when the others make up for it, is `|w|^2 / inverse(G +
ridge)[i, i]`, where `w` is the feature's weights and `G` the sum of products of the features (optimal brain surgeon).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..screen import progress_bar
from .linear import NormalEquations, cholesky_solve

_ROUNDS = 6
Refit = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def prepare_refit(
    rows: Iterable[tuple[torch.Tensor, ...]], weight: torch.Tensor, strength: float, tokens: int
) -> Refit:
    """Prepare to refit the weights of some features of many.

    Args:
        rows (`Iterable[tuple[torch.Tensor, ...]]`): The features, `[..., features]`, and the change that is wanted
            of their product with the weights, `[..., hidden]`, in pieces.
        weight (`torch.Tensor`): The weights before the fit, `[features, hidden]`.
        strength (`float`): The ridge on the weights' change, as a multiple of the mean squared feature.
        tokens (`int`): How many tokens the rows have.

    Returns:
        `Refit`: Of the indices of some features, their new weights, `[some, hidden]`, and the diagonal of the inverse of the
            sums of their products, `[some]`.
    """
    return (_refit_by_tokens if tokens < len(weight) else _refit_by_sums)(rows, weight, strength)


def _refit_by_sums(rows: Iterable[tuple[torch.Tensor, ...]], weight: torch.Tensor, strength: float) -> Refit:
    sums = NormalEquations(len(weight), weight.shape[1], weight.device)
    for features, change in rows:
        sums.add(features, change)
    gram = sums.gram
    gram.diagonal().add_(strength * sums.scale())  # in place: it may be several GB
    target = sums.moment + gram @ weight.to(gram)

    def refit(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        factor = torch.linalg.cholesky(gram if len(some) == len(gram) else gram[some[:, None], some])
        weights = cholesky_solve(factor, target[some])
        return weights, torch.cholesky_inverse(factor, out=factor).diagonal()

    return refit


def _refit_by_tokens(rows: Iterable[tuple[torch.Tensor, ...]], weight: torch.Tensor, strength: float) -> Refit:
    """The same weights from a matrix of products of tokens, by the Woodbury identity."""
    device = (
        torch.device("cpu") if weight.device.type == "mps" else weight.device
    )  # in float64, which MPS does not have
    parts = ([part.flatten(0, -2).to(device) for part in each] for each in zip(*rows, strict=True))
    features, change = map(torch.cat, parts)
    weight, dtype = weight.to(device), torch.float64
    ridge = strength * features.to(dtype).square().sum() / len(weight)
    target = (change + features @ weight).to(dtype)

    def refit(some: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, before = features[:, some].to(dtype), weight[some].to(dtype)
        gram = x @ x.T
        gram.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram)
        half = torch.linalg.solve_triangular(factor, x, upper=False)
        left = torch.linalg.solve_triangular(factor, target - x @ before, upper=False)
        inverse = (1 - half.square().sum(0)).clamp(min=torch.finfo(dtype).eps) / ridge
        return before + half.T @ left, inverse

    return refit


def select_features(refit: Refit, count: int, keep: int) -> torch.Tensor:
    """Choose the features to keep of `count`, given that their weights are refitted; returns their indices, ascending."""
    alive = torch.arange(count)
    for left in progress_bar(range(_ROUNDS, 0, -1), desc="choosing neurons", delay=5):
        weights, inverse = refit(alive)
        cost = weights.square().sum(1) / inverse  # of leaving out each feature
        size = keep if left == 1 else round(len(alive) * (keep / len(alive)) ** (1 / left))
        alive = alive[cost.topk(size).indices.sort().values.to(alive.device)]
    return alive
