"""Tiny models, rows and trainers for the tests of healing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from hf_layerprune import drop_layers

from .tiny_models import VOCAB, tiny_model


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", eos_token="w2", unk_token="<unk>")


def rows(count: int = 24, seed: int = 0) -> Dataset:
    """Prompts and completions of 3 to 12 tokens each."""
    generator = torch.Generator().manual_seed(seed)

    def words() -> str:
        n = int(torch.randint(3, 13, (), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(3, VOCAB - 1, (n,), generator=generator).tolist())

    return Dataset.from_list([{"prompt": words() + " ", "completion": words()} for _ in range(count)])


def dense_and_pruned(model_type: str, folder: Path, drop: list[int]) -> tuple[Any, Path]:
    """A dense model, and the folder of what is left of it."""
    dense = tiny_model(model_type)
    dense.save_pretrained(folder / "dense")
    pruned = tiny_model(model_type)
    drop_layers(pruned, drop)
    pruned.save_pretrained(folder / "pruned")
    return dense, folder / "pruned"
