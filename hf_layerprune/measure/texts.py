"""Texts, and how they are cut into windows of tokens, for perplexity and distance."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CutError, LayerPruneError, boundary
from ..files import text_file
from ..files.data_sets import SUFFIXES

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# A text that papers on pruning commonly use: the rows of the test split, separated by empty lines.
WIKITEXT2 = "wikitext2"
_WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
# The number of characters on which two tokenizers are compared.
_SAMPLE = 20_000


@dataclass(frozen=True)
class Text:
    """A text to measure on. `dataset` is the Hub id of its data set, or the sha256 of its content."""

    name: str
    text: str
    dataset: str


def read_text(path: Path) -> Text:
    """Read a `.txt` file.

    Raises:
        LayerPruneError: It is empty, not UTF-8, or holds rows of JSON.
    """
    if path.suffix.lower() in SUFFIXES:  # the perplexity of their JSON says little about a model
        raise LayerPruneError(f"{path} holds rows, and not a plain text; write their texts into a .txt file")
    text = text_file.read_text(path)
    if not text.strip():
        raise LayerPruneError(f"{path} is empty; put a text into it to measure perplexity on")
    return Text(path.stem, text, hashlib.sha256(text.encode()).hexdigest())


def find_text(name: str) -> Text:
    """Read a file, or download the text of a name such as `"wikitext2"`.

    Raises:
        CutError: The text does not exist.
        LayerPruneError: It can't be read or downloaded.
    """
    path = Path(name).expanduser()
    if os.path.isfile(path):  # `False` for a name that is too long, such as a text
        return read_text(path)
    if name != WIKITEXT2:
        raise CutError(f"text {name[:200]} is not a file; specify one, or {WIKITEXT2}")
    repo, config, split = _WIKITEXT2
    with boundary(f"{WIKITEXT2} can't be downloaded", "specify a text file instead", LayerPruneError):
        from datasets import load_dataset

        rows = load_dataset(repo, config, split=split, trust_remote_code=False)
        return Text(WIKITEXT2, "\n\n".join(rows["text"]), repo)


def split_windows(
    text: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None, name: str = "the text"
) -> tuple[torch.Tensor, bool]:
    """Cut a text into consecutive windows `[windows, length]`, and return the first `most` of them.

    An incomplete window is left out. If the tokenizer begins texts with special tokens, every window begins with them too,
    because a model that was trained with them predicts badly without. The second value says whether it does so.

    Raises:
        CutError: The special tokens leave no room for text, or the text is too short for one window.
    """
    from ..runtime.windows import special_prefix, split_into_windows

    begin = special_prefix(tokenizer)
    if most is not None:  # tokens average far fewer than 64 characters, so this part is enough
        text = text[: most * length * 64]
    # Texts are longer than a model's context on purpose; `verbose=False` suppresses the warning.
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    rows = split_into_windows(ids, length, begin)[:most]
    if not len(rows):
        raise CutError(
            f"{name} has {len(ids)} tokens, but a window has {length}; specify a longer text, or use length={len(ids)}"
        )
    return rows, bool(begin)


def check_same_vocabulary(sizes: Sequence[int | None], names: Sequence[str]) -> None:
    """Refuse to compare a model with its base if their vocabularies differ in size; `None` for one that is not known."""
    if None not in sizes and sizes[0] != sizes[1]:
        raise LayerPruneError(
            f"{names[0]} has a vocabulary of {sizes[0]} tokens and {names[1]} one of {sizes[1]}, so they can't be compared "
            "token by token; specify the base that the model was made from, or omit the texts"
        )


def check_same_tokens(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, text: str) -> None:
    """Refuse to compare models whose tokenizers differ on a text."""
    sample = text[:_SAMPLE]
    if ours(sample, verbose=False).input_ids != theirs(sample, verbose=False).input_ids:
        raise LayerPruneError(
            "the tokenizers of the model and its base split the text into different tokens, so the models can't be compared "
            "token by token; specify the base that the model was made from"
        )
