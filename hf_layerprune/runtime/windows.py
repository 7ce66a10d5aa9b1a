"""Text as windows of tokens, each of which begins as the tokenizer begins a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def begins_with(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a tokenizer puts before every text; `None` if there is none."""
    with_it = tokenizer("a").input_ids
    without = tokenizer("a", add_special_tokens=False).input_ids
    return with_it[0] if len(with_it) > len(without) and with_it[0] != without[0] else None


def windows_of(ids: Sequence[int], length: int, begin: int | None) -> torch.Tensor:
    """Cut tokens into consecutive windows; an incomplete one at the end is left out.

    Args:
        ids (`Sequence[int]`): The tokens of a text, without the special token.
        length (`int`): Number of tokens in a window, 2 or more.
        begin (`int`, *optional*): The special token that each window begins with, since a model that was trained with it
            predicts badly without.

    Returns:
        `torch.Tensor`: `[windows, length]`, int64.
    """
    own = length - (begin is not None)
    rows = torch.tensor(ids[: len(ids) // own * own], dtype=torch.int64).view(-1, own)
    return rows if begin is None else torch.nn.functional.pad(rows, (1, 0), value=begin)
