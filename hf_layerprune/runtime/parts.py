"""Helpers for running a model in parts: temporary forward methods and stubs that stand in for layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModelError, cause_of
from ..families import text_config
from .devices import is_offloaded
from .memory import is_out_of_memory


class TrialError(Exception):
    """A model failed in a trial run; the message is the cause on one line."""


@contextmanager
def trial() -> Iterator[None]:
    """Turn the exceptions of a model that can't be run in parts into one error; running out of memory is passed on.

    Raises:
        TrialError: The model failed.
    """
    try:
        yield
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        raise TrialError(cause_of(error)) from error


def refuse_quantised(model: nn.Module, device: torch.device, error: TrialError) -> UnsupportedModelError | None:
    """The refusal of quantised weights whose kernels failed, as some do on some shapes or devices; `None` for others."""
    if not getattr(model, "is_quantized", False):
        return None
    return UnsupportedModelError(
        f"the quantised weights of {type(model).__name__} can't be run on the device {device} ({error}); use another device, "
        "or use the unquantised model"
    )


@contextmanager
def replace_method(owner: Any, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one object inside a `with` block."""
    own = vars(owner).get(name)  # replaced already, such as by accelerate's hooks
    setattr(owner, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


@contextmanager
def replace_forward(modules: Sequence[nn.Module], *forwards: Callable[..., Any]) -> Iterator[None]:
    """Replace the forward methods of modules inside a `with` block, by one function for all or one for each."""
    each = forwards * len(modules) if len(forwards) == 1 else forwards
    with ExitStack() as stack:
        for module, forward in zip(modules, each, strict=True):
            stack.enter_context(replace_method(module, "forward", forward))
        yield


@contextmanager
def hook_scope(*handles: Any) -> Iterator[None]:
    """Remove hooks, as returned by `register_forward_hook`, at the end of a `with` block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_dropout(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode inside a `with` block; then restore each module's mode."""
    training = [module for model in models for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, without gradients, inside a `with` block; then restore each module's mode."""
    with without_dropout(*models), torch.no_grad():
        yield


def hidden_of(output: Any) -> torch.Tensor:
    """The hidden states in a layer's output."""
    return output[0] if isinstance(output, tuple | list) else output


def cache_of(output: Any) -> Any:
    """The cache in what a model returns, or `None`; before version 5.24, transformers calls it `past_key_values`."""
    return output.cache if hasattr(output, "cache") else getattr(output, "past_key_values", None)


def num_values(output: Any) -> int | None:
    """How many values a layer returns; `None` for a bare tensor."""
    return len(output) if isinstance(output, tuple | list) else None


def layer_stub(
    replacement: Callable[[torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor],
    returns: Callable[[], int | None],
) -> Callable[..., Any]:
    """A forward method that stands in for a layer's.

    Args:
        replacement (`Callable`): Takes the layer's input hidden states and its other arguments, positional and keyword,
            and returns the layer's output hidden states.
        returns (`Callable`): How many values the layer returns, see [`num_values`].

    Returns:
        `Callable`: It has the layer's arguments and return values, with `None` for every value but the hidden states.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            hidden = replacement(args[0], args[1:], kwargs)
        else:
            others = {name: value for name, value in kwargs.items() if name != "hidden_states"}
            hidden = replacement(kwargs["hidden_states"], (), others)
        count = returns()
        return hidden if count is None else (hidden, *[None] * (count - 1))

    return forward


def input_device(model: Any) -> torch.device:
    """Where a model takes its input. Where its embeddings are offloaded, accelerate moves it there from the CPU."""
    table = model.get_input_embeddings()
    return torch.device("cpu") if is_offloaded(table) else next(table.parameters()).device


def probe_ids(model: Any, tokens: int) -> torch.Tensor:
    """Token ids for trying a model, `[1, tokens]`, without the special tokens at the start of vocabularies."""
    return torch.arange(3, 3 + tokens, device=input_device(model))[None] % text_config(model.config).vocab_size


# Models mask logits with infinity, or with the least number of a type. Beside those, all others would be rounding.
_LARGEST = 1e15


def zero_masked(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Two tensors of one shape in float32, with 0 in place of what both mask, or where neither is a number.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`, *optional*: `None` if they differ in what they mask, or in what is a number.
    """
    limit = min(torch.finfo(other.dtype).max, _LARGEST)
    one, other = (each.to(other.device).float().clamp(-limit, limit) for each in (one, other))
    compared = (one.abs() < limit) & (other.abs() < limit)
    if not torch.allclose(one[~compared], other[~compared], rtol=0, atol=0, equal_nan=True):
        return None
    return one.where(compared, 0), other.where(compared, 0)


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The root mean square over tokens of the error of each, `[..., width]`, relative to its own size.

    In a norm over all tokens, the first one, whose states may be a thousand times as large, would hide the others.
    """
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-12)).square().mean().sqrt().item()


def agree(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors `[..., width]` agree to the precision of the second one's type."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(other.dtype, 2e-2)
    if one.shape != other.shape or (both := zero_masked(one, other)) is None:
        return False
    return relative_error(*both) <= tolerance
