"""How each per-layer field of a model config changes when layers are dropped.

Each field name has one rule. A rule takes the old value and a `Cut`, and returns the value that describes the same
layers at their new positions; it raises `CutError` if there is none. Fields that only *seed* another, explicit field
(such as the period from which `layer_types` is computed) stay unchanged: a saved config contains the explicit list,
and the list takes precedence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import CutError
from ..options.kinds import as_integer


@dataclass(frozen=True)
class Cut:
    """Which decoder layers stay.

    Args:
        keep (`tuple[int, ...]`): Base indices of the layers that stay, ascending.
        num_layers (`int`): How many layers the base has.
    """

    keep: tuple[int, ...]
    num_layers: int

    @property
    def drop(self) -> tuple[int, ...]:
        """Base indices of the dropped layers, ascending."""
        kept = set(self.keep)
        return tuple(i for i in range(self.num_layers) if i not in kept)

    @property
    def new_index(self) -> dict[int, int]:
        """Base index to new index, for the layers that stay."""
        return {old: new for new, old in enumerate(self.keep)}


def cut_without(drop_layers: Sequence[int], num_layers: int) -> Cut:
    """The cut that drops these layers, in any order, after checking them.

    Raises:
        CutError: An entry is not an index, out of range or given twice, or no layer or all of them would be dropped.
    """
    dropped: set[int] = set()
    for item in drop_layers:
        i = as_integer(item)
        if i is None:
            raise CutError(
                f"drop_layers has {item!r}, which is not a layer index; specify layers of 0..{num_layers - 1}"
            )
        if not 0 <= i < num_layers:
            raise CutError(f"drop_layers has {i}, but the model's layers are 0..{num_layers - 1}")
        if i in dropped:
            raise CutError(f"drop_layers has {i} more than once; list each layer once")
        dropped.add(i)
    if not dropped:
        raise CutError("drop_layers is empty: nothing would be dropped; list at least one layer, or use drop=N")
    if len(dropped) == num_layers:
        raise CutError(f"drop_layers names all {num_layers} layers; at least one must stay")
    return Cut(tuple(i for i in range(num_layers) if i not in dropped), num_layers)


Rule = Callable[[Any, Cut], Any]


def select_kept(value: Any, cut: Cut) -> Any:
    """A list with one entry per layer: take those of the kept layers. A scalar applies to all layers."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) < cut.num_layers:
        raise CutError(f"has {len(value)} entries for {cut.num_layers} layers")
    # Some published configs have more entries than layers; only the first `num_layers` are used.
    return [value[i] for i in cut.keep]


def remap(value: Any, cut: Cut) -> Any:
    """A set of layer indices: remove the dropped ones, and renumber the rest."""
    return None if value is None else [cut.new_index[i] for i in value if i in cut.new_index]


def remap_sources(value: Any, cut: Cut) -> Any:
    """For each layer, the index of the layer whose results it reads, which must stay."""
    if value is None:
        return None
    for i in cut.keep:
        if value[i] not in cut.new_index:
            raise CutError(f"layer {i} reads what layer {value[i]} computes; keep it, or drop both")
    return [cut.new_index[value[i]] for i in cut.keep]


def remap_one_based(value: Any, cut: Cut) -> Any:
    """Like [`remap`], for layer numbers that start at 1."""
    return None if value is None else [cut.new_index[i - 1] + 1 for i in value if i - 1 in cut.new_index]


def remap_keys(value: Any, cut: Cut) -> Any:
    """A mapping keyed by layer index, as an int or a string of digits."""
    if value is None:
        return None
    return {cut.new_index[int(k)]: v for k, v in value.items() if int(k) in cut.new_index}


def count_below(value: Any, cut: Cut) -> Any:
    """A threshold: layers below it differ from the rest. Count the kept layers below it."""
    return None if value is None else sum(i < value for i in cut.keep)


def count_last(value: Any, cut: Cut) -> Any:
    """A number of layers at the end: count the kept layers among them."""
    return None if value is None else sum(i >= cut.num_layers - value for i in cut.keep)


def expand_pattern(value: Any, cut: Cut) -> Any:
    """A pattern that repeats over the layers: write out the kept layers as one pattern."""
    return value and [value[i % len(value)] for i in cut.keep]


def expand_runs(value: Any, cut: Cut) -> Any:
    """Nested runs `[[[kind, ...], repeats], ...]`: write out the kept layers as one run."""
    if not value:
        return value
    flat = [kind for kinds, repeats in value for _ in range(repeats) for kind in kinds]
    return [[[flat[i] for i in cut.keep], 1]]


def rescale_depth(value: Any, cut: Cut) -> Any:
    """A residual scale that the model divides by the square root of the layer count: keep the quotient."""
    return None if value is None else value / math.sqrt(cut.num_layers) * math.sqrt(len(cut.keep))


def remove_all(value: Any, cut: Cut) -> Any:
    """A number of multi-token prediction layers. They were trained on the dense model, so a cut removes them."""
    return 0 if isinstance(value, int) else value


def unchanged(value: Any, cut: Cut) -> Any:
    """Not per layer, or only the seed of an explicit list that has its own rule."""
    return value


_RULES: tuple[tuple[Rule, str], ...] = (
    # One entry per layer.
    (select_kept, """
        layer_types mlp_layer_types layers_block_type no_rope_layers indexer_types num_attention_heads_per_layer
        layer_rope_theta attention_layers activation_sparsity_pattern
    """),
    # Scalars in most families, one entry per layer in some.
    (select_kept, "intermediate_size num_experts moe_topk moe_intermediate_size num_shared_expert"),
    # Layer indices.
    (remap, """
        attn_layer_indices mlp_only_layers moe_layers cross_attention_layers full_attn_idxs hybrid_layer_ids
        local_layer_ids rope_scaling_layers
    """),
    (remap_one_based, "ple_layer_ids"),
    (remap_sources, "kv_source_layers"),
    (remap_keys, "per_layer_config"),
    # Thresholds and counts.
    (count_below, "first_k_dense_replace num_dense_layers max_window_layers num_hash_layers"),
    (count_last, "num_kv_shared_layers"),
    (remove_all, "num_nextn_predict_layers num_mtp_layers"),
    # Patterns.
    (expand_pattern, "block_types"),
    (expand_runs, "attention_types"),
    (rescale_depth, "scale_depth"),
    # Seeds of explicit lists.
    (unchanged, """
        full_attention_interval global_attn_every_n_layers sliding_window_pattern _sliding_window_pattern
        no_rope_layer_interval interleave_moe_layer_step prefix_dense_sliding_window_pattern layer_group_size
        index_topk_freq index_topk_pattern index_skip_topk_offset hybrid_override_pattern
    """),
    # Not the decoder's layers: encoders, multi-token prediction, per-layer embedding widths.
    (unchanged, """
        encoder_layers num_encoder_layers mtp_layer_types mtp_mlp_layer_types mtp_layers_block_type mtp_local_layer_ids
        vocab_size_per_layer_input hidden_size_per_layer_input
    """),
    # Lists that are not per layer, whatever their length.
    (unchanged, """
        architectures bos_token_id eos_token_id pad_token_id suppress_tokens begin_suppress_tokens time_step_limit
        mlp_multipliers ssm_multipliers axial_pos_shape axial_pos_embds_dim languages id2label label2id
        task_specific_params
    """),
)  # fmt: skip
FIELDS: dict[str, Rule] = {name: rule for rule, names in _RULES for name in names.split()}

# The fields that may hold the number of decoder layers, most specific first; a config has one of them.
COUNT_FIELDS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")


def looks_per_layer(name: str, value: Any, num_layers: int) -> str | None:
    """Why a field without a rule may be per layer, or `None` if it does not look like it."""
    if isinstance(value, list | tuple) and len(value) == num_layers:
        return f"is a list with one entry for each of the {num_layers} layers"
    if isinstance(value, dict) and value and all(str(key).isdecimal() and int(key) < num_layers for key in value):
        return "is keyed by layer index"
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and "layer" in name and "layer_norm" not in name and "layernorm" not in name:
        return "is a number that may count or index layers"
    return None


def rewrite_fields(
    fields: dict[str, Any], cut: Cut, rules: dict[str, Rule], skip: Sequence[str] = ()
) -> dict[str, Any]:
    """Apply the rules to a config's `to_dict()`, and return only the fields whose values change.

    `rules` take precedence over `FIELDS`. Fields to `skip` are set separately, such as the layer count.

    Raises:
        CutError: A field can't describe the kept layers, or an unknown field may be per layer.
    """
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if name in skip:
            continue
        rule = rules.get(name) or FIELDS.get(name)
        if rule is None:
            if why := looks_per_layer(name, value, cut.num_layers):
                raise CutError(
                    f"config field {name!r} {why}, and no rule says how a cut changes it; if the model does not use it, "
                    "remove it from config.json, or else add a rule in families/fields.py"
                )
            continue
        try:
            new = rule(value, cut)
        except CutError as error:
            raise CutError(f"config field {name!r}: {error}") from None
        if new != value:
            changed[name] = new
    return changed
