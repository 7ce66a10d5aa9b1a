"""`compare_models`: the distance between two models in memory, without a folder, records or tasks."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CutError, LayerPruneError
from ..runtime.loading import load_tokenizer
from ..runtime.windows import resolve_length
from .distance import mean, text_metrics, window_means
from .requests import DEFAULT_LENGTH
from .texts import WIKITEXT2, check_same_vocabulary, find_text, split_windows


def compare_models(
    model: PreTrainedModel,
    base: PreTrainedModel,
    text: str | os.PathLike[str] | torch.Tensor = WIKITEXT2,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    length: int | None = None,
    windows: int | None = 64,
) -> dict[str, float]:
    """Measure how far a model is from its base, as `hf-layerprune eval --text` does, for models in memory.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The pruned model.
        base (`PreTrainedModel` or `PeftModel`): The model that it was made from.
        text (`str`, `os.PathLike` or `torch.Tensor`, defaults to `"wikitext2"`): A `.txt` file, `"wikitext2"`, or token IDs
            `[windows, length]`, with which the other arguments have no effect.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The models' tokenizer; by default that of `base.name_or_path`.
        length (`int`, *optional*): The number of tokens in a window; by default 1,024, or fewer if the context of a model
            is shorter.
        windows (`int`, defaults to 64): The number of windows to read, from the start of the text; `None` for all.

    Returns:
        `dict[str, float]`: `perplexity` and `base_perplexity`; `perplexity_ratio`, the first divided by the second; `kl`,
            the mean over tokens of KL(base || model) in nats; `top1_agreement`, the share of tokens for which both models
            have the same most likely next token; and, of the last two, `kl_stderr` and `top1_agreement_stderr`, the
            standard errors over windows (NaN for a single window).

    Raises:
        CutError: The text is missing, no tokenizer is known for it, or it gives no window of at least 2 tokens that fits the
            context of both models.
        CheckpointError: The base has no tokenizer that can be loaded.
        LayerPruneError: The vocabularies differ, or a window does not fit into memory.
        UnsupportedModelError: The architecture is not proven to be measured correctly.
    """
    if any(isinstance(one, str | os.PathLike) for one in (model, base)):
        raise LayerPruneError(
            "models in memory are compared here; load them, or use hf-layerprune eval MODEL --base BASE"
        )
    sizes = [getattr(one.config.get_text_config(), "vocab_size", None) for one in (model, base)]
    check_same_vocabulary(sizes, ("the model", "its base"))
    if isinstance(text, str | os.PathLike):
        text = _read_windows(model, base, os.fspath(text), tokenizer, length, windows)
    if not isinstance(text, torch.Tensor):
        raise CutError(
            f"text is a {type(text).__name__}, and must be a path or a tensor of token IDs [windows, length]"
        )
    if text.dim() != 2 or not len(text) or text.shape[1] < 2:
        raise CutError(
            f"the text is {[*text.shape]}, and must be [windows, length], with 2 or more tokens in a window"
        )
    found = window_means(model, text, base)
    perplexity, base_perplexity = (text_metrics(found[name])["perplexity"][0] for name in ("nll", "base_nll"))
    measured = {
        "perplexity": perplexity,
        "base_perplexity": base_perplexity,
        "perplexity_ratio": perplexity / base_perplexity,
    }
    for metric in ("kl", "top1_agreement"):
        value, error = mean(found[metric])
        measured |= {metric: value, f"{metric}_stderr": float("nan") if error is None else error}
    return measured


def _read_windows(
    model: PreTrainedModel,
    base: PreTrainedModel,
    name: str,
    tokenizer: PreTrainedTokenizerBase | None,
    length: int | None,
    windows: int | None,
) -> torch.Tensor:
    """The first windows of a text that is named, which fit the context of both models."""
    if windows is not None and windows < 1:
        raise CutError(f"windows={windows} measures nothing; use 1 or more, or None for the whole text")
    if tokenizer is None:
        if not base.name_or_path:
            raise CutError("the base does not say where it was loaded from; pass its tokenizer")
        tokenizer = load_tokenizer(base.name_or_path)
    length = min(resolve_length(one.config, length, DEFAULT_LENGTH, "length") for one in (model, base))
    return split_windows(find_text(name).text, tokenizer, length, windows, name)[0]
