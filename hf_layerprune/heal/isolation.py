"""Whether the rows of a batch see each other: what a model computes for them is then no property of a row."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..families.layout import find_decoder_layers
from ..runtime.parts import TrialError, agree, hook_scope, trial

logger = logging.getLogger(__name__)

_TF32 = 2**-9  # twice the rounding of products in float32 on a GPU, at worst
States = Callable[[Sequence[int]], list[torch.Tensor]]
Split = Callable[[torch.Tensor, Sequence[int]], list[torch.Tensor]]


def rows_are_isolated(rows: Sequence[int], states: States, split: Split, model: Any, first: int) -> bool:
    """Whether the states of some rows don't depend on the other rows in their batch; `False` if it can't be told.

    A row whose states differ when it runs alone need not see the others: rounding can send tokens to other experts. A
    difference counts as rounding if noise has as much effect, and no gradient leads from one row to another.

    Args:
        rows (`Sequence[int]`): The rows, by their numbers.
        states (`Callable`): Runs rows, given by their numbers, as one batch; returns the states `[seq, hidden]` of each.
        split (`Callable`): Divides a tensor that the batch of some rows gave into a part for each row.
        model (`PreTrainedModel`): What runs.
        first (`int`): The first of the model's layers that runs.
    """
    alone = [states([row])[0] for row in rows]
    device = alone[0].device.type
    mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    together = [part.to(dtype=mixed) for part in states(rows)]
    if all(map(agree, alone, together)):
        return True
    try:
        with trial():
            layers = find_decoder_layers(model).layers[first:]
            noisy = _run_noisy(rows, states, layers, together[0])
            for one, part, other in zip(alone, together, noisy, strict=True):
                if not (one - part).float().norm() <= (one - other).float().norm():
                    return False
            return _gradients_stay_in_rows(rows, states, split, layers[0])
    except TrialError as error:  # such as a kernel without gradients, or a layer with other arguments
        logger.info("it can't be told whether rows are kept apart: %s", error)
        return False


def _run_noisy(
    rows: Sequence[int], states: States, layers: Iterable[nn.Module], like: torch.Tensor
) -> list[torch.Tensor]:
    """The states of each row alone, with some more noise in the input of each layer than rounding makes."""
    scale, noise = max(2 * torch.finfo(like.dtype).eps, _TF32), torch.Generator(like.device).manual_seed(0)

    def add_noise(hidden: torch.Tensor) -> torch.Tensor:
        factors = 1 + scale * torch.randn(hidden.shape, generator=noise, device=like.device)
        return hidden * factors.to(hidden.dtype)

    with hook_scope(*(_hook_input(layer, add_noise) for layer in layers)):
        return [states([row])[0] for row in rows]


def _gradients_stay_in_rows(rows: Sequence[int], states: States, split: Split, layer: nn.Module) -> bool:
    """Whether the states of each row have gradients in that row alone, at the input of the first layer that runs.

    Those of masked tokens are exactly 0. So are all that a kernel without gradients lets through, so one must lead
    from the last token of a row to another one of the same row.
    """
    inputs: list[torch.Tensor] = []

    def capture_input(hidden: torch.Tensor) -> torch.Tensor:
        if inputs:  # some models run a layer several times
            return hidden
        inputs.append(hidden.detach().requires_grad_())
        return inputs[0].clone()  # the layer may change it in place

    def input_gradients(states: torch.Tensor) -> list[torch.Tensor]:
        # A norm's output has the same sum, and sum of squares, whatever its input.
        (gradient,) = torch.autograd.grad(states, inputs, states.detach() ** 2, retain_graph=True)
        return split(gradient, rows)

    with torch.inference_mode(False), torch.enable_grad():
        with hook_scope(_hook_input(layer, capture_input)):
            parts = states(rows)
        for row, part in enumerate(parts):
            if any(bool(one.any()) for other, one in enumerate(input_gradients(part)) if other != row):
                return False
            if not input_gradients(part[-1:])[row][:-1].any():
                raise ValueError("gradients don't lead from one token to another")
    return True


def _hook_input(layer: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Change the hidden states that enter a layer, until the returned handle is removed."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    return layer.register_forward_pre_hook(hook, with_kwargs=True)
