"""What a model has to compute and to read, from which a theoretical speed-up follows.

Reading a prompt is bound by arithmetic, so its ideal speed-up is the share of floating-point operations that are kept.
Writing a token reads every weight once, so its ideal speed-up is the share of bytes that are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


# The processor's own attention kernel, which torch's counter passes over.
_UNCOUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def prefill_flops(model: PreTrainedModel, batch: int, length: int) -> int:
    """Floating-point operations of a prompt, counted while the model reads one.

    Args:
        model (`PreTrainedModel`): The model.
        batch (`int`): Prompts at once.
        length (`int`): Tokens in a prompt.

    Returns:
        `int`: Of all matrix products and attention, with logits for the last token alone.
    """
    ids = torch.ones(batch, length, dtype=torch.long, device=model.device)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_UNCOUNTED) as counter:
        read_prompt(model, ids)
    return counter.get_total_flops()


def read_prompt(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """Read prompts as `generate` does: with a cache, and logits for the last token alone.

    Args:
        model (`PreTrainedModel`): The model.
        ids (`torch.Tensor`): Token ids `[batch, length]`.

    Returns:
        `Any`: The model's output.
    """
    supports: Any = model._supports_logits_to_keep
    last = {"logits_to_keep": 1} if supports() else {}
    return model(input_ids=ids, use_cache=True, **last)


def decode_bytes(model: PreTrainedModel, batch: int, tokens: int) -> float:
    """Bytes that are read to write one token for each of a batch.

    Args:
        model (`PreTrainedModel`): The model.
        batch (`int`): Texts at once.
        tokens (`int`): How many tokens the cache holds of each.

    Returns:
        `float`: All weights once, except for a table of embeddings that is no head, and the cache. Of a mixture of
            experts all are counted, though a small batch reads only some.
    """
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    tied = head is not None and getattr(head, "weight", None) is table.weight
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if not tied:
        weights -= table.weight.numel() * table.weight.element_size()
    return weights + batch * tokens * cache_bytes(model)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, length: int = 32) -> float:
    """Bytes that the cache keeps for a token of a text.

    Args:
        model (`PreTrainedModel`): The model.
        length (`int`, defaults to 32): Tokens in the text that it is measured on.

    Returns:
        `float`: 0 for a model without such a cache.
    """
    output = model(input_ids=torch.ones(1, length, dtype=torch.long, device=model.device), use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)) / length
