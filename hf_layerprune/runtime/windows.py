"""Text as windows of tokens, no longer than a model's context, each of which begins as the tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import CutError
from ..families import AFTER_PADDING, text_config

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase


def max_positions(config: PreTrainedConfig) -> int | None:
    """How many tokens a model has positions for; `None` if its config does not say."""
    part = text_config(config)
    limit = getattr(part, "max_position_embeddings", None) or getattr(part, "max_target_positions", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    return limit - part.pad_token_id - 1 if part.model_type in AFTER_PADDING else limit


def check_context(config: PreTrainedConfig, length: int, what: str) -> None:
    """Refuse rows that are longer than a model's context, where its numbers mean nothing or it fails.

    `what` is the option that says so, such as `"length"`.

    Raises:
        CutError: The rows are too long.
    """
    limit = max_positions(config)
    if limit is not None and length > limit:
        raise CutError(f"{what}={length} is more than the {limit} positions of the model; use {limit} or less")


def resolve_length(config: PreTrainedConfig, requested: int | None, default: int, what: str) -> int:
    """As many tokens as are asked for, or the default, or fewer if the model's context is shorter.

    Raises:
        CutError: More are asked for than the model has positions for.
    """
    if requested is None:
        return min(default, max_positions(config) or default)
    check_context(config, requested, what)
    return requested


def special_prefix(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The special tokens that a tokenizer puts before every text: mostly none or one; two in GLM."""
    with_them = tokenizer("a").input_ids
    without = tokenizer("a", add_special_tokens=False).input_ids
    more = len(with_them) - len(without)
    if more < 1 or with_them[0] == without[0]:
        return ()
    starts = (n for n in range(1, more + 1) if with_them[n : n + len(without)] == without)
    return tuple(with_them[: next(starts, 1)])


def split_into_windows(ids: Sequence[int], length: int, prefix: Sequence[int]) -> torch.Tensor:
    """Cut the tokens of a text into consecutive windows `[windows, length]`; an incomplete one at the end is left out.

    Each begins with the special tokens in `prefix`, since a model that was trained with them predicts badly without.

    Raises:
        CutError: The special tokens leave no room for text.
    """
    import torch

    width = length - len(prefix)
    if width < 1:
        raise CutError(f"{length} tokens are {len(prefix)} special tokens and no text; use {len(prefix) + 1} or more")
    rows = torch.tensor(ids[: len(ids) // width * width], dtype=torch.int64).view(-1, width)
    return torch.cat([torch.tensor(prefix, dtype=torch.int64).expand(len(rows), -1), rows], 1)
