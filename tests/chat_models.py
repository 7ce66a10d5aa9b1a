"""Tiny random models for the chat, whose vocabulary contains HTML."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_layerprune.cli import main
from tests.tiny_models import VOCAB, tiny_model

# The first three are the padding, start and end tokens of `tiny_models`.
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
NASTY = ["<script>window.ran=1</script>", "<img/src=x/onerror=window.ran=1>", "<b>bold</b>", "&lt;", "a&b", "`<i>`"]
ROLES = ["system", "user", "assistant", ":"]
TEMPLATE = "{% for m in messages %}{{ m.role }} : {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant : {% endif %}"


def words() -> list[str]:
    """The vocabulary."""
    plain = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "al", "en", "is", "or", "um")]
    known = SPECIAL + NASTY + ROLES
    return known + plain[: VOCAB - len(known)]


def tiny_chat_model(folder: Path, *, template: bool = True, context: int = 4096) -> Path:
    """Save a random model with a tokenizer. It has no end-of-text token, so it writes until it is stopped.

    Args:
        folder (`Path`): The folder to write.
        template (`bool`): Whether it has a chat template.
        context (`int`): The length of its context in tokens.

    Returns:
        `Path`: The folder.
    """
    vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words())}, unk_token="<unk>"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    if template:
        tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    model = tiny_model("llama")
    model.config.max_position_embeddings = context
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return folder


def pruned_model(base: Path, folder: Path, *words: str) -> Path:
    """Prune a model with the command, so that it has a lineage."""
    assert main(["prune", str(base), str(folder), "--drop-layers", "3-4", *words]) == 0
    return folder
