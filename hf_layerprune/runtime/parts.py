"""What running a model by parts is made of: modules that do something else for a while, and layers that hand on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

# What can go wrong in a model that can't be run by parts.
TROUBLE = (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError)


@contextmanager
def replaced_forward(modules: Sequence[nn.Module], *forwards: Callable[..., Any]) -> Iterator[None]:
    """Replace what modules do.

    Args:
        modules (`Sequence[nn.Module]`): Which modules.
        forwards (`Callable`): What they do instead while this lasts: one function for all, or one for each.
    """
    each = forwards * len(modules) if len(forwards) == 1 else forwards
    with ExitStack() as stack:
        for module, forward in zip(modules, each, strict=True):
            if "forward" in vars(module):  # such as where accelerate moves weights to a device
                stack.callback(setattr, module, "forward", vars(module)["forward"])
            else:
                stack.callback(delattr, module, "forward")
            module.forward = forward
        yield


@contextmanager
def hooked(*handles: Any) -> Iterator[None]:
    """Remove hooks in the end.

    Args:
        handles: What `register_forward_hook` returned.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Run models in evaluation mode and without gradients; afterwards, every module is in the mode it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in what a layer returns."""
    return output[0] if isinstance(output, tuple | list) else output


def returned(output: Any) -> int | None:
    """How many values a layer returns; `None` for a bare tensor."""
    return len(output) if isinstance(output, tuple | list) else None


def layer_stub(
    instead: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor], returns: Callable[[], int | None]
) -> Callable[..., Any]:
    """A function to call in place of a layer.

    Args:
        instead (`Callable`): From the hidden states that enter the layer, and the other arguments that it is called
            with, to the hidden states that leave it.
        returns (`Callable`): How many values the layer returns, see [`returned`].

    Returns:
        `Callable`: It takes what the layer takes and returns what the layer returns, with `None` for what is not
            hidden states.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            hidden = instead(args[0], args[1:], kwargs)
        else:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            hidden = instead(kwargs["hidden_states"], (), others)
        count = returns()
        return hidden if count is None else (hidden, *[None] * (count - 1))

    return forward


def probe_ids(model: Any, tokens: int) -> torch.Tensor:
    """A row of tokens to try a model on, `[1, tokens]`, without the special tokens that come first in vocabularies."""
    ids = torch.arange(3, 3 + tokens)[None] % model.config.get_text_config().vocab_size
    return ids.to(model.get_input_embeddings().weight.device)


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two ways to compute the same tensor agree, to the precision of the second's type."""
    if one.shape != other.shape:
        return False
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(other.dtype, 2e-2)
    one, other = one.to(other.device).float().nan_to_num(), other.float().nan_to_num()
    return bool((one - other).norm() <= tolerance * other.norm())
