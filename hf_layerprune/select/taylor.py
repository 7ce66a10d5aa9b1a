"""Taylor: the change of the loss, to first order, if a layer's weights were zero.

Original (Shortened LLaMA, arXiv:2402.02834, and arXiv:2411.15558, section 3): `sum_k sum |W_k * dL/dW_k|`, with `L`
the mean loss of a token of the whole calibration set. Paper: as the code of arXiv:2411.15558 has it: `W * dL/dW` summed
with its sign over batches of ten rows, each with the mean loss of its own, and then made absolute. Weights count,
biases don't.

One forward pass keeps what enters each layer. Then one backward pass, layer by layer from the end: a layer is run again
with all batches, its gradients are summed, and the gradient of its input is handed down. So there are never more
gradients than one layer's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from ..calibration.rows import CalibrationSet
from ..errors import CutError
from ..runtime.walk import Batch, LayerWalk
from .magnitude import weight_matrices
from .passes import batch_rows, not_finite
from .registry import ORIGINAL, PAPER
from .scores import Scores

_HEAD_TOKENS = 256
_WEIGHT_ROWS = 256
_PAPER_BATCH = 10


def score(
    walk: LayerWalk, calibration: CalibrationSet, variant: str = ORIGINAL, alive: Sequence[int] | None = None
) -> Scores:
    """Score all layers.

    Args:
        walk (`LayerWalk`): The dense model.
        calibration (`CalibrationSet`): The text.
        variant (`str`, defaults to `"original"`): Or `"paper"`.
        alive (`Sequence[int]`, *optional*): The layers that run; all by default.

    Returns:
        `Scores`: By layer.

    Raises:
        CutError: What enters each layer does not fit into memory for so many rows.
    """
    alive = list(range(walk.num_layers) if alive is None else alive)
    _check_memory(walk, calibration, len(alive))
    for i in alive:
        weight_matrices(walk.layers[i], i)  # refuses packed weights before the work
    parts = calibration.input_ids.split(_PAPER_BATCH if variant == PAPER else batch_rows(calibration))
    with _frozen(walk.model):
        batches = [walk.begin(ids) for ids in parts]
        walk.rest()
        entering: list[list[torch.Tensor]] = []
        with tqdm(total=2 * len(alive), desc="taylor", unit="layer", disable=None) as bar:
            for i in alive:
                entering.append([batch.hidden for batch in batches])
                with walk.layer(i) as run, torch.no_grad():
                    for batch in batches:
                        batch.hidden = run(batch.hidden, batch)
                        if not torch.isfinite(batch.hidden).all():
                            raise not_finite(i, walk.layers[i], batch.hidden.dtype)
                bar.update()
            total = sum(ids[:, 1:].numel() for ids in parts)
            down = [
                _loss_gradient(walk, batch, batch.input_ids[:, 1:].numel() if variant == PAPER else total)
                for batch in batches
            ]
            walk.rest()
            found: list[float | None] = [None] * walk.num_layers
            for i in reversed(alive):
                found[i] = _backward(walk, i, batches, entering.pop(), down)
                bar.update()
    return Scores("taylor", variant, tuple(alive), layers=found)


def _backward(
    walk: LayerWalk, index: int, batches: Sequence[Batch], entering: list[Any], down: list[torch.Tensor]
) -> float:
    """One layer's score. `down` holds the gradients of what leaves it, and afterwards of what enters it."""
    weights = [weight for _, weight in weight_matrices(walk.layers[index], index)]
    sums: list[Any] = [None] * len(weights)
    with walk.layer(index) as run, torch.enable_grad():
        for weight in weights:
            weight.requires_grad_(True)
        try:
            for number, batch in enumerate(batches):
                hidden = entering[number].detach().requires_grad_(True)
                entering[number] = None
                output = run(hidden, batch)
                gradients: list[Any] = list(
                    torch.autograd.grad(output, [hidden, *weights], down[number].to(output.dtype), allow_unused=True)
                )
                down[number] = gradients.pop(0)
                del output, hidden
                for k in range(len(weights)):
                    gradient, gradients[k] = gradients[k], None
                    if gradient is None:
                        continue
                    if sums[k] is not None:
                        sums[k].add_(gradient)
                    else:  # there is nothing to add to a single batch's
                        sums[k] = gradient if len(batches) == 1 else gradient.float()
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
    """`sum |W * G|`, a few rows at a time: in float32 a whole product would take twice the weights."""
    pieces = zip(weight.split(_WEIGHT_ROWS), gradient.split(_WEIGHT_ROWS), strict=True)
    return sum((w.float() * g).abs().sum(dtype=torch.float64).item() for w, g in pieces)


def _loss_gradient(walk: LayerWalk, batch: Batch, tokens: int) -> torch.Tensor:
    """The gradient of the summed loss over `tokens`, with respect to the states that leave the last layer."""
    gradient = torch.zeros_like(batch.hidden)
    for row, ids in enumerate(batch.input_ids):
        for start in range(0, len(ids) - 1, _HEAD_TOKENS):
            targets = ids[start + 1 : start + 1 + _HEAD_TOKENS]
            piece = batch.hidden[row : row + 1, start : start + len(targets)].detach().requires_grad_(True)
            with torch.enable_grad():
                loss = F.cross_entropy(walk.logits(piece)[0].float(), targets, reduction="sum") / tokens
                (gradient[row : row + 1, start : start + len(targets)],) = torch.autograd.grad(loss, piece)
    batch.hidden = batch.hidden.new_empty(0)  # what is not needed is let go of
    return gradient


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients but those that are asked for."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


def state_bytes(walk: LayerWalk, calibration: CalibrationSet, layers: int) -> int:
    """What the states that enter all layers take."""
    return (
        calibration.input_ids.numel()
        * walk.model.config.get_text_config().hidden_size
        * walk.model.dtype.itemsize
        * layers
    )


def _check_memory(walk: LayerWalk, calibration: CalibrationSet, layers: int) -> None:
    needed = state_bytes(walk, calibration, layers)
    free = torch.cuda.mem_get_info(walk.device)[0] if walk.device.type == "cuda" else psutil.virtual_memory().available
    if needed > free:
        samples = len(calibration)
        raise CutError(
            f"taylor keeps what enters each layer, {needed / 1e9:.1f} GB for {samples} rows, and {free / 1e9:.1f} GB are "
            f"free; use calibration_samples={max(1, int(samples * free / needed / 2))}"
        )
