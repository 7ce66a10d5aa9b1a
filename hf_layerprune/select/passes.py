"""A single pass over the dense model, shared by all criteria that observe its hidden states or weights.

All batches go through a layer before the next layer is loaded, so each weight is read once, however many criteria were
requested.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import torch
from torch import nn

from ..calibration.rows import CalibrationSet
from ..errors import CheckpointError
from ..repair.writers import Run
from ..runtime.walk import Batch, LayerWalk
from ..screen import progress_bar
from .scores import WIDER_DTYPES, Scores

# Tokens per batch: enough to keep the processor busy, few enough to keep a layer's activations small.
BATCH_TOKENS = 4096
# Positions of a row for which logits exist at a time.
HEAD_TOKENS = 256


class Observer:
    """Observes the dense model while it runs. Each criterion overrides the methods it needs."""

    def on_pass_begin(self, alive: Sequence[int], batches: Sequence[Batch]) -> None:
        """Called before the first layer runs, with the layers that will, and all rows with the states that enter it."""

    def on_layer_weights(self, index: int, layer: nn.Module) -> None:
        """Called when a layer's weights are loaded; `index` is its index in the base."""

    def watch_layer(self, index: int, layer: nn.Module, run: Run, probe: Batch) -> AbstractContextManager:
        """A context that is active while a layer runs, for hooks; `probe` holds a few tokens for trial runs."""
        return nullcontext()

    def on_batch_output(self, index: int, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Called after a layer has run on a batch, with the states `[batch, seq, hidden]` before and after it."""

    def on_layer_end(self, index: int, batches: Sequence[Batch]) -> None:
        """Called after a layer has run on all batches."""

    def scores(self) -> Scores:
        """The scores, after the pass."""
        raise NotImplementedError


def pick_batch_size(calibration: CalibrationSet) -> int:
    """How many rows to run at once."""
    samples, length = calibration.input_ids.shape
    return 1 if calibration.media else max(1, min(BATCH_TOKENS // length, samples))


@torch.no_grad()
def run_pass(
    walk: LayerWalk,
    calibration: CalibrationSet,
    observers: Sequence[Observer],
    alive: Sequence[int] | None = None,
    rows: int | None = None,
) -> None:
    """Run the dense model on the text once, with observers.

    By default, all layers run (`alive`), and batches have as many `rows` as [`pick_batch_size`] says.

    Raises:
        CheckpointError: The states, or a layer's weights, are not finite.
    """
    alive = range(walk.num_layers) if alive is None else alive
    batches = [walk.begin(*given) for given in calibration.batches(rows or pick_batch_size(calibration))]
    probe = walk.begin(*calibration.probe())
    for observer in observers:
        observer.on_pass_begin(alive, batches)
    for i in progress_bar(alive, desc="running the dense model", unit="layer"):
        layer = walk.layers[i]
        with walk.layer(i) as run:
            for observer in observers:
                observer.on_layer_weights(i, layer)
            with ExitStack() as hooks:
                for observer in observers:
                    hooks.enter_context(observer.watch_layer(i, layer, run, probe))
                for number, batch in enumerate(batches):
                    before, batch.hidden = batch.hidden, run(batch.hidden, batch)
                    if not torch.isfinite(batch.hidden).all():
                        raise not_finite_error(i, layer, batch.hidden.dtype)
                    for observer in observers:
                        observer.on_batch_output(i, number, before, batch.hidden)
            probe.hidden = run(probe.hidden, probe)
        for observer in observers:
            observer.on_layer_end(i, batches)


def not_finite_error(index: int, layer: nn.Module, dtype: torch.dtype) -> CheckpointError:
    """The error for a layer that returns non-finite hidden states, with the cause."""
    if error := damaged_weights_error(index, layer):
        return error
    name = str(dtype).removeprefix("torch.")
    return CheckpointError(
        f"the hidden states that leave layer {index} are not finite: they overflow {name}; load the model in {WIDER_DTYPES}"
    )


def damaged_weights_error(index: int, layer: nn.Module) -> CheckpointError | None:
    """The error for a layer with weights that are not finite, if it has any."""
    for name, parameter in layer.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter).all():
            why = "the checkpoint is damaged; use an intact copy"
            if parameter.dtype == torch.float16:
                why = f"they overflow float16, or the checkpoint is damaged; load it in {WIDER_DTYPES}, or use an intact copy"
            return CheckpointError(f"layer {index} has weights that are not finite, in {name}: {why}")
    return None
