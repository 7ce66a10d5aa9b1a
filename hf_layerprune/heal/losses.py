"""Cross-entropy and distillation from last hidden states, without holding the logits of all tokens.

The head is run over a chunk of tokens at a time, and each chunk's gradients are taken before its logits are let go: one
product for the student's logits, two for the gradients, one for the teacher's logits, and nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig

# A chunk's logits in float32 take about so many bytes. A few such buffers are alive at a time.
CHUNK_BYTES = 64 * 2**20

DIRECTIONS = ("forward", "reverse")


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the output of its head: `z -> cap * tanh(scale * z / cap)`, or only `scale * z`.

    Args:
        scale (`float`, defaults to 1.0): A factor.
        cap (`float`, *optional*): A bound on the logits' size.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> LogitTransform:
        """Read it from a model's config, by the names that transformers' models use."""
        text = config.get_text_config()
        scale = 1.0
        for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
            scale *= getattr(text, name, None) or 1.0
        scale /= getattr(text, "logits_scaling", None) or 1.0
        return cls(scale, getattr(text, "final_logit_softcapping", None))

    def forward(self, raw: torch.Tensor) -> torch.Tensor:
        """Logits of the head's output, float32, in place where that can be."""
        logits = raw.float()
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward(self, gradient: torch.Tensor, logits: torch.Tensor | None) -> torch.Tensor:
        """The gradient of the head's output, from that of the logits, in place."""
        if self.cap is not None:
            gradient.mul_(1 - (logits / self.cap).square_())
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Distillation:
    """How the teacher's distribution p and the student's q are held against each other.

    Args:
        temperature (`float`, defaults to 1.0): Logits of both are divided by it, and the loss is multiplied by its
            square, so that gradients keep their size (arXiv:1503.02531).
        direction (`str`, defaults to `"forward"`): `"forward"` for KL(p || q), which covers all that the teacher would
            say, `"reverse"` for KL(q || p), which keeps to what it says most.
    """

    temperature: float = 1.0
    direction: str = "forward"


@dataclass(frozen=True)
class Head:
    """A frozen or trained output head.

    Args:
        weight (`torch.Tensor`): `[vocabulary, hidden]`.
        bias (`torch.Tensor`, *optional*): `[vocabulary]`.
        transform (`LogitTransform`): What follows it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    transform: LogitTransform = LogitTransform()

    @classmethod
    def of(cls, module: nn.Module, config: PreTrainedConfig) -> Head:
        """The head that a module is. Sharded weights are gathered."""
        whole = [
            tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            for tensor in (module.weight, getattr(module, "bias", None))
        ]
        return cls(whole[0], whole[1], LogitTransform.of(config))


@dataclass
class HeadLoss:
    """The loss of some tokens.

    Args:
        loss (`torch.Tensor`): The weighted sum over tokens; gradients flow from here.
        ce (`torch.Tensor`): Cross-entropy, summed over the tokens with a label, without gradient.
        kd (`torch.Tensor`): Divergence from the teacher, summed over the tokens of its mask, without gradient.
        correct (`torch.Tensor`): How many labels are the student's most likely token.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class Lesson:
    """What the teacher says about some tokens.

    Args:
        hidden (`torch.Tensor`): Its last hidden states `[tokens, its hidden size]`.
        head (`Head`): Its head; no gradient flows there.
        mask (`torch.Tensor`): Which tokens count, boolean `[tokens]`.
        weight (`torch.Tensor`): What each of them counts, a number.
        distillation (`Distillation`): How the two distributions are compared.
    """

    hidden: torch.Tensor
    head: Head
    mask: torch.Tensor
    weight: torch.Tensor
    distillation: Distillation


def head_loss(
    hidden: torch.Tensor,
    head: Head,
    labels: torch.Tensor,
    ce_weight: torch.Tensor | None,
    lesson: Lesson | None = None,
    chunk_bytes: int = CHUNK_BYTES,
) -> HeadLoss:
    """Weighted cross-entropy and divergence from a teacher, summed over tokens.

    Args:
        hidden (`torch.Tensor`): The student's last hidden states `[tokens, hidden]`.
        head (`Head`): Its head.
        labels (`torch.Tensor`): The next tokens `[tokens]`, -100 where there is none to learn.
        ce_weight (`torch.Tensor`, *optional*): What the cross-entropy of a labelled token counts, a number. Without
            one, cross-entropy is only reported.
        lesson (`Lesson`, *optional*): The teacher's side.
        chunk_bytes (`int`, *optional*): About how large a chunk's logits may be.

    Returns:
        `HeadLoss`: The loss and its parts.
    """
    return HeadLoss(
        *_HeadLoss.apply(hidden, head.weight, head.bias, head.transform, labels, ce_weight, lesson, chunk_bytes)
    )


class _HeadLoss(torch.autograd.Function):
    """Loss and gradients in one pass, chunk by chunk; `backward` only scales what `forward` found."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transform: LogitTransform,
        labels: torch.Tensor,
        ce_weight: torch.Tensor | None,
        lesson: Lesson | None,
        chunk_bytes: int,
    ) -> tuple[torch.Tensor, ...]:
        device = hidden.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        sums = _Sums(*torch.zeros(4, device=device).unbind())
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros(weight.shape, device=device, dtype=torch.float32) if wants_weight else None
        d_bias = torch.zeros(bias.shape, device=device, dtype=torch.float32) if wants_bias else None
        size = max(1, chunk_bytes // (4 * weight.shape[0]))
        with torch.autocast(device.type, enabled=False):
            matrix = weight.to(dtype)
            offset = bias.to(dtype) if bias is not None else None
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                states = hidden[part].to(dtype)
                logits = transform.forward(F.linear(states, matrix, offset))
                capped = logits.clone() if transform.cap is not None else None
                gradient = _chunk(logits, labels[part], ce_weight, lesson, part, sums)
                gradient = transform.backward(gradient, capped)
                if wants_bias:
                    d_bias += gradient.sum(0)
                gradient = gradient.to(dtype)
                if wants_hidden:
                    d_hidden[part] = (gradient @ matrix).to(hidden.dtype)
                if wants_weight:
                    d_weight += gradient.T @ states
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = weight.dtype, bias.dtype if bias is not None else None
        ctx.mark_non_differentiable(sums.ce, sums.kd, sums.correct)
        return sums.loss, sums.ce, sums.kd, sums.correct

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if d_hidden is None else d_hidden * d_loss.to(d_hidden.dtype),
            None if d_weight is None else d_weight.mul_(d_loss).to(weight_dtype),
            None if d_bias is None else d_bias.mul_(d_loss).to(bias_dtype),
            *(None,) * 5,
        )


@dataclass
class _Sums:
    """What is summed over chunks."""

    loss: torch.Tensor
    ce: torch.Tensor
    kd: torch.Tensor
    correct: torch.Tensor


def _chunk(
    logits: torch.Tensor,
    labels: torch.Tensor,
    ce_weight: torch.Tensor | None,
    lesson: Lesson | None,
    part: slice,
    sums: _Sums,
) -> torch.Tensor:
    """Add a chunk's losses to the sums, and give the gradient of its logits, which may be overwritten."""
    counted = labels != -100
    targets = torch.where(counted, labels, 0)[:, None]
    sums.correct += ((logits.argmax(-1) == targets[:, 0]) & counted).sum()
    gradient = None if lesson is None else _taught(logits, lesson, part, sums)
    log_q = torch.log_softmax(logits, -1)
    ce = -log_q.gather(-1, targets)[:, 0].mul_(counted).sum()
    sums.ce += ce
    if ce_weight is None:
        return gradient
    sums.loss += ce * ce_weight
    weights = (counted * ce_weight)[:, None]
    own = log_q.exp_().mul_(weights)
    own.scatter_add_(-1, targets, -weights.to(own.dtype))
    return own if gradient is None else gradient.add_(own)


def _taught(logits: torch.Tensor, lesson: Lesson, part: slice, sums: _Sums) -> torch.Tensor:
    """The same for the divergence from the teacher alone."""
    t, head = lesson.distillation.temperature, lesson.head
    states = lesson.hidden[part].to(head.weight.dtype)
    log_p = torch.log_softmax(head.transform.forward(F.linear(states, head.weight, head.bias)).div_(t), -1)
    log_q = torch.log_softmax(logits / t, -1)
    difference = log_p - log_q
    if lesson.distillation.direction == "forward":  # d KL(p || q) / dz = (q - p) / t
        p = log_p.exp_()
        kl = torch.linalg.vecdot(p, difference)
        gradient = log_q.exp_().sub_(p)
    else:  # d KL(q || p) / dz = q * (log q - log p - KL) / t
        q = log_q.exp_()
        kl = -torch.linalg.vecdot(q, difference)
        gradient = q.mul_(difference.add_(kl[:, None]).neg_())
    kl = kl.mul_(lesson.mask[part]).sum() * t**2
    sums.kd += kl
    sums.loss += kl * lesson.weight
    return gradient.mul_((lesson.mask[part] * lesson.weight * t)[:, None])
