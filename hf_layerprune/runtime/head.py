"""How a model turns its last hidden states into logits: measured on the model and checked against its own logits.

In nearly all models the last step is a matrix product with the output embedding; some models then scale or softcap the
result. For those, loss and gradients can be computed from the input of the matrix, a few tokens at a time, without
running the model. The scale and the softcap are measured rather than read from the config: the model's forward pass is
run with known test values in place of the matrix product. The logits of a few tokens are then computed from the
measured transform and compared with the model's own. If they differ, [`OutputHead.states`] returns the model's logits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from ..errors import UnsupportedModelError
from .parts import (
    TrialError,
    agree,
    evaluation_mode,
    input_device,
    probe_ids,
    refuse_quantised,
    replace_forward,
    trial,
)
from .precision import is_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
# The test values range from small enough for a softcap to be linear to large enough for any softcap to show.
_SMALL, _LARGE = 1e-3, 1e5


@dataclass(frozen=True)
class LogitTransform:
    """What a model does after the product with its head: `z -> cap * tanh(scale * z / cap)`, or only `scale * z`."""

    scale: float = 1.0
    cap: float | None = None

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """From the head's product to float32 logits, in place where possible."""
        logits = raw.float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward(self, gradient: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """From the gradient of the logits to that of the head's product, in place."""
        if self.cap is not None and logits is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Head:
    """Maps hidden states to logits.

    It multiplies by a weight `[vocabulary, width]`, adds a bias if there is one, and applies the transform. Without a weight, the states are the logits.
    """

    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    transform: LogitTransform = LogitTransform()

    def raw(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., width]` to `[..., vocabulary]`, before the transform, in newly allocated memory."""
        if self.weight is None:
            return states.clone()
        return F.linear(states.to(self.weight.dtype), self.weight, self.bias)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """`[..., width]` to float32 logits `[..., vocabulary]`, without gradients."""
        with torch.no_grad():
            return self.transform.forward(self.raw(states))


class OutputHead:
    """The output head of a causal language model.

        output = OutputHead(model)
        states = output.states(input_ids=ids)       # [batch, seq, width]
        logits = output.head().logits(states)       # [batch, seq, vocabulary], equal to the model's own

    Args:
        model (`PreTrainedModel`): The model, plain or inside a PEFT model. A few tokens are run through it.

    Raises:
        UnsupportedModelError: The model can't be run on token ids alone, or doesn't return logits for each token.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = input_device(model)
        self._module = model.get_output_embeddings()
        self._transform: LogitTransform | None = None
        ids = probe_ids(model, _PROBE_TOKENS)
        with evaluation_mode(model):
            try:
                with trial():
                    own = model(input_ids=ids, use_cache=False).logits
            except TrialError as error:
                why = f"it can't be run on token ids alone ({error})"
                raise refuse_quantised(model, self.device, error) or self._refusal(why) from error
            if own.shape[:2] != ids.shape:
                raise self._refusal(f"for input_ids of shape {list(ids.shape)} its logits have {list(own.shape)}")
            self.vocabulary: int = own.shape[-1]
            self.not_linear = self._why_not_linear(ids, own)
        if self.not_linear:
            logger.info("using the logits of %s as the model computes them: %s", type(model).__name__, self.not_linear)

    @property
    def is_linear(self) -> bool:
        """Whether states are the input of the output embedding; otherwise they are the model's own logits."""
        return self._transform is not None

    @property
    def width(self) -> int:
        """Size of a token's states."""
        return self._linear.weight.shape[1] if self.is_linear else self.vocabulary

    @torch.compiler.disable(recursive=False)
    def states(self, *args: Any, run: Callable[..., Any] | None = None, **kwargs: Any) -> torch.Tensor:
        """Run the model up to its head.

        `run` is called instead of the model if it is given, such as the forward method that was patched. Returns what `head()` takes, `[batch, seq, width]`. Gradients flow if they are enabled.
        """
        run = run or self.model
        if not self.is_linear:
            return run(*args, **kwargs).logits
        kept: list[torch.Tensor] = []

        def record(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            kept.append(states)
            return states[..., :1].detach()  # a placeholder: the logits are discarded

        with replace_forward([self._module], record):
            run(*args, **kwargs)
        return kept[0]

    def head(self) -> Head:
        """The head with its current weights. Sharded weights are gathered."""
        if self._transform is None:
            return Head()
        weight, bias = (
            tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for tensor in (self._linear.weight, self._linear.bias)
        )
        return Head(weight, bias, self._transform)

    # --- measuring the transform -------------------------------------------------------------------------

    @property
    def _linear(self) -> nn.Linear:
        """The linear layer itself: PEFT's trained copy where there is one."""
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(self._module, ModulesToSaveWrapper) and not self._module.disable_adapters:
            return self._module.modules_to_save[self._module.active_adapters[0]]
        return getattr(self._module, "original_module", self._module)

    def _why_not_linear(self, ids: torch.Tensor, own: torch.Tensor) -> str:
        """Why states can't be the input of the output embedding; empty if they can."""
        linear = self._linear
        if linear is None or type(linear).forward is not nn.Linear.forward or is_packed(linear.weight):
            return "its output embedding is not a plain matrix"
        if linear.weight.is_meta:
            return "its output embedding is offloaded, and in memory only while it runs"
        try:
            with trial():
                self._transform = self._measure_transform(ids)
                if self._transform is None:
                    return "it does more after its output embedding than scale and softcap"
                logits = self.head().logits(self.states(input_ids=ids, use_cache=False))
        except TrialError as error:
            self._transform = None
            return f"it can't be run without its output embedding ({error})"
        if not agree(logits, own):
            self._transform = None
            return "its logits depend on more than its output embedding"
        return ""

    def _measure_transform(self, ids: torch.Tensor) -> LogitTransform | None:
        """What the model does after the product with its head, if that is a scale and possibly a softcap."""
        vocabulary = self._linear.weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        shape = (*ids.shape, vocabulary)
        signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
        sizes = torch.empty(shape).uniform_(generator=generator)
        raw = (signs * _SMALL * (_LARGE / _SMALL) ** sizes).to(self._linear.weight.device)
        raw[..., :2] = torch.tensor([_SMALL, _LARGE])
        calls: list[Any] = []

        def inject(states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            calls.append(states.shape)
            return raw.clone()

        with replace_forward([self._module], inject):
            logits = self.model(input_ids=ids, use_cache=False).logits
        if len(calls) != 1 or calls[0][:-1] != ids.shape or (logits.shape, logits.dtype) != (raw.shape, raw.dtype):
            return None
        scale = _round_off((logits[..., 0] / raw[..., 0]).median().item())
        largest = _round_off(logits[..., 1].abs().max().item())
        transform = LogitTransform(scale, largest if largest < 0.9 * abs(scale) * _LARGE else None)
        return transform if torch.allclose(transform.forward(raw.clone()), logits, rtol=1e-2, atol=0) else None

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{type(self.model).__name__} can't be healed or evaluated: {why}. Only drop its layers "
            "(hf-layerprune prune), and train it with its own trainer"
        )


def _round_off(number: float) -> float:
    """A short number that differs only by the rounding of float32, such as 1.6 for 1.600000024, if there is one."""
    short = float(f"{number:.6g}")
    return short if math.isclose(short, number, rel_tol=2e-7) else number
