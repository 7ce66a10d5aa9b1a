"""The operations and memory traffic of a model, from which a theoretical speed-up follows.

Prefill is bound by arithmetic, so its ideal time is proportional to the floating-point operations. Decoding a token reads
every weight once, so its ideal time is proportional to the bytes read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..families.layout import text_model
from ..runtime.model_class import model_without_weights
from ..runtime.parts import cache_of, hook_scope

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from .requests import Workload


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of attention, for shapes `[batch, heads, seq, width]`; several heads may share those of `key`."""
    heads = query[1]
    return sdpa_flop_count(query, (key[0], heads, *key[2:]), (value[0], heads, *value[2:]))


def _expert_flops(tokens: torch.Size, experts: torch.Size, *_: Any, **__: Any) -> int:
    """Operations of a product of tokens, `[tokens, width]`, each with the matrix of one expert."""
    return 2 * tokens.numel() * experts[-1]


_TOKENS = 32
# Torch's counter ignores the kernels for CPUs and for experts, and below torch 2.13 fails where heads are shared.
_KERNELS = {
    torch.ops.aten._grouped_mm: _expert_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
}


def theoretical_cost(model: PreTrainedModel, phase: str, work: Workload) -> float | None:
    """Operations of a workload's `"prefill"`, or bytes to `"decode"` a token halfway; `None` where they can't be counted."""
    if phase == "prefill" and getattr(model, "is_quantized", False):  # torch's counter knows no quantiser's kernels
        model = empty_model(model.config, model.dtype)
    try:
        if phase == "decode":
            return decode_bytes(model, work.batch, work.prompt_tokens + work.new_tokens // 2)
        return float(prefill_flops(model, work.batch, work.prompt_tokens))
    except RuntimeError:
        if model.device.type != "meta":
            raise
        return None  # some models need values


def empty_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model on which costs can be counted: without weights, never quantised, and experts need no values to be chosen."""
    model = model_without_weights(config, dtype=dtype).eval()
    model.set_experts_implementation("batched_mm")
    return model


def prefill_flops(model: PreTrainedModel, batch: int, length: int) -> int:
    """Floating-point operations of a prefill, counted during one: matrix products and attention, as in [`prefill`]."""
    ids = torch.ones(batch, length, dtype=torch.long, device=model.device)
    # The counter looks for gradients of weights that are passed to modules, as to DBRX's experts.
    model.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_KERNELS) as counter:
        prefill(model, ids)
    return counter.get_total_flops()


def prefill(model: PreTrainedModel, ids: torch.Tensor) -> Any:
    """Run a prefill of token ids `[batch, length]` as `generate` does: with a cache, and logits for the last token only."""
    supports: Any = model._supports_logits_to_keep
    last = {"logits_to_keep": 1} if supports() else {}
    return model(input_ids=ids, use_cache=True, **last)


def decode_bytes(model: PreTrainedModel, batch: int, tokens: int) -> float:
    """Bytes that are read to decode one token for each of `batch` sequences with `tokens` tokens in the cache.

    That is the size of the cache and of the weights, without embeddings that are not tied to the head and without what
    only images or audio pass through. Of the experts of a mixture, it is those that at least one token of the batch
    is expected to use (`share_in_use`).
    """
    head: Any = model.get_output_embeddings()
    table: Any = model.get_input_embeddings()
    shares = {parameter: share_in_use(share, batch) for parameter, share in expert_shares(model).items()}
    parts = [part for part in (text_model(model), head) if part is not None]
    read = {one: one.nbytes * shares.get(one, 1) for part in parts for one in part.parameters()}
    if head is None or getattr(head, "weight", None) is not table.weight:
        read.pop(table.weight, None)
    return sum(read.values()) + (batch * tokens * cache_bytes(model, tokens) if tokens else 0)


def share_in_use(share: float, batch: int) -> float:
    """The expected share of experts that some token of a batch uses, if each uses a `share` of them, all equally likely."""
    return 1 - (1 - share) ** batch


def active_parameters(model: PreTrainedModel) -> int:
    """The parameters that one token uses: all but those of experts that it is not routed to."""
    idle = sum(one.numel() * (1 - share) for one, share in expert_shares(model).items())
    return model.num_parameters() - round(idle)


@torch.no_grad()
def expert_shares(model: PreTrainedModel) -> dict[nn.Parameter, float]:
    """The share of the experts that a token is routed to, by each parameter that holds the weights of several.

    It is the number of experts that the router passes on for each token during a prefill, over the number that there
    are. Experts that are called in another way, as Llama 4's, which all run for every token, are not listed.
    """
    shares: dict[nn.Parameter, float] = {}

    def note_share(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for chosen in (*args, *kwargs.values()):
            are_ids = isinstance(chosen, torch.Tensor) and not (
                chosen.is_floating_point() or chosen.dtype == torch.bool
            )
            if are_ids and chosen.shape[:-1].numel() == _TOKENS:  # not the positions, `[batch, seq]`
                shares.update((weight, chosen.shape[-1] / len(weight)) for weight in experts.parameters(recurse=False))

    found = [one for one in model.modules() if any(weight.ndim == 3 for weight in one.parameters(recurse=False))]
    if found:
        with hook_scope(*(experts.register_forward_pre_hook(note_share, with_kwargs=True) for experts in found)):
            prefill(model, torch.ones(1, _TOKENS, dtype=torch.long, device=model.device))
    return shares


@torch.no_grad()
def cache_bytes(model: PreTrainedModel, tokens: int = _TOKENS) -> float:
    """Size of the key-value cache in bytes per token, measured on so many tokens; 0 for a model without such a cache.

    Layers with a sliding window stop growing, so a long text takes less per token than a short one.
    """
    output = prefill(model, torch.ones(1, tokens, dtype=torch.long, device=model.device))
    layers = getattr(cache_of(output), "layers", ())
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor)) / tokens
