"""Let the layer before a dropped block borrow neurons from the block, and refit its projection.

An MLP is a sum of neurons: each has rows of its own in the projections that read the hidden states (`gate` and `up`,
say) and a column in the projection that writes them back. A dropped layer's neurons could do some of their work in
the layer before it, but they read other hidden states. So their rows are changed to read what a linear map, fitted to
the calibration rows, predicts of those states. From its own and the borrowed neurons, the layer then keeps as many as
it had: those that together best explain the states after the block. No shape changes.

1. Of all neurons of the block, as many as the layer has are taken into the pool with its own: those that, one at a
   time, explain most of what `refit` leaves.
2. Of the pool, as many stay as the layer has: those that, refitted together, explain most (`subset.py`).
3. Borrowed neurons take the places of those that went, and the projection is fitted as by `refit`.

Nothing here knows model families: which rows make up a neuron is found by trying.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import CutError
from ..runtime.parts import agree
from ..runtime.walk import Batch, LayerWalk
from .linear import (
    Fit,
    LinearFitter,
    Tensors,
    first_held_out,
    fit_linear_map,
    solve_ridge,
    split_held_out,
    sum_normal_equations,
    token_weights,
)
from .subset import prepare_refit, select_features
from .writers import Run, Writer, hook_input, is_linear, outputs_first, swap_parameters

Rows = dict[str, torch.Tensor]  # by parameter, `[parts, neurons, ...]`


@dataclass(frozen=True)
class Readers:
    """The linear modules, such as `mlp.gate_proj` and `mlp.up_proj`, that hold the rows of an MLP's neurons.

    A fused module has a multiple of that many rows.
    """

    names: tuple[str, ...]
    neurons: int

    def rows_of(self, layer: nn.Module) -> Rows:
        """The rows of a layer's neurons."""
        return {
            f"{name}.{kind}": outputs_first(module, value).detach().unflatten(0, (-1, self.neurons))
            for name, module in self._modules(layer)
            for kind, value in module.named_parameters(recurse=False)
        }

    def _modules(self, layer: nn.Module) -> list[tuple[str, nn.Module]]:
        return [(name, layer.get_submodule(name)) for name in self.names]

    def to_parameters(self, layer: nn.Module, rows: Rows) -> dict[str, torch.Tensor]:
        """Values of a layer's parameters that give it these rows."""
        found = {}
        for name, value in rows.items():
            module = layer.get_submodule(name.rpartition(".")[0])
            found[name] = outputs_first(module, value.flatten(0, 1)).contiguous()
        return found

    def matches(self, layer: nn.Module, other: nn.Module) -> bool:
        """Whether another layer has the same modules, in the same shapes."""
        modules = dict(other.named_modules())
        return all(
            type(modules.get(name)) is type(module)
            and {kind: value.shape for kind, value in modules[name].named_parameters()}
            == {kind: value.shape for kind, value in module.named_parameters()}
            for name, module in self._modules(layer)
        )


@torch.no_grad()
def find_readers(layer: nn.Module, writer: Writer, run: Run, batch: Batch) -> Readers | None:
    """Find the modules that hold the rows of the neurons whose activations a projection reads, or `None`.

    Each neuron is given the rows of a randomly drawn one. If each activation becomes that of the drawn neuron, those
    are the modules.
    """
    parent = writer.name.rpartition(".")[0]
    weight = writer.module.get_parameter("weight")
    neurons = outputs_first(writer.module, weight).shape[1]
    read: dict[str, list[torch.Tensor]] = {}
    for name, module in layer.get_submodule(parent).named_children():
        if module is writer.module or not is_linear(module):
            continue
        other = module.get_parameter("weight")
        if len(outputs_first(module, other)) in (neurons, 2 * neurons) and other.dtype == weight.dtype:
            read[f"{parent}.{name}".lstrip(".")] = []
    if not read:
        return None
    for name, seen in read.items():
        with hook_input(layer.get_submodule(name), seen.append):
            run(batch.hidden, batch)
    first, *others = read.values()
    if any(len(seen) != 1 or not torch.equal(seen[0], first[0]) for seen in (first, *others)):
        return None
    readers = Readers(tuple(read), neurons)
    drawn = torch.randint(neurons, (neurons,), generator=torch.Generator().manual_seed(0))
    activations: list[torch.Tensor] = []
    rows = {name: value[:, drawn.to(value.device)] for name, value in readers.rows_of(layer).items()}
    with hook_input(writer.module, lambda x: activations.append(x.clone())):
        run(batch.hidden, batch)
        with swap_parameters(layer, readers.to_parameters(layer, rows)):
            run(batch.hidden, batch)
    before, after = activations
    return readers if before.any() and agree(after, before[..., drawn.to(before.device)]) else None


class BorrowFitter(LinearFitter):
    """Chooses neurons for the layer before each block, then refits its projection."""

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]], method: str) -> None:
        super().__init__(walk, cuts, method)
        self.mlp_inputs: list[torch.Tensor] = []  # what the neurons before the block read
        self.maps: dict[int, torch.Tensor] = {}  # by dropped layer: the map from there to what its own neurons read

    def before_layer(self, i: int, run: Run, batches: list[Batch], probe: Batch) -> None:
        """In front of a block, find the rows of its neurons, and record what they read."""
        super().before_layer(i, run, batches, probe)
        if i in self.dropped or i + 1 not in self.first_of:
            return
        layer = self.walk.layers[i]
        readers = find_readers(layer, self.writer, run, probe)
        if readers is None:
            raise CutError(
                f'repair="{self.method}" finds no neurons in layer {i}: what its {self.writer.name} reads is not made '
                'by rows of projections beside it; use repair="refit"'
            )
        self.front_layer, self.readers, self.mlp_inputs, self.maps = layer, readers, [], {}
        with hook_input(layer.get_submodule(readers.names[0]), lambda x: self.mlp_inputs.append(x.clone())):
            for state, batch in zip(self.student or [], batches, strict=True):
                run(state, batch)

    @contextmanager
    def watch_layer(self, i: int, batches: list[Batch]) -> Iterator[None]:
        """Fit the map from what the neurons before the block read to what those of a dropped layer read."""
        layer = self.walk.layers[i]
        if i not in self.dropped or not self.readers.matches(self.front_layer, layer):
            yield
            return
        seen: list[torch.Tensor] = []
        with hook_input(layer.get_submodule(self.readers.names[0]), lambda x: seen.append(x.clone())):
            yield
        rows = (
            (x := one.view(*batch.hidden.shape[:-1], -1), other.view(*batch.hidden.shape[:-1], -1), token_weights(x))
            for one, other, batch in zip(self.mlp_inputs, seen[1:], batches, strict=True)  # the first is the probe's
        )
        self.maps[i] = fit_linear_map(rows, len(batches)).change

    def after_block(self, first: int, end: int, batches: list[Batch]) -> None:
        """Fit the projection; then choose neurons, fit it to their activations, and keep the better of the two."""
        layer, entering = self.walk.layers[first - 1], self.student
        choice = self._choose_neurons(layer, first, batches) if self.maps else None
        super().after_block(first, end, batches)
        refit, tensors, student = self.fit, dict(self.tensors), self.student
        self.records[-1]["borrowed_neurons"] = 0
        if choice is None:
            return
        values, borrowed = choice
        self.student = entering
        with swap_parameters(layer, values):
            super().after_block(first, end, batches)
        record = self.records.pop()
        # Relative to the plain cut, as for the other repairs.
        left = self.fit.unexplained * self.fit.total / refit.total
        if left < refit.unexplained:
            self.records[-1] = record | {"unexplained_share": round(left, 4), "borrowed_neurons": borrowed}
            self.tensors = {(first - 1, name): value.cpu() for name, value in values.items()} | self.tensors
        else:
            self.tensors, self.student = tensors, student

    # --- internals ---------------------------------------------------------------------------------------

    def _choose_neurons(self, layer: nn.Module, first: int, batches: list[Batch]) -> tuple[Tensors, int] | None:
        """The layer's parameters with the chosen neurons, and how many are borrowed; `None` if a fit explains nothing.

        The parameters are those before the fit: borrowed neurons write nothing yet.
        """
        readers, neurons = self.readers, self.readers.neurons
        own = readers.rows_of(layer)
        candidates = [_map_rows(readers.rows_of(self.walk.layers[j]), change, own) for j, change in self.maps.items()]
        found = self._neuron_gains(layer, first, batches, candidates)
        if found is None:
            return None
        gains, fit = found
        best = gains.topk(neurons).indices
        chosen = {
            name: torch.cat([rows[name] for rows in candidates], 1)[:, best.to(own[name].device)] for name in own
        }
        runs = self._collect_activations(layer, first, batches, [chosen])
        pool = ((torch.cat([own_activations, *others], -1), missing) for own_activations, missing, others in runs)
        fitted = (row for held_out, row in split_held_out(pool, len(batches)) if not held_out)
        weight = self.writer.weight.float().to(gains.device)
        refit = prepare_refit(fitted, torch.cat([weight, torch.zeros_like(weight)]), fit.strength, fit.tokens[0])
        kept = torch.zeros(2 * neurons, dtype=torch.bool)
        kept[select_features(refit, 2 * neurons, neurons)] = True
        removed, added = (~kept[:neurons]).nonzero()[:, 0], kept[neurons:].nonzero()[:, 0]
        rows = {name: value.clone() for name, value in own.items()}
        for name, value in rows.items():
            value[:, removed.to(value.device)] = chosen[name][:, added.to(value.device)]
        values = readers.to_parameters(layer, rows)
        values[f"{self.writer.name}.weight"] = self.writer.weight_without(removed)
        return values, len(added)

    def _collect_activations(
        self, layer: nn.Module, first: int, batches: list[Batch], candidates: Sequence[Rows] = ()
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor, Iterator[torch.Tensor]]]:
        """For each batch: activations of the layer's neurons, what is missing after it, and of the candidates."""
        seen: list[torch.Tensor] = []
        values = [self.readers.to_parameters(layer, candidate) for candidate in candidates]

        def candidate_activations(state: torch.Tensor, batch: Batch, factor: torch.Tensor) -> Iterator[torch.Tensor]:
            for value in values:
                with swap_parameters(layer, value):
                    run(state, batch)
                yield seen.pop().view(*state.shape[:-1], -1).float() * factor

        with self.walk.layer(first - 1) as run, hook_input(self.writer.module, lambda x: seen.append(x.clone())):
            for state, batch in zip(self.student or [], batches, strict=True):
                after = run(state, batch).float()
                own = seen.pop().view(*state.shape[:-1], -1)
                factor = self.writer.output_factor(own)
                yield own.float() * factor, batch.hidden.float() - after, candidate_activations(state, batch, factor)

    def _neuron_gains(
        self, layer: nn.Module, first: int, batches: list[Batch], candidates: list[Rows]
    ) -> tuple[torch.Tensor, Fit] | None:
        """How much of what `refit` leaves each candidate explains alone, and the ridge; `None` if a fit explains nothing."""
        fitted, held_out = sum_normal_equations(
            (
                (own, missing, token_weights(own))
                for own, missing, _ in self._collect_activations(layer, first, batches)
            ),
            len(batches),
        )
        fit = solve_ridge(fitted, held_out)
        if fit.strength == float("inf"):
            return None
        gram = fitted.gram
        ridge = fit.strength * fitted.scale()
        gram.diagonal().add_(ridge)  # in place: it may be several GB
        factor = torch.linalg.cholesky(gram)
        with_own: list[torch.Tensor] = [torch.zeros(())] * len(candidates)
        with_left, squares = list(with_own), list(with_own)
        collected = self._collect_activations(layer, first, batches, candidates)
        for number, (own, missing, others) in enumerate(collected):
            end = first_held_out(number, len(batches), len(own))
            x, z = own[:end].flatten(0, -2), missing[:end].flatten(0, -2)
            left = z - x @ fit.change.to(x)
            x = torch.linalg.solve_triangular(factor, fitted.coordinates(x).T, upper=False).T.to(x)
            for j, other in enumerate(others if end else ()):
                f = other[:end].flatten(0, -2)
                with_own[j] = with_own[j].to(f) + f.T @ x
                with_left[j] = with_left[j].to(f) + f.T @ left
                squares[j] = squares[j].to(f) + f.square().sum(0)
        gains = []
        for cross, moment, square in zip(with_own, with_left, squares, strict=True):
            square = square.to(gram)
            free = (square + ridge - cross.to(gram).square().sum(1)).clamp(min=1e-6 * square.mean() + 1e-30)
            gains.append(moment.to(gram).square().sum(1) / free)
        return torch.cat(gains), fit


def _map_rows(rows: Rows, change: torch.Tensor, like: Rows) -> Rows:
    """Rows that read `x` as the given ones read `x @ change`; a bias has nothing to read and stays."""
    return {
        name: ((value.to(change) @ change.T) if value.ndim == 3 else value).to(like[name])
        for name, value in rows.items()
    }


fitter = BorrowFitter
