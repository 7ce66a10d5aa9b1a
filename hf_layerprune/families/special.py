"""Families whose layers depend on each other or on their position, and the constraints on a cut.

Families that are not listed here need only the field rules in `fields.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import CutError
from .fields import Cut, Rule, remap, unchanged

Fields = dict[str, Any]


@dataclass(frozen=True)
class WideTensor:
    """A tensor outside the layers that holds one slice per layer.

    Args:
        suffix (`str`): The end of the parameter's name.
        dim (`int`): The dimension of size `num_layers * width`.
        width_field (`str`): The config field that holds `width`.
    """

    suffix: str
    dim: int
    width_field: str


@dataclass(frozen=True)
class Family:
    """The special rules of a model type.

    Args:
        rules (`dict[str, Rule]`): Field rules that replace those in `FIELDS`.
        rewrite_together (`Callable`, *optional*): Rewrites fields that depend on each other; returns the changed ones.
        check (`Callable`, *optional*): Raises `CutError` for a cut that is not possible.
        protect (`Callable`, *optional*): Layers that can never be dropped: the reason, by base index.
        refusal (`Callable`, *optional*): The reason to refuse a config, or `None`.
        wide (`tuple[WideTensor, ...]`): Tensors to slice along with the layers.
        count_field (`str`, *optional*): The field with the layer count; `""` if the count is the length of a list.
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    rewrite_together: Callable[[Fields, Cut], Fields] | None = None
    check: Callable[[Fields, Cut], None] | None = None
    protect: Callable[[Fields, int], dict[int, str]] | None = None
    refusal: Callable[[Fields], str | None] | None = None
    wide: tuple[WideTensor, ...] = ()
    count_field: str | None = None


# --- mixtures of experts whose dense layers follow a period -------------------------------------------------


def _list_dense_layers(fields: Fields, cut: Cut) -> Fields:
    """Replace `decoder_sparse_step`, which makes layer i sparse if it divides i + 1, by a list of the dense layers."""
    step, listed = fields["decoder_sparse_step"], fields.get("mlp_only_layers") or []
    dense = [i for i in range(cut.num_layers) if i in listed or (i + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": remap(dense, cut)}


SPARSE_STEP = Family(
    rules={"decoder_sparse_step": unchanged, "mlp_only_layers": unchanged}, rewrite_together=_list_dense_layers
)


def _fit_period(flags: list[bool], what: str, period: int, offset: int) -> tuple[int, int]:
    """The period and offset that give these flags: the old ones if they still do, otherwise the shortest period.

    With a period longer than the model, no flag is set.
    """
    candidates = [(period, offset), *((p, o) for p in range(1, len(flags) + 2) for o in range(p))]
    for p, o in candidates:
        if all(flag == (i % p == o) for i, flag in enumerate(flags)):
            return p, o
    raise CutError(
        f"the config can only describe {what} layers at a fixed period (here {period}, offset {offset}), which the "
        f"kept layers don't follow; drop whole periods, or one layer of each"
    )


def _fit_two_periods(fields: Fields, cut: Cut) -> Fields:
    changed: Fields = {}
    for kind, what in (("attn", "attention"), ("expert", "expert")):
        names = f"{kind}_layer_period", f"{kind}_layer_offset"
        period, offset = (fields[name] for name in names)
        new = _fit_period([i % period == offset for i in cut.keep], what, period, offset)
        changed.update(zip(names, new, strict=True))
    return changed


TWO_PERIODS = Family(
    rules=dict.fromkeys(
        ("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"), unchanged
    ),
    rewrite_together=_fit_two_periods,
)


def _fit_interval(fields: Fields, cut: Cut) -> Fields:
    """Expert layers: every n-th one between a first and a last index."""
    names = "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"
    start, end, interval = (fields[name] for name in names)
    end = cut.num_layers - 1 if end == -1 else end
    flags = [(i + 1) % interval == 0 and start <= i <= end for i in cut.keep]
    if not any(flags):
        return dict(zip(names, (len(flags), len(flags), 1), strict=True))
    first, last = flags.index(True), len(flags) - 1 - flags[::-1].index(True)
    for n in (interval, *range(1, len(flags) + 1)):
        if all(flag == ((i + 1) % n == 0 and first <= i <= last) for i, flag in enumerate(flags)):
            return dict(zip(names, (first, last, n), strict=True))
    raise CutError(
        f"the config can only describe expert layers at a fixed interval (here {interval}), which the kept layers "
        "don't follow; drop whole intervals"
    )


INTERVAL_BETWEEN = Family(
    rules=dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), unchanged),
    rewrite_together=_fit_interval,
)

# --- key-value sharing --------------------------------------------------------------------------------------


def _check_sharing(fields: Fields, cut: Cut) -> None:
    """Sharing layers at the end read the keys and values of the last earlier layer of their type, which must stay."""
    types, shared = fields["layer_types"], fields.get("num_kv_shared_layers") or 0
    first = cut.num_layers - shared
    for i in range(first, cut.num_layers):
        if i not in cut.new_index:
            continue
        producer = first - 1 - types[:first][::-1].index(types[i])
        if producer not in cut.new_index:
            raise CutError(f"layer {producer} computes the keys and values that layer {i} reads; keep it")


def _check_full_attention_last(fields: Fields, cut: Cut) -> None:
    _check_sharing(fields, cut)
    types = fields["layer_types"]
    if types[cut.keep[-1]] != "full_attention":
        full = [i for i in range(cut.num_layers) if types[i] == "full_attention"]
        raise CutError(
            f"the last layer of this architecture must have full attention, but layer {cut.keep[-1]}, the last one "
            f"kept, does not; let one of {full} be the last one kept (protect_last=1 keeps the current one)"
        )


def _check_indexer(fields: Fields, cut: Cut) -> None:
    """A layer with a shared indexer uses the tokens selected by the nearest earlier full indexer, which must stay."""
    types, kinds = fields.get("indexer_types") or [], fields.get("layer_types") or []
    attend = [i for i in range(len(types)) if kinds[i : i + 1] != ["linear_attention"]]
    for i in attend:
        if i in cut.new_index and types[i] == "shared":
            producer = max(j for j in attend if j < i and types[j] != "shared")
            if producer not in cut.new_index:
                raise CutError(f"layer {producer} selects the tokens that layer {i} attends to; keep it, or drop both")


_PER_LAYER_EMBEDDINGS = (
    WideTensor("embed_tokens_per_layer.weight", 1, "hidden_size_per_layer_input"),
    WideTensor("per_layer_model_projection.weight", 0, "hidden_size_per_layer_input"),
)

SHARED_KV = Family(check=_check_sharing, wide=_PER_LAYER_EMBEDDINGS)
SHARED_KV_FULL_LAST = Family(check=_check_full_attention_last, wide=_PER_LAYER_EMBEDDINGS)

# --- layers that must keep their position --------------------------------------------------------


def _protect_first(reason: str) -> Callable[[Fields, int], dict[int, str]]:
    return lambda fields, num_layers: {0: reason}


def _protect_last(reason: str) -> Callable[[Fields, int], dict[int, str]]:
    return lambda fields, num_layers: {num_layers - 1: reason}


def _protect_ngram_layers(fields: Fields, num_layers: int) -> dict[int, str]:
    reason = "it holds an n-gram table, whose hashes depend on how many such layers precede it"
    return {i - 1: reason for i in fields.get("ple_layer_ids") or []}


# --- configs that can't be pruned --------------------------------------------


def _refuse_encoder(fields: Fields) -> str | None:
    if fields.get("is_decoder") or fields.get("is_causal"):
        return None
    return "it is an encoder (config.is_decoder is false), and only decoders can be pruned; set is_decoder=True"


DECODER_ONLY = Family(refusal=_refuse_encoder)


def _refuse_index_scaling(fields: Fields) -> str | None:
    if fields.get("scale_attn_by_inverse_layer_idx"):
        return "scale_attn_by_inverse_layer_idx divides attention by the layer's index, which a cut changes"
    return None


def _refuse_random_attention(fields: Fields) -> str | None:
    if fields.get("attention_type") == "block_sparse":
        return 'attention_type="block_sparse" draws random blocks from the layer\'s index; use "original_full"'
    return _refuse_encoder(fields)


SPECIAL: dict[str, Family] = {
    **dict.fromkeys(("qwen2_moe", "qwen3_moe", "qwen3_next", "flint"), SPARSE_STEP),
    "jamba": TWO_PERIODS,
    "ernie4_5_moe": INTERVAL_BETWEEN,
    "gemma3n_text": SHARED_KV,
    "gemma4_text": SHARED_KV_FULL_LAST,
    "gemma4_unified_text": SHARED_KV_FULL_LAST,
    **dict.fromkeys(
        ("glm5_next_text", "glm_moe_dsa", "hy_v4", "hy_v4_vl_text", "mistral_large4_text"),
        Family(check=_check_indexer)
    ),
    "modernbert-decoder": Family(protect=_protect_first("it is the only layer without an attention norm")),
    "zaya": Family(protect=_protect_first("its router alone does not average with that of an earlier layer")),
    "gpt_neox_japanese": Family(protect=_protect_last("it is the only layer with an output bias")),
    "qwen4_exp_text": Family(protect=_protect_ngram_layers),
    "nemotron_h": Family(count_field=""),
    # Each layer counts as two hidden layers, in a separate field until transformers 5.16.
    "longcat_flash": Family(
        count_field="num_layers", rules={"num_hidden_layers": lambda value, cut: 2 * len(cut.keep)}
    ),
    **dict.fromkeys(("kosmos_2_text_model", "kosmos_2_5_text_model"), Family(count_field="layers")),
    # The widths of two kinds of experts, not one for each layer.
    "ernie4_5_vl_moe_text": Family(rules={"moe_intermediate_size": unchanged}),
    "xlstm": Family(rules={"num_blocks": lambda value, cut: len(cut.keep)}),
    "gpt2": Family(refusal=_refuse_index_scaling),
    "gpt-sw3": Family(refusal=_refuse_index_scaling),
    "big_bird": Family(refusal=_refuse_random_attention),
    **dict.fromkeys(
        (
            "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
            "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
        ),
        DECODER_ONLY,
    ),
}  # fmt: skip
