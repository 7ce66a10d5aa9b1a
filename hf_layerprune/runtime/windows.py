"""Text as windows of tokens, no longer than a model's context, each of which begins as the tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import CutError
from ..families import AFTER_PADDING, text_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def context_of(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for; `None` if its config does not say."""
    part = text_config(config)
    most = getattr(part, "max_position_embeddings", None) or getattr(part, "max_target_positions", None)
    if not isinstance(most, int) or most <= 0:
        return None
    return most - part.pad_token_id - 1 if part.model_type in AFTER_PADDING else most


def check_context(config: PreTrainedConfig, length: int, what: str) -> None:
    """Refuse rows that are longer than a model's context, where its numbers mean nothing or it fails.

    `what` is the option that says so, such as `"length"`.

    Raises:
        CutError: The rows are too long.
    """
    most = context_of(config)
    if most is not None and length > most:
        raise CutError(f"{what}={length} is more than the {most} positions of the model; use {most} or less")


def length_within(config: PreTrainedConfig, asked: int | None, default: int, what: str) -> int:
    """As many tokens as are asked for, or the default, or fewer if the model's context is shorter.

    Raises:
        CutError: More are asked for than the model has positions for.
    """
    if asked is None:
        return min(default, context_of(config) or default)
    check_context(config, asked, what)
    return asked


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before every text: mostly none or one; two in GLM."""
    with_them = tokenizer("a").input_ids
    without = tokenizer("a", add_special_tokens=False).input_ids
    more = len(with_them) - len(without)
    if more < 1 or with_them[0] == without[0]:
        return ()
    starts = (n for n in range(1, more + 1) if with_them[n : n + len(without)] == without)
    return tuple(with_them[: next(starts, 1)])


def windows_of(ids: Sequence[int], length: int, begin: Sequence[int]) -> torch.Tensor:
    """Cut the tokens of a text into consecutive windows `[windows, length]`; an incomplete one at the end is left out.

    Each begins with the special tokens in `begin`, since a model that was trained with them predicts badly without.

    Raises:
        CutError: The special tokens leave no room for text.
    """
    import torch

    own = length - len(begin)
    if own < 1:
        raise CutError(f"{length} tokens are {len(begin)} special tokens and no text; use {len(begin) + 1} or more")
    rows = torch.tensor(ids[: len(ids) // own * own], dtype=torch.int64).view(-1, own)
    return torch.cat([torch.tensor(begin, dtype=torch.int64).expand(len(rows), -1), rows], 1)
