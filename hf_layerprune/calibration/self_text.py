"""Text written by the model itself: calibration without a data set.

Sampled at temperature 1 after an empty user turn, as in Magpie (arXiv:2406.08464), or from the beginning of a text if
the tokenizer has no chat template. An end-of-text token does not end a row; sampling continues after it.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList

from ..errors import UnsupportedModelError, boundary
from ..runtime.generation import plain_generation
from ..runtime.loading import has_chat_template
from ..runtime.memory import free_bytes, in_batches
from ..runtime.parts import evaluation_mode
from ..runtime.windows import check_context
from ..screen import progress_bar

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# The most rows at a time. On a GPU, a step of decoding takes about as long for a thousand rows as for a hundred.
_MAX_ROWS, _MAX_ROWS_ON_DEVICE = 128, 1024
_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Sample rows of text from a model, which is left unchanged: token ids `[samples, length]`, the prompt included.

    The tokenizer provides the prompt, and limits the tokens to its vocabulary. The seed determines every token,
    whatever the batch size.

    Raises:
        UnsupportedModelError: The model can't generate.
        CutError: The rows are longer than the model's context.
        LayerPruneError: A single row does not fit into memory.
    """
    check_context(model.config, length, "self_length")
    start = _prompt_ids(model, tokenizer)[: length - 1]
    # Drawn in advance, so that the numbers don't depend on the batch size.
    draws = torch.rand(samples, length - len(start), generator=torch.Generator().manual_seed(seed))
    vocabulary = model.config.get_text_config().vocab_size
    # The rest is padding of the embeddings.
    known = min(vocabulary, len(tokenizer)) if tokenizer is not None else vocabulary

    def write(part: torch.Tensor) -> torch.Tensor:
        prompt = torch.tensor([start] * len(part), device=model.device)
        # Janus's own method leaves out the processor.
        generate: Any = GenerationMixin.generate
        return generate(
            model,
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=part.shape[1],
            do_sample=False,  # the processor below leaves only the sampled token
            logits_processor=LogitsProcessorList([_Sampler(part.to(model.device), len(start), known, bar)]),
        ).cpu()

    size = _max_batch_size(model, length)
    try:
        with (
            evaluation_mode(model),
            plain_generation(model),
            progress_bar(total=draws.numel(), unit="token", desc="writing text") as bar,
        ):
            return torch.cat([*in_batches(draws, size, write, "write shorter rows")])
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} can't write its own calibration text ({str(error)[:120]}); specify a text "
            'or a data set (calibration="rows.jsonl")'
        ) from error


class _Sampler(LogitsProcessor):
    """Samples a token for each row, and masks all others."""

    def __init__(self, draws: torch.Tensor, start: int, known: int, bar: tqdm) -> None:
        self.draws, self.start, self.known, self.bar = draws, start, known, bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        cumulative = scores[:, : self.known].float().softmax(-1).cumsum(-1)
        draw = self.draws[:, input_ids.shape[1] - self.start, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, draw).clamp_(max=self.known - 1)
        self.bar.update(len(input_ids))
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0)


def _prompt_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The start of an empty user turn, or the beginning-of-text token."""
    if tokenizer is not None and has_chat_template(tokenizer):
        with boundary("the tokenizer's chat template can't be rendered", "specify a text or a data set instead"):
            chat = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
        before, mark, _ = str(chat).partition(_MARK)
        if mark and before:
            return tokenizer(before, add_special_tokens=False).input_ids
    config = model.config.get_text_config()
    for token in (getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")):  # some types have neither
        if isinstance(token, int | list):
            return [token if isinstance(token, int) else token[0]]
    return [0]


def _max_batch_size(model: PreTrainedModel, length: int) -> int:
    """As many rows as fit into half of the free memory."""
    config = copy.copy(model.config.get_text_config())
    config.allow_global_per_layer_attribute_access = True  # Gemma 4's layers differ in `head_dim`
    heads = getattr(config, "num_attention_heads", 1) or 1
    shared = (getattr(config, "num_key_value_heads", heads) or heads) / heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    # Keys and values, twice while the cache grows, and a few copies of the logits.
    cache = 4 * config.num_hidden_layers * heads * shared * width * length * model.dtype.itemsize
    row = cache + 4 * 4 * config.vocab_size
    limit = _MAX_ROWS if model.device.type == "cpu" else _MAX_ROWS_ON_DEVICE
    return int(max(1, min(limit, free_bytes(model.device) // 2 // row)))
