"""Taylor: the first-order change of the loss if a layer's weights were set to zero.

Original (Shortened LLaMA, arXiv:2402.02834, and arXiv:2411.15558, section 3): `sum_k sum |W_k * dL/dW_k|`, where `L`
is the mean loss per token over the whole calibration set. Paper (the code of arXiv:2411.15558): `L` is the sum of the
mean losses of batches of ten rows, so `n` full batches give `n` times the score and the same order. The weights of
norms are included; biases are not.

A forward pass keeps the input of each layer. A backward pass then goes through the layers from the last to the first:
it runs a layer again on all batches, sums the gradients of its weights, and passes the gradient of its input on to the
layer below. Only one layer's gradients are in memory at a time. They are those of each batch's mean loss, which in
float16 keep digits that those of its share in the whole loss would not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..calibration.rows import CalibrationSet
from ..errors import CutError
from ..runtime.memory import free_bytes
from ..runtime.walk import Batch, LayerWalk
from ..screen import progress_bar
from .magnitude import weight_matrices
from .passes import HEAD_TOKENS, Observer, pick_batch_size, run_pass
from .registry import ORIGINAL, PAPER
from .scores import Scores

_WEIGHT_ROWS = 256
_PAPER_BATCH = 10


def score(
    walk: LayerWalk, calibration: CalibrationSet, variant: str = ORIGINAL, alive: Sequence[int] | None = None
) -> Scores:
    """Score the layers that are alive, by default all.

    Raises:
        CutError: The hidden states that enter the layers don't fit into memory, or there can't be gradients.
    """
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in walk.model.parameters()):
        raise CutError(
            "taylor needs gradients, which neither torch.inference_mode() nor a model that was loaded inside it has; use "
            "torch.no_grad() instead"
        )
    alive = list(range(walk.num_layers) if alive is None else alive)
    device = _pick_state_device(walk, calibration, len(alive))
    for i in alive:
        weight_matrices(walk.layers[i], i)  # refuses packed weights before any work is done
    rows = _PAPER_BATCH if variant == PAPER else pick_batch_size(calibration)
    with _frozen(walk.model):
        recorder = _InputRecorder(device)
        run_pass(walk, calibration, [recorder], alive, rows)
        batches, layer_inputs = recorder.batches, recorder.layer_inputs
        counts = [int(batch.text_positions[:, :-1].sum()) for batch in batches]
        shares = [1.0 if variant == PAPER else tokens / sum(counts) for tokens in counts]
        grad_outputs = [_loss_gradient(walk, batch, tokens) for batch, tokens in zip(batches, counts, strict=True)]
        scores: list[float | None] = [None] * walk.num_layers
        for i in progress_bar(alive[::-1], desc="taylor", unit="layer"):
            scores[i] = _backward(walk, i, batches, layer_inputs.pop(), grad_outputs, shares)
    return Scores("taylor", variant, tuple(alive), layers=scores)


class _InputRecorder(Observer):
    """Keeps the hidden states that enter each layer, on the given device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def on_pass_begin(self, alive: Sequence[int], batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.layer_inputs: list[list[Any]] = []

    def on_layer_weights(self, index: int, layer: nn.Module) -> None:
        self.layer_inputs.append([batch.hidden.to(self.device) for batch in self.batches])


def _backward(
    walk: LayerWalk,
    index: int,
    batches: Sequence[Batch],
    layer_inputs: list[Any],
    grad_outputs: list[torch.Tensor],
    shares: Sequence[float],
) -> float:
    """One layer's score. `grad_outputs` holds the gradients with respect to its output, and on return to its input.

    The sum of the weights' gradients has a factor for each batch, its share.
    """
    weights = weight_matrices(walk.layers[index], index)
    sums: list[Any] = [None] * len(weights)
    with walk.layer(index) as run, torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for number, batch in enumerate(batches):
                hidden = layer_inputs[number].to(walk.device).detach().requires_grad_(True)
                layer_inputs[number] = None
                output = run(hidden, batch)
                gradients: list[Any] = list(
                    torch.autograd.grad(
                        output, [hidden, *weights], grad_outputs[number].to(output.dtype), allow_unused=True
                    )
                )
                grad_outputs[number] = gradients.pop(0)
                del output, hidden
                for k in range(len(weights)):
                    gradient, gradients[k] = gradients[k], None  # frees the memory
                    if gradient is None:
                        continue
                    if len(batches) == 1:  # nothing is accumulated, so its dtype will do
                        sums[k] = gradient
                    elif sums[k] is None:
                        sums[k] = gradient.float().mul_(shares[number])
                    else:
                        sums[k].add_(gradient, alpha=shares[number])
                    del gradient
        finally:
            for weight in weights:
                weight.requires_grad_(False)
        return sum(
            _sum_of_products(weight.detach(), gradient)
            for weight, gradient in zip(weights, sums, strict=True)
            if gradient is not None
        )


def _sum_of_products(weight: torch.Tensor, gradient: torch.Tensor) -> float:
    """`sum |W * G|`, a few rows at a time, since a whole product in float32 could be twice as large as the weights."""
    pieces = zip(weight.split(_WEIGHT_ROWS), gradient.split(_WEIGHT_ROWS), strict=True)
    return sum((w.float() * g).abs().sum(dtype=torch.float64).item() for w, g in pieces)


def _loss_gradient(walk: LayerWalk, batch: Batch, tokens: int) -> torch.Tensor:
    """The gradient of the summed loss divided by `tokens`, with respect to the output of the last layer."""
    gradient = torch.zeros_like(batch.hidden)
    for row, ids in enumerate(batch.input_ids):
        for start in range(0, len(ids) - 1, HEAD_TOKENS):
            targets = ids[start + 1 : start + 1 + HEAD_TOKENS]
            mask = batch.text_positions[row, start : start + len(targets)]
            piece = batch.hidden[row : row + 1, start : start + len(targets)].detach().requires_grad_(True)
            with torch.enable_grad():
                loss = F.cross_entropy(walk.logits(piece)[0].float()[mask], targets[mask], reduction="sum") / tokens
                (gradient[row : row + 1, start : start + len(targets)],) = torch.autograd.grad(loss, piece)
    batch.hidden = batch.hidden.new_empty(0)  # frees the memory
    return gradient


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Disable gradients for all parameters, and restore the settings afterwards."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def _pick_state_device(walk: LayerWalk, calibration: CalibrationSet, layers: int) -> torch.device:
    """The device that keeps the states that enter all layers: that of the walk, or the CPU if they would fill half of a
    GPU.
    """
    width = walk.model.config.get_text_config().hidden_size
    needed, free = calibration.tokens * width * walk.model.dtype.itemsize * layers, 0
    for device in dict.fromkeys((walk.device, torch.device("cpu"))):
        free = free_bytes(device) // (1 if device.type == "cpu" else 2)
        if needed <= free:
            return device
    samples = len(calibration)
    raise CutError(
        f"taylor keeps the input of every layer, {needed / 1e9:.1f} GB for {samples} rows, but only "
        f"{free / 1e9:.1f} GB are free; use calibration_samples={max(1, int(samples * free / needed / 2))}"
    )
