"""What the trainer passes to the model's forward method for one batch, and what comes back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..runtime.head import Head
from .losses import Lesson

if TYPE_CHECKING:
    from .config import HealConfig


class LossInputs:
    """What the loss of one batch is computed from, beside the model's own inputs. Weights are scalars, per token.

    A plain class, which the engines pass on as it is: tensors in a dict or a dataclass, and whatever `forward` returns,
    are rounded to 16 bits by FSDP.

    Args:
        labels (`torch.Tensor`): The next token at each position, `[batch, seq - 1]`, or -100.
        keep (`torch.Tensor`): The positions whose logits are needed, boolean `[batch, seq - 1]`.
        ce_weight (`torch.Tensor`, *optional*): Weight of the cross-entropy of a labelled token.
        kd_mask (`torch.Tensor`): The positions to distil on, boolean `[batch, seq - 1]`.
        kd_weight (`torch.Tensor`): Weight of each of them.
        teacher_states (`torch.Tensor`, *optional*): The dense model's last hidden states, `[batch, seq, hidden]`.
        features (`torch.Tensor`, *optional*): The dense model's hidden states to reproduce,
            `[batch, seq, blocks * hidden]`; if there are any, nothing else is trained on.
        feature_mask (`torch.Tensor`): The positions at which they count, boolean `[batch, seq]`.
        feature_weight (`torch.Tensor`): Weight of each of them.

    Attributes:
        loss (`torch.Tensor`): The loss, with its gradients.
        sums (`dict[str, torch.Tensor]`): By the name of a metric, its sum over tokens.
    """

    loss: torch.Tensor
    sums: dict[str, torch.Tensor]

    def __init__(
        self,
        *,
        labels: torch.Tensor,
        keep: torch.Tensor,
        ce_weight: torch.Tensor | None,
        kd_mask: torch.Tensor,
        kd_weight: torch.Tensor,
        teacher_states: torch.Tensor | None,
        features: torch.Tensor | None,
        feature_mask: torch.Tensor,
        feature_weight: torch.Tensor,
    ) -> None:
        self.labels, self.keep, self.ce_weight = labels, keep, ce_weight
        self.kd_mask, self.kd_weight, self.teacher_states = kd_mask, kd_weight, teacher_states
        self.features, self.feature_mask, self.feature_weight = features, feature_mask, feature_weight

    def lesson(self, head: Head | None, args: HealConfig) -> Lesson | None:
        """The dense model's side of the loss, with its head; `None` without its states."""
        if self.teacher_states is None or head is None:
            return None
        mask, taught = self.kd_mask[self.keep], self.teacher_states[:, :-1][self.keep]
        return Lesson(taught, head, mask, self.kd_weight, args.kd_temperature, args.kd_direction)
