"""Replace a dropped block by a linear map folded into the projection before it, or by refitting that projection.

ReplaceMe (arXiv:2505.02819): let `Y + M` be the hidden states that enter the block, where `M` is the output of the MLP
of the last layer before it and `Y` the rest, and let `X` be the hidden states that leave the block in the dense
model. The map `T` that brings `Y + M T` closest to `X` is folded into the MLP's output projection, so the pruned model
does not grow.

With `T = I + D`, the least-squares problem is `M D = X - (Y + M)`, so `D` models the block's effect. The normal
equations are summed batch by batch in float64 and solved with a ridge on `D`, so a stronger ridge approaches the plain
cut. The ridge strength is chosen on held-out rows. If the MLP is a mixture of experts, `T` is folded into the output
projections of all of them.

With fewer tokens than features, as with a few rows and the MLP of a large model, the best `D` reads only what the tokens'
features span. The equations are then solved in an orthonormal basis of that, for the same `D`. With four times as many
features as tokens, that takes a tenth of the time.

`M` itself is a product `A W` of the projection's input and its weight, and `A` is wider than `M`. `refit` solves the
same problem for a change of `W`: `A D = X - (Y + M)`. A map applied to `M` is a special case of it.

Where an RMS norm with scale `g` follows the projection, `M = A W g / r`, where `r` is what the norm divides a token by.
Then `A / r` takes the place of `A`, and `W g` that of `W`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from .. import families
from ..errors import CutError
from ..runtime.devices import sum_dtype
from ..runtime.walk import Batch, LayerWalk
from ..screen import progress_bar
from .fit import HELD_OUT, Fitter
from .norms import Norm
from .registry import find_repair
from .writers import Run, find_writers, swap_parameters

Tensors = dict[str, torch.Tensor]  # by name in the layer
STRENGTHS = tuple(10.0**k for k in range(-6, 4))
_LARGE = 10.0  # of the median squared feature


class NormalEquations:
    """Sums for a least-squares problem `features @ D = change`, with `D` of the shape `[width, outputs]`.

    With a `basis`, `[width, features]`, the sums and their solutions are of coordinates in it.
    """

    def __init__(self, width: int, outputs: int, device: torch.device, basis: torch.Tensor | None = None) -> None:
        dtype = sum_dtype(device)
        self.basis = basis
        self.gram = torch.zeros(width, width, dtype=dtype, device=device)
        self.moment = torch.zeros(width, outputs, dtype=dtype, device=device)
        self.total = torch.zeros((), dtype=dtype, device=device)
        self.tokens = 0

    def add(self, features: torch.Tensor, change: torch.Tensor) -> None:
        """Add tokens: the input `[..., width]` of the map, and its target `[..., hidden]`."""
        x, z = self.coordinates(features.flatten(0, -2)), change.flatten(0, -2).to(self.gram)
        self.gram += x.T @ x
        self.moment += x.T @ z
        self.total += z.square().sum()
        self.tokens += len(x)

    def coordinates(self, features: torch.Tensor) -> torch.Tensor:
        """Features `[..., features]` as the sums have them."""
        x = features.to(self.gram)
        return x if self.basis is None else x @ self.basis.T

    def scale(self) -> torch.Tensor:
        """The sum of squares of one feature, on average."""
        return self.gram.diagonal().sum() / (len(self.gram) if self.basis is None else self.basis.shape[1])

    def unexplained(self, solution: torch.Tensor) -> float:
        """The share of the change that a solution leaves unexplained; 1 for the plain cut."""
        d = solution.to(self.gram)
        residual = self.total - 2 * (d * self.moment).sum() + (d * (self.gram @ d)).sum()
        return residual.clamp(min=0).item() / self.total.item() if self.total else 0.0


def find_basis(features: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis, `[tokens, width]`, of a space that holds the features `[tokens, width]` of a few tokens."""
    device = torch.device("cpu") if features.device.type == "mps" else features.device  # MPS has no QR decomposition
    basis = torch.linalg.qr(features.to(device, torch.float64).T).Q.T
    return basis.to(features.device, sum_dtype(features.device))


@dataclass(frozen=True)
class Fit:
    """A fitted map.

    Args:
        change (`torch.Tensor`): `D`, `[width, hidden]`.
        strength (`float`): The chosen ridge, as a multiple of the mean squared feature.
        unexplained (`float`): The share of the block's effect that the map leaves unexplained, on held-out rows.
        tokens (`tuple[int, int]`): How many tokens it was fitted to, and how many were held out.
        total (`float`): The sum of squares of the block's effect on the held-out rows.
    """

    change: torch.Tensor
    strength: float
    unexplained: float
    tokens: tuple[int, int]
    total: float


def solve_ridge(fitted: NormalEquations, held_out: NormalEquations) -> Fit:
    """Solve with every ridge strength, and keep what does best on the held-out tokens; no change if none helps.

    There is a Cholesky factor for each strength instead of eigenvectors for all, whose time on GPUs varies widely between
    versions of torch (github.com/pytorch/pytorch/issues/183806); on a CPU, both take about as long.
    """
    scale = fitted.scale()
    best = Fit(
        torch.zeros_like(fitted.moment), float("inf"), 1.0, (fitted.tokens, held_out.tokens), held_out.total.item()
    )
    for strength in progress_bar(STRENGTHS, desc="choosing the ridge", delay=5):
        gram = fitted.gram.clone()
        gram.diagonal().add_(strength * (scale or 1.0))
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:  # the ridge is too weak for float32
            continue
        change = cholesky_solve(factor, fitted.moment)
        unexplained = held_out.unexplained(change)
        if unexplained < best.unexplained:
            best = replace(best, change=change, strength=strength, unexplained=unexplained)
    if fitted.basis is None:
        return best
    if best.strength == float("inf"):  # also where features, and so the basis, are not numbers
        return replace(best, change=best.change.new_zeros(fitted.basis.shape[1], best.change.shape[1]))
    return replace(best, change=fitted.basis.T @ best.change)


def cholesky_solve(factor: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Solve with a Cholesky factor, without the copy of it that `torch.cholesky_solve` makes, which may be several GB."""
    halfway = torch.linalg.solve_triangular(factor, target, upper=False)
    return torch.linalg.solve_triangular(factor.mT, halfway, upper=True)


def fit_linear_map(rows: Iterable[tuple[torch.Tensor, ...]], batches: int) -> Fit:
    """Fit a map; see [`sum_normal_equations`] for the arguments, and for what is held out to choose the ridge."""
    return solve_ridge(*sum_normal_equations(rows, batches))


def token_weights(features: torch.Tensor) -> torch.Tensor:
    """The weight of each token, `[batch, seq, 1]`, where a map is judged: at most that of ten median squared features.

    Some models have a few tokens with massive activations outside the first position. Their squared features are
    100,000 times the median, and a map fitted to rows without one is far off there: a single one that is held out
    would choose the ridge for all others.
    """
    size = features.float().square().sum(-1, keepdim=True)
    return (_LARGE * size.median() / size).clamp(max=1) if size.median() else torch.ones_like(size)


def sum_normal_equations(
    rows: Iterable[tuple[torch.Tensor, ...]], batches: int
) -> tuple[NormalEquations, NormalEquations]:
    """Sum the normal equations, and hold out a fifth of the batches, or of the rows if there is a single batch.

    Args:
        rows (`Iterable[tuple[torch.Tensor, ...]]`): For each batch, the features `[batch, seq, width]`, the change
            `[batch, seq, hidden]`, and the weights of the tokens `[batch, seq, 1]` where they are held out.
        batches (`int`): How many there are.

    Returns:
        `tuple[NormalEquations, NormalEquations]`: Of what is fitted, and of what is held out.
    """
    kept: list[tuple[bool, torch.Tensor, torch.Tensor]] = []  # while there are fewer tokens than features
    sums: dict[bool, NormalEquations] = {}
    few = True
    for held_out, (features, change, weights) in split_held_out(rows, batches):
        if held_out:
            features, change = features * weights.sqrt(), change * weights.sqrt()
        kept.append((held_out, features.flatten(0, -2), change.flatten(0, -2)))
        if few := few and sum(len(x) for unused, x, _ in kept if not unused) < features.shape[-1]:
            continue
        _add_rows(sums, kept)
        kept = []
    if few:
        _add_rows(sums, kept, find_basis(torch.cat([x for unused, x, _ in kept if not unused])))
    return sums[False], sums[True]


def _add_rows(
    sums: dict[bool, NormalEquations],
    rows: list[tuple[bool, torch.Tensor, torch.Tensor]],
    basis: torch.Tensor | None = None,
) -> None:
    for held_out, features, change in rows:
        if held_out not in sums:
            width = features.shape[-1] if basis is None else len(basis)
            sums[held_out] = NormalEquations(width, change.shape[-1], features.device, basis)
        sums[held_out].add(features, change)


def split_held_out(
    rows: Iterable[tuple[torch.Tensor, ...]], batches: int
) -> Iterator[tuple[bool, tuple[torch.Tensor, ...]]]:
    """The parts of the batches of [`sum_normal_equations`], each with whether it is held out."""
    for number, parts in enumerate(rows):
        first = first_held_out(number, batches, len(parts[0]))
        for held_out, part in ((False, slice(first)), (True, slice(first, None))):
            if batches == 1 or len(parts[0][part]):
                yield held_out, tuple(one[part] for one in parts)


def first_held_out(number: int, batches: int, rows: int) -> int:
    """The first row of a batch that is held out, as are those after it; `rows` if none is."""
    if batches == 1:
        return rows - max(1, rows // HELD_OUT)
    every = max(2, min(HELD_OUT, batches))
    return 0 if number % every == every - 1 else rows


class LinearFitter(Fitter):
    """Fits a map or a projection for each block. From the first block on, it also runs the repaired model.

    With the method `"linear"`, the fit is from the projection's output, otherwise from its input.
    """

    fit: Fit  # of the last block
    weights: list[torch.Tensor]  # of the tokens of each batch; from the first features of the block, for all its fits

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]], method: str) -> None:
        super().__init__(walk, cuts)
        self.method = method
        self.student: list[torch.Tensor] | None = None

    def before_layer(self, i: int, run: Run, batches: list[Batch], probe: Batch) -> None:
        """Advance the repaired model's states; before a block, find the module to change."""
        if i in self.dropped:
            return
        if i + 1 not in self.first_of:
            if self.student is not None:
                self.student = [run(state, batch) for state, batch in zip(self.student, batches, strict=True)]
            return
        writers = find_writers(self.walk.layers[i], run, probe, mixtures=find_repair(self.method).changes_mixtures)
        if not writers:
            if find_writers(self.walk.layers[i], run, probe, mixtures=True):
                raise CutError(
                    f'repair="{self.method}" can\'t change layer {i}, whose MLP is a mixture of experts; use repair="linear"'
                )
            raise CutError(
                f'repair="{self.method}" has no weight to change: no output projection of layer {i} writes into '
                f"the hidden states directly or through an RMS norm (it is quantised, say); {families.UNREPAIRABLE}"
            )
        self.writer, self.weights = writers[0], []
        # The layer runs again after the block, so that nothing as wide as an MLP has to be kept for all rows.
        if self.student is None:
            self.student = [batch.hidden for batch in batches]

    def after_block(self, first: int, end: int, batches: list[Batch]) -> None:
        """Fit the block, change the weights, and continue with the states of the repaired layer."""
        writer, layer, student = self.writer, self.walk.layers[first - 1], self.student or []

        def rows() -> Iterator[tuple[torch.Tensor, ...]]:
            for number, (batch, entering) in enumerate(zip(batches, student, strict=True)):
                state = run(entering, batch).float()
                features = seen.pop().view(*state.shape[:-1], -1)
                if number == len(self.weights):
                    self.weights.append(token_weights(features))
                yield features, batch.hidden.float() - state, self.weights[number]

        with self.walk.layer(first - 1) as run, writer.record_features(self.method == "linear") as seen:
            fit = fit_linear_map(rows(), len(batches))
        if self.method == "linear":
            new = writer.fold_matrix(torch.eye(len(fit.change)).to(fit.change) + fit.change)
        else:
            new = writer.add_change(fit.change)
        if writer.norm is not None:
            new, fit = self._refit_norm(writer.norm, new, fit, first, batches)
        self.fit = fit
        self.tensors |= {(first - 1, name): value for name, value in new.items()}
        with self.walk.layer(first - 1) as run, swap_parameters(layer, new):
            self.student = [run(state, batch) for state, batch in zip(student, batches, strict=True)]
        self.records.append(
            {
                "layers": [first, end - 1],
                "folded_into": f"{first - 1}.{writer.name}",
                "ridge": fit.strength if fit.strength != float("inf") else None,
                "unexplained_share": round(fit.unexplained, 4),
                "tokens": fit.tokens[0],
                "held_out_tokens": fit.tokens[1],
            }
            | ({} if writer.norm is None else {"norm": f"{first - 1}.{writer.norm.name}"})
        )

    def _refit_norm(self, norm: Norm, new: Tensors, fit: Fit, first: int, batches: list[Batch]) -> tuple[Tensors, Fit]:
        """Fit the norm after the projection to what it makes of the new weight, or keep both as they are.

        The projection is fitted as if the norm divided by what it divided by before. It does not, so what is written
        has the fitted direction but another size. The norm's weight gets the factor that is best for all tokens.
        """
        new = new | {f"{norm.name}.weight": norm.weight_for(norm.scale)}
        layer = self.walk.layers[first - 1]

        def rows() -> Iterator[tuple[torch.Tensor, ...]]:
            for batch, entering, weights in zip(batches, self.student or [], self.weights, strict=True):
                state = run(entering, batch).float()
                written = seen.pop().view_as(state)
                yield written[..., None], (batch.hidden.float() - state + written)[..., None], weights[..., None]

        with self.walk.layer(first - 1) as run, swap_parameters(layer, new), self.writer.record_features(True) as seen:
            fitted, held_out = sum_normal_equations(rows(), len(batches))
        factor = fitted.moment / fitted.gram
        left = held_out.unexplained(factor) * held_out.total.item() / (fit.total or 1.0)
        if not left < 1:
            kept = {name: layer.get_parameter(name).detach().cpu() for name in new}
            return kept, replace(fit, strength=float("inf"), unexplained=1.0)
        new[f"{norm.name}.weight"] = norm.weight_for(norm.scale * factor.item())
        return new, replace(fit, unexplained=left)


fitter = LinearFitter
