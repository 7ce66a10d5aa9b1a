"""Cross-entropy and distillation from last hidden states, without holding the logits of all tokens.

The head runs over a chunk of tokens at a time, and each chunk's gradients are computed before its logits are freed:
one product for the student's logits, two for the gradients, one for the teacher's logits, and nothing is computed
twice. Logits stay in the type of the product, and are overwritten by their gradients.

In float16, gradients of losses that are divided by the tokens of a step would be rounded away before a loss scale could
help. So they are computed with weights that are divided by their sum, and `backward` multiplies them by it, in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..runtime.head import Head, LogitTransform

# Approximate size of a chunk's logits. With a teacher, two such buffers exist at a time. On a GPU, adding each chunk's
# gradient to that of a trained head is much of the work, so larger chunks are faster.
CHUNK_BYTES, DEVICE_CHUNK_BYTES = 32 * 2**20, 256 * 2**20
# On a CPU, a chunk's logits are processed in float32 in parts that are small enough to stay in the cache.
_CACHED_BYTES = 2**20
# On a CPU, the rows of the head's gradient that are computed at a time: the whole product takes twice as long as its
# parts, and memory for a transposed copy.
_WEIGHT_ROWS = 8192


class HeadLoss(NamedTuple):
    """The loss of some tokens.

    Args:
        loss (`torch.Tensor`): The weighted sum over tokens; gradients flow from here.
        ce (`torch.Tensor`): Cross-entropy, summed over the tokens with a label, without gradient.
        kd (`torch.Tensor`): Divergence from the teacher, summed over the tokens of the mask, without gradient.
        correct (`torch.Tensor`): How many labels are the student's top-1 token.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class Distillation:
    """The teacher's side of the loss for some tokens: how far its distribution p is from the student's q.

    Args:
        hidden (`torch.Tensor`): The teacher's states `[tokens, teacher's width]`, the input of its head.
        head (`Head`): The teacher's head, which gets no gradient.
        mask (`torch.Tensor`): The tokens to distil on, boolean `[tokens]`.
        weight (`torch.Tensor`): Weight of each of them, a scalar.
        temperature (`float`, defaults to 1.0): Logits of both are divided by it, and the loss is multiplied by its
            square, so that gradients keep their scale (arXiv:1503.02531).
        direction (`str`, defaults to `"forward"`): `"forward"` for KL(p || q), which is mode-covering, or `"reverse"`
            for KL(q || p), which is mode-seeking.
    """

    hidden: torch.Tensor
    head: Head
    mask: torch.Tensor
    weight: torch.Tensor
    temperature: float = 1.0
    direction: str = "forward"


def head_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    ce_weight: torch.Tensor | None,
    distillation: Distillation | None = None,
    *,
    accumulate: bool = False,
) -> HeadLoss:
    """Weighted cross-entropy and divergence from a teacher, summed over tokens.

    Args:
        hidden (`torch.Tensor`): The student's states `[tokens, width]`, the input of its head.
        head (`Head`): The student's head.
        labels (`torch.Tensor`): The next tokens `[tokens]`, -100 for tokens without a label.
        ce_weight (`torch.Tensor`, *optional*): Weight of a labelled token's cross-entropy, a scalar. Without one,
            cross-entropy is only reported.
        distillation (`Distillation`, *optional*): The teacher's side.
        accumulate (`bool`, defaults to `False`): Add the gradient of the head's weights to their `grad` directly,
            which saves a second matrix of their size; ignored in float16. Use it only if `backward` is called on this
            loss without scaling it: otherwise `backward` raises a `RuntimeError`.
    """
    weight, into = head.weight, None
    if accumulate and weight is not None and weight.requires_grad and weight.is_leaf and torch.is_grad_enabled():
        hooks = weight._backward_hooks or weight._post_accumulate_grad_hooks
        if weight.dtype == torch.float32 and not hooks:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            into = weight.grad
    return HeadLoss(
        *_HeadLossFunction.apply(hidden, weight, head.bias, head.transform, labels, ce_weight, distillation, into)
    )


class _HeadLossFunction(torch.autograd.Function):
    """Loss and gradients in one pass, chunk by chunk; `backward` only scales what `forward` computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        labels: torch.Tensor,
        ce_weight: torch.Tensor | None,
        distillation: Distillation | None,
        into: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        device, on_cpu = hidden.device, hidden.device.type == "cpu"
        autocast = weight is not None and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        half = dtype == torch.float16
        if half:
            into = None  # what is added to it could not be multiplied later
        losses = _TokenLosses(labels, ce_weight, distillation, half=half)
        vocabulary = hidden.shape[1] if weight is None else weight.shape[0]
        chunk_bytes, weight_rows = (CHUNK_BYTES, _WEIGHT_ROWS) if on_cpu else (DEVICE_CHUNK_BYTES, vocabulary)
        tokens = max(1, chunk_bytes // (dtype.itemsize * vocabulary))
        # In float16, sums over a chunk's tokens could overflow, so they are divided by a power of two.
        shrink = 2.0 ** -min(tokens, len(hidden)).bit_length() if half else 1.0
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden: Any = torch.empty_like(hidden, dtype=torch.float32 if half else None) if wants_hidden else None
        d_weight: Any = _zeros_like(weight) if wants_weight and into is None else into
        d_bias: Any = _zeros_like(bias) if wants_bias else None
        with torch.autocast(device.type, enabled=False):
            # Casting the weights for each chunk would take as long as the products, so they are cast once.
            matrix = None if weight is None else weight.detach().to(dtype)
            head = Head(matrix, None if bias is None else bias.to(dtype), transform)
            for chunk in _slices(0, len(hidden), tokens):
                states = hidden[chunk].to(dtype)
                gradient = losses.chunk_gradient(head, states, chunk)
                if wants_bias:
                    d_bias += gradient.sum(0, dtype=d_bias.dtype)
                if wants_hidden:
                    d_hidden[chunk] = gradient if matrix is None else gradient @ matrix
                if wants_weight:
                    if half:
                        states = states * shrink
                    for part, out in zip(gradient.split(weight_rows, 1), d_weight.split(weight_rows), strict=True):
                        out += part.T @ states
        ctx.save_for_backward(d_hidden, d_weight if into is None else None, d_bias)
        ctx.accumulated = into is not None
        ctx.unit, ctx.shrink = losses.unit, shrink
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.mark_non_differentiable(*losses.sums[1:])
        return tuple(losses.sums)

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        if ctx.accumulated and d_loss != 1:
            raise RuntimeError(
                f"the loss was multiplied by {d_loss.item()} after the head's gradient had been added up; use "
                "accumulate=False"
            )
        if ctx.unit is not None:
            d_loss = d_loss * ctx.unit
        return (
            None if d_hidden is None else (d_hidden * d_loss.to(d_hidden.dtype)).to(hidden_dtype),
            None if d_weight is None else d_weight.mul_(d_loss / ctx.shrink).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(d_loss).to(bias_dtype),
            *(None,) * 5,
        )


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _zeros_like(parameter: torch.Tensor | None) -> torch.Tensor | None:
    return None if parameter is None else torch.zeros_like(parameter, dtype=torch.float32)


class _TokenLosses:
    """Adds up the losses of tokens in `sums`, and computes the gradients of their logits; for arguments, see [`head_loss`].

    With `half`, as in float16, gradients but not losses are divided by `unit`: the sum of the factors of a token's
    gradients, or a tiny number if that is zero.
    """

    def __init__(
        self, labels: torch.Tensor, ce_weight: torch.Tensor | None, distillation: Distillation | None, *, half: bool
    ) -> None:
        self.labels, self.ce_weight, self.distillation = labels, ce_weight, distillation
        self.sums = HeadLoss(*torch.zeros(4, device=labels.device).unbind())
        self.unit: torch.Tensor | None = None
        if half:
            total = torch.zeros((), device=labels.device)
            if ce_weight is not None:
                total = total + ce_weight
            if distillation is not None:
                total = total + distillation.weight * distillation.temperature
            self.unit = total.clamp(min=torch.finfo(total.dtype).tiny)

    def chunk_gradient(self, head: Head, states: torch.Tensor, chunk: slice) -> torch.Tensor:
        """The gradient of the head's product `[tokens, vocabulary]` for a chunk of tokens."""
        raw, distillation = head.raw(states), self.distillation
        size = max(1, _CACHED_BYTES // (4 * raw.shape[1])) if raw.device.type == "cpu" else len(raw)
        teacher_logits = None if distillation is None else distillation.head.raw(distillation.hidden[chunk])
        for part in _slices(chunk.start, chunk.stop, size):
            inside = slice(part.start - chunk.start, part.stop - chunk.start)
            logits = head.transform.forward(raw[inside])
            capped = logits.clone() if head.transform.cap is not None else None
            gradient = self.gradient(logits, None if teacher_logits is None else teacher_logits[inside], part)
            raw[inside] = head.transform.backward(gradient, capped)  # the gradient overwrites the logits
        return raw

    def gradient(self, logits: torch.Tensor, teacher_logits: torch.Tensor | None, part: slice) -> torch.Tensor:
        """Add the losses of some tokens to the sums, and return the gradient of their logits, in the logits' memory.

        With z the logits less their maximum and Q the sum of exp(z), log q = z - log Q; likewise y and P of the teacher.
        """
        labels = self.labels[part]
        counted = labels != -100
        targets = torch.where(counted, labels, 0)[:, None]
        largest, best = logits.max(-1, keepdim=True)
        self.sums.correct.add_(((best == targets)[:, 0] & counted).sum())
        z = logits.sub_(largest)
        target_logits = z.gather(-1, targets)
        ce_rows = self._scale_to_unit(counted[:, None] * (0.0 if self.ce_weight is None else self.ce_weight))
        if self.distillation is None or teacher_logits is None:
            q = z.exp_()
            total = q.sum(-1, keepdim=True)
            gradient = q.mul_(ce_rows / total)
        else:
            gradient, total = self._kd_gradient(self.distillation, z, teacher_logits, ce_rows, part)
        ce = ((total.log() - target_logits) * counted[:, None]).sum()
        self.sums.ce.add_(ce)
        if self.ce_weight is not None:
            self.sums.loss.add_(ce * self.ce_weight)
            gradient.scatter_add_(-1, targets, -ce_rows.to(gradient.dtype))
        return gradient

    def _kd_gradient(
        self,
        distillation: Distillation,
        z: torch.Tensor,
        teacher_logits: torch.Tensor,
        ce_rows: torch.Tensor,
        part: slice,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the divergence from the teacher to the sums.

        Returns:
            `tuple[torch.Tensor, torch.Tensor]`: The gradient of the divergence and of the part of cross-entropy that
                every logit has, `[tokens, vocabulary]`; and the sum of exp(z) at temperature 1, `[tokens, 1]`.
        """
        t = distillation.temperature
        exp_z = None
        if t != 1.0:
            exp_z = z.exp()
            total = exp_z.sum(-1, keepdim=True)
            z.div_(t)
        y = distillation.head.transform.forward(teacher_logits)
        y = y.sub_(y.amax(-1, keepdim=True)).div_(t)
        gap = y - z
        p, q = y.exp_(), z.exp_()
        p_total, q_total = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
        norms = (q_total.log() - p_total.log())[:, 0]
        mask = distillation.mask[part]
        kd_rows = self._scale_to_unit((mask * (distillation.weight * t))[:, None])
        shared: torch.Tensor | float = 0.0
        if t == 1.0:
            total, shared = q_total, ce_rows
        if distillation.direction == "forward":  # d KL(p || q) / dz = (q - p) / t
            kl = torch.linalg.vecdot(p, gap) / p_total[:, 0] + norms
            gradient = q.mul_((kd_rows + shared) / q_total).addcmul_(p, kd_rows / p_total, value=-1)
        else:  # d KL(q || p) / dz = q * (log q - log p - KL) / t, in which the norms cancel
            mean = (torch.linalg.vecdot(q, gap) / q_total[:, 0])[:, None]
            kl = -mean[:, 0] - norms
            gradient = gap.neg_().add_(mean).mul_(kd_rows).add_(shared).mul_(q.div_(q_total))
        if exp_z is not None and self.ce_weight is not None:
            gradient.add_(exp_z.mul_(ce_rows / total))
        kl = kl.mul_(mask).sum() * t**2
        self.sums.kd.add_(kl)
        self.sums.loss.add_(kl * distillation.weight)
        return gradient, total

    def _scale_to_unit(self, factors: torch.Tensor) -> torch.Tensor:
        return factors if self.unit is None else factors / self.unit
