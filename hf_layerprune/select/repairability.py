"""Repairability: the share of a block's effect that a linear map can't reproduce.

For each block of layers, the map of `repair/linear.py` is fitted to what the block adds to the hidden states, from the
output of the last module before it that writes into the residual stream. The score is the share that the map
leaves unexplained on held-out tokens. All blocks are fitted in one pass. A block that starts at layer 0 has no module
before it, and so no score.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import UnsupportedModelError
from ..repair.linear import Fit, fit_linear_map, token_weights
from ..repair.writers import Run, Writer, find_writers, hook_output
from ..runtime.walk import Batch
from .passes import Observer
from .registry import ORIGINAL, Criterion
from .scores import Scores


@dataclass(frozen=True)
class BlockFit:
    """The map for one block, in float32, and the module of the layer `before` it that the map is applied to."""

    before: int
    writer: Writer
    fit: Fit

    @contextmanager
    def apply(self, layer: nn.Module) -> Iterator[None]:
        """Run the layer as if the map were folded into it."""
        change = self.fit.change

        def correct(output: torch.Tensor) -> torch.Tensor:
            return (output.float() + output.float() @ change.to(output.device)).to(output.dtype)

        with hook_output(self.writer.output_module, correct):
            yield


class Repairability(Observer):
    """Fits a map for every block of the given lengths.

    Args:
        lengths (`Collection[int]`): Block lengths, in layers.
        only (`Collection[tuple[int, ...]]`, *optional*): Fit only these blocks of them.
        keep (`bool`, defaults to `False`): Whether to keep the maps, in `fits`.
        mixtures (`bool`, defaults to `True`): Whether to fit a map to the output of a mixture of experts.
    """

    def __init__(
        self,
        lengths: Collection[int],
        *,
        only: Collection[tuple[int, ...]] | None = None,
        keep: bool = False,
        mixtures: bool = True,
    ) -> None:
        self.lengths, self.only, self.keep, self.mixtures = sorted(lengths), only, keep, mixtures
        self.fits: dict[tuple[int, ...], BlockFit] = {}
        self.shares: dict[tuple[int, ...], float] = {}

    def on_pass_begin(self, alive: Sequence[int], batches: Sequence[Batch]) -> None:
        self.alive = tuple(alive)
        self.position = {layer: position for position, layer in enumerate(alive)}
        # By the position where a block may start: the module before it, its outputs, and the hidden states.
        self.starts: dict[int, tuple[Writer, list[torch.Tensor], list[torch.Tensor]]] = {}

    @contextmanager
    def watch_layer(self, index: int, layer: nn.Module, run: Run, probe: Batch) -> Iterator[None]:
        """Record the outputs of the module that a map would be folded into."""
        # A map of what a norm divides again is not linear: it estimates what a repair gains, but has no score.
        found = find_writers(layer, run, probe, mixtures=self.mixtures)
        writers = [writer for writer in found if writer.norm is None or self.keep]
        self.writer = writers[0] if writers else None
        self.features: list[torch.Tensor] = []
        if self.writer is None:
            yield
            return
        with hook_output(self.writer.output_module, lambda output: self.features.append(output.clone())):
            yield

    def on_layer_end(self, index: int, batches: Sequence[Batch]) -> None:
        """Fit the blocks that end at this layer, and keep the states for blocks that start after it."""
        last = self.position[index]
        for length in self.lengths:
            start = last + 1 - length
            block = self.alive[max(0, start) : last + 1]
            if start in self.starts and (self.only is None or block in self.only):
                self._fit(block, self.alive[start - 1], self.starts[start], batches)
        self.starts.pop(last + 1 - max(self.lengths), None)
        starts = {block[0] for block in self.only or ()}
        if self.writer is not None and (self.only is None or index + 1 in starts):
            self.starts[last + 1] = (self.writer, self.features, [batch.hidden for batch in batches])

    def _fit(
        self,
        block: tuple[int, ...],
        before: int,
        start: tuple[Writer, list[torch.Tensor], list[torch.Tensor]],
        batches: Sequence[Batch],
    ) -> None:
        writer, features, states = start
        rows = (
            (x := feature.view_as(state).float() * writer.gain, batch.hidden.float() - state.float(), token_weights(x))
            for feature, state, batch in zip(features, states, batches, strict=True)
        )
        fit = fit_linear_map(rows, len(batches))
        self.shares[block] = fit.unexplained
        if self.keep:
            self.fits[block] = BlockFit(before, writer, replace(fit, change=fit.change.float()))

    def scores(self) -> Scores:
        if not self.shares:
            raise UnsupportedModelError(
                "no layer of this model has an output projection that a linear map could be folded into (they are quantised "
                "or followed by a norm, say), so repairability has no scores; use kl or perplexity"
            )
        return Scores("repairability", ORIGINAL, self.alive, blocks=self.shares)


def observer(criterion: Criterion, variant: str, num_layers: int, lengths: Sequence[int]) -> Repairability:
    return Repairability(lengths)
