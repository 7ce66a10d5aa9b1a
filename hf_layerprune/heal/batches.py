"""Batches with the states that were precomputed for their rows, and the masks of the tokens that count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..runtime.head import Head
from ..runtime.prefix import Prefix
from .store import StateCache

if TYPE_CHECKING:
    from .config import HealConfig


@dataclass
class Precomputed:
    """The result of [`precompute`].

    Args:
        caches (`dict[str, StateCache]`): The states that each batch contains: `"prefix"`, `"teacher"`.
        prefix (`Prefix`, *optional*): The frozen layers, if they were taken out of the model.
        teacher_head (`Head`, *optional*): The dense model's head, in distillation.
        feature_width (`int`, defaults to 0): Of the teacher's values for a token, how many come first as hidden states
            after the cut; the rest are the input of its head.
    """

    caches: dict[str, StateCache] = field(default_factory=dict)
    prefix: Prefix | None = None
    teacher_head: Head | None = None
    feature_width: int = 0


@dataclass
class StateCollator:
    """TRL's collator, with the precomputed states of the rows added to each batch.

    With `padding_free`, TRL's collator concatenates the rows instead of padding them.
    """

    inner: Callable[[list[dict]], dict[str, Any]]
    padding_free: bool
    precomputed: Precomputed = field(default_factory=Precomputed)

    def __getstate__(self) -> dict[str, Any]:
        # Where data loader workers are not forked (Python 3.14, macOS, Windows), they get a copy, without the model.
        return {**self.__dict__, "precomputed": Precomputed(self.precomputed.caches)}

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Collate rows; states are added as `prefix_states` and `teacher_states`, and row numbers as `rows`."""
        rows = [int(example["row"]) for example in examples if "row" in example]  # a tensor, with torch's format
        batch = self.inner([{name: value for name, value in e.items() if name != "row"} for e in examples])
        if rows:
            batch["rows"] = torch.tensor(rows)
            for name, cache in self.precomputed.caches.items():
                batch[f"{name}_states"] = self.join(cache.read(rows), batch)
        return batch

    def join(self, states: list[torch.Tensor], inputs: dict[str, Any]) -> torch.Tensor:
        """Combine states of rows `[tokens, width]` into a batch `[batch, seq, width]`, for the model's `inputs`."""
        if self.padding_free:
            states = [torch.cat(states)]
        batch = states[0].new_zeros(len(states), inputs["input_ids"].shape[1], states[0].shape[1])
        for target, first, source in zip(batch, _row_starts(inputs, list(map(len, states))), states, strict=True):
            target[first : first + len(source)] = source
        return batch

    def split(self, batch: torch.Tensor, lengths: Sequence[int], inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Split a batch `[batch, seq, width]` into states of rows `[tokens, width]`, the inverse of [`join`]."""
        if self.padding_free:
            return list(batch[0, : sum(lengths)].split(list(lengths)))
        places = zip(batch, _row_starts(inputs, lengths), lengths, strict=True)
        return [states[first : first + length] for states, first, length in places]


def _row_starts(inputs: dict[str, Any], lengths: Sequence[int]) -> list[int]:
    """Where the rows of a batch start: at 0, unless a collator of the user's pads on the left."""
    mask, seq = inputs.get("attention_mask"), inputs["input_ids"].shape[1]
    if mask is None or mask.dim() != 2:
        return [0] * len(lengths)
    left = (mask[:, 0] == 0) & (mask[:, -1] != 0)
    return [seq - length if at_end else 0 for length, at_end in zip(lengths, left.tolist(), strict=True)]


def count_tokens(batches: list[dict[str, Any]], args: HealConfig) -> torch.Tensor:
    """How many tokens of the batches have a label, on how many the distillation loss is computed, and all, `[3]`."""
    counts = torch.zeros(3)
    for batch in batches:
        labels = batch["labels"][:, 1:]
        masks = labels != -100, distillation_mask(batch, labels, args), non_padding_mask(batch)
        counts += torch.stack([mask.sum() for mask in masks]).to(counts)
    return counts


def non_padding_mask(inputs: dict[str, Any]) -> torch.Tensor:
    """Which tokens are not padding, boolean `[batch, seq]`."""
    if "attention_mask" in inputs:
        return inputs["attention_mask"] != 0
    # Where texts share a row, padding has position 0 to the end of the row.
    return inputs["position_ids"].flip(-1).cumsum(-1).flip(-1) != 0


def distillation_mask(inputs: dict[str, Any], labels: torch.Tensor, args: HealConfig) -> torch.Tensor:
    """The positions of the distillation loss, `[batch, seq - 1]`: those with a next token in the same text."""
    if args.kd_tokens == "completion":
        return labels != -100
    if "attention_mask" in inputs:
        return (inputs["attention_mask"][:, 1:] != 0) & (inputs["attention_mask"][:, :-1] != 0)
    return inputs["position_ids"][:, 1:] != 0
