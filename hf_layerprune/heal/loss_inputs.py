"""The loss inside the model's forward method: what the trainer passes to it for one batch, and what comes back."""

from __future__ import annotations

import functools
import types
import weakref
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LayerPruneError
from ..runtime.head import OutputHead
from .losses import Distillation, head_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trainer import HealTrainer


class LossInputs(types.SimpleNamespace):
    """What the loss of one batch is computed from, apart from the model's inputs. Weights are scalars, per token.

    Neither a dict nor a dataclass: FSDP rounds the tensors in those, and in whatever `forward` returns, to 16 bits.

    Args:
        keep (`torch.Tensor`): The positions whose logits are needed, boolean `[batch, seq - 1]`.
        labels (`torch.Tensor`): The next token at each of them, or -100.
        ce_weight (`torch.Tensor`, *optional*): Weight of the cross-entropy of a labelled token.
        distillation (`Distillation`, *optional*): The dense model's side, at the same positions.
        features (`torch.Tensor`, *optional*): The dense model's hidden states to reproduce,
            `[batch, seq, blocks * hidden]`; if there are any, nothing else is trained on.
        feature_mask (`torch.Tensor`): The positions at which they count, boolean `[batch, seq]`.
        feature_weight (`torch.Tensor`): Weight of each of them.

    Attributes:
        loss (`torch.Tensor`): The loss, with its gradients.
        sums (`dict[str, torch.Tensor]`): By the name of a metric, its sum over tokens.
    """

    keep: torch.Tensor
    labels: torch.Tensor
    ce_weight: torch.Tensor | None
    distillation: Distillation | None
    features: torch.Tensor | None
    feature_mask: torch.Tensor
    feature_weight: torch.Tensor
    loss: torch.Tensor
    sums: dict[str, torch.Tensor]


def compute_in_forward(trainer: HealTrainer, output: OutputHead) -> None:
    """Compute the loss inside the model's forward method, where DDP and FSDP expect all computation to happen.

    That method then takes [`LossInputs`] as `heal`.
    """
    model, owner = trainer.plain_model, weakref.ref(trainer)  # which the model would keep in memory, optimizer and all
    plain_forward = model.forward

    def forward(self_: PreTrainedModel, *args: Any, heal: LossInputs | None = None, **kwargs: Any) -> Any:
        if self_ is not model:  # a deep copy, which takes this function with it
            return type(self_).forward(self_, *args, **kwargs)
        if (trainer := owner()) is None:
            return plain_forward(*args, **kwargs)
        prefix = trainer.data_collator.precomputed.prefix
        if prefix is not None and not prefix.holds_output_for(args[0] if args else kwargs.get("input_ids")):
            raise LayerPruneError(
                "in training, the frozen layers are unloaded, and only rows of train_dataset and eval_dataset can be run; "
                "use cache=off to generate text or to evaluate other rows meanwhile"
            )
        if heal is None:
            return plain_forward(*args, **kwargs)
        if trainer.feature_phase is not None and heal.features is not None:
            total = trainer.feature_phase.loss(plain_forward, kwargs, heal.features, heal.feature_mask)
            heal.loss, heal.sums = total * heal.feature_weight, {"features": total}
            return {"loss": heal.loss}
        states = output.states(*args, run=plain_forward, **kwargs)[:, :-1]
        accumulate = trainer.can_add_gradients_in_forward and torch.is_grad_enabled()
        of_tokens = states[heal.keep], output.head(), heal.labels, heal.ce_weight, heal.distillation
        losses = head_loss(*of_tokens, accumulate=accumulate)
        heal.loss, heal.sums = losses.loss, {"ce": losses.ce, "correct": losses.correct}
        if heal.distillation is not None:
            heal.sums["kd"] = losses.kd
        return {"loss": heal.loss}

    # `generate` and the trainer inspect the signature of forward.
    model.forward = types.MethodType(functools.wraps(type(model).forward)(forward), model)


class _TokenMean(float):
    """A mean over tokens that remembers their number: TRL logs the mean of batches, and these differ in theirs."""

    total: float
    tokens: float


def _add_to_mean(means: list[_TokenMean], total: float, tokens: float) -> None:
    """Replace the mean in one of TRL's lists by that of its tokens and these."""
    for before in means:
        total, tokens = total + before.total, tokens + before.tokens
    mean = _TokenMean(total / max(tokens, 1))
    mean.total, mean.tokens = total, tokens
    means[:] = [mean]


def log_batch(trainer: HealTrainer, mode: str, known: dict[str, torch.Tensor], counts: torch.Tensor) -> None:
    """Add a batch to what TRL logs: sums over tokens, by the name of the metric.

    `counts` are the labelled, the distilled and all tokens, `[3]`; `mode` is `"train"` or `"eval"`.
    """
    sums = torch.stack([value.detach() for value in known.values()])
    sums = torch.cat([sums, counts.to(sums)])
    *values, labelled, distilled, seen = trainer.accelerator.gather_for_metrics(sums[None]).sum(0).tolist()
    found, metrics = dict(zip(known, values, strict=True)), trainer._metrics[mode]
    if "correct" in found:
        metrics["mean_token_accuracy"].append(found["correct"] / max(labelled, 1))  # a mean of batches, as TRL's
    if "kd" in found:
        _add_to_mean(metrics["ce"], found["ce"], labelled)
        _add_to_mean(metrics["kd"], found["kd"], distilled)
    if "features" in found:
        _add_to_mean(metrics["features"], found["features"], seen)
    if mode == "train":
        trainer._total_train_tokens += int(seen)
    metrics["num_tokens"] = [trainer._total_train_tokens]
