"""One pass over the dense model, for all criteria that look at its states or weights while it runs.

All batches go through a layer before the next one is brought in, so each weight is read once, whatever is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import nn
from tqdm import tqdm

from ..calibration.rows import CalibrationSet
from ..errors import CheckpointError
from ..repair.writers import Run
from ..runtime.mapped import release
from ..runtime.walk import Batch, LayerWalk
from .scores import Scores

# Tokens of a batch: enough to keep a processor busy, few enough that what a layer holds while it runs stays small.
BATCH_TOKENS = 4096
_PROBE_TOKENS = 32


class Observer:
    """Looks on while the dense model runs. A criterion overrides what it needs."""

    def begin(self, alive: Sequence[int], batches: Sequence[Batch]) -> None:
        """The states that enter the first layer are there.

        Args:
            alive (`Sequence[int]`): The layers that run, as indices in the base.
            batches (`Sequence[Batch]`): All rows.
        """

    def weights(self, index: int, layer: nn.Module) -> None:
        """A layer's weights are there, `index` in the base."""

    def watch(self, index: int, layer: nn.Module, run: Run, probe: Batch) -> AbstractContextManager:
        """Hooks that are in place while a layer runs; `probe` is a few tokens on which it may be tried out."""
        return nullcontext()

    def states(self, index: int, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """A layer has run: the states `[batch, seq, hidden]` that entered and left it, of batch `number`."""

    def end(self, index: int, batches: Sequence[Batch]) -> None:
        """All batches have left a layer."""

    def scores(self) -> Scores:
        """What was found."""
        raise NotImplementedError


def batch_rows(calibration: CalibrationSet) -> int:
    """How many rows run at once."""
    samples, length = calibration.input_ids.shape
    return max(1, min(BATCH_TOKENS // length, samples))


@torch.no_grad()
def run_pass(
    walk: LayerWalk, calibration: CalibrationSet, observers: Sequence[Observer], alive: Sequence[int] | None = None
) -> None:
    """Run the model once.

    Args:
        walk (`LayerWalk`): The dense model.
        calibration (`CalibrationSet`): The text.
        observers (`Sequence[Observer]`): What looks on.
        alive (`Sequence[int]`, *optional*): The layers that run; all by default.

    Raises:
        CheckpointError: The states, or a layer's weights, are not finite.
    """
    alive = range(walk.num_layers) if alive is None else alive
    batches = [walk.begin(ids) for ids in calibration.batches(batch_rows(calibration))]
    probe = walk.begin(calibration.input_ids[:1, :_PROBE_TOKENS])
    walk.rest()
    for observer in observers:
        observer.begin(alive, batches)
    for i in tqdm(alive, desc="looking at the dense model", unit="layer", disable=None):
        layer = walk.layers[i]
        with walk.layer(i) as run:
            for observer in observers:
                observer.weights(i, layer)
            with ExitStack() as hooks:
                for observer in observers:
                    hooks.enter_context(observer.watch(i, layer, run, probe))
                for number, batch in enumerate(batches):
                    before, batch.hidden = batch.hidden, run(batch.hidden, batch)
                    if not torch.isfinite(batch.hidden).all():
                        raise not_finite(i, layer, batch.hidden.dtype)
                    for observer in observers:
                        observer.states(i, number, before, batch.hidden)
            probe.hidden = run(probe.hidden, probe)
        for observer in observers:
            observer.end(i, batches)


@torch.no_grad()
def read_weights(
    layers: Sequence[nn.Module], observers: Sequence[Observer], alive: Sequence[int], *, let_go: bool = False
) -> None:
    """Show the weights alone, for observers that need no states, and for models that can't be walked."""
    for i in alive:
        for observer in observers:
            observer.weights(i, layers[i])
        if let_go:
            release(layers[i])


def not_finite(index: int, layer: nn.Module, dtype: torch.dtype) -> CheckpointError:
    """The error for states that are not finite behind a layer, with its cause."""
    for name, parameter in layer.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            return CheckpointError(
                f"layer {index} has weights that are not finite, in {name}: the checkpoint is damaged"
            )
    name = str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"the hidden states that leave layer {index} are not finite in {name}: they are beyond what it holds; load the "
        "model in bfloat16 or float32 (--dtype)"
    )
