"""How GGUF metadata keys describe layers, and which GGUF architectures can be pruned.

The first table sorts keys: one value per layer, a period, or not about layers. Any other key that looks as if it were
about layers is refused. The second table lists architectures whose llama.cpp code was reviewed: it depends only on a layer's
tensors and keys, or on a fixed period or layer count that is noted here. Architecture names are those of
`general.architecture`, which are llama.cpp's, not transformers'.
"""

from typing import NamedTuple

from ..layer_ranges import MAX_LAYERS


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# One value for all layers, or an array with one value per layer.
PER_LAYER = _words(
    """
    attention.head_count attention.head_count_kv attention.recurrent_layers attention.rope_pattern
    attention.sliding_window_pattern expert_feed_forward_length expert_used_count feed_forward_length
    """
)
# Of these, keys whose first value also sets a size of the whole model, such as the default head size.
FIRST_SIZES_ALL = _words(
    """
    attention.head_count attention.head_count_kv expert_feed_forward_length expert_used_count feed_forward_length
    """
)
# Of these, keys that distinguish two kinds of layers by zero and non-zero values.
TWO_KINDS = frozenset({"attention.head_count_kv", "attention.recurrent_layers"})
# Like `PER_LAYER`, for the few keys without the architecture's name as a prefix.
PER_LAYER_UNPREFIXED = frozenset({"xielu.alpha_p", "xielu.alpha_n", "xielu.beta", "xielu.eps"})
# Periods: the layers at the end of each group of n differ.
PERIODS = frozenset({"attention.sliding_window_pattern", "full_attention_interval", "interleave_moe_layer_step"})
# Arrays that are not about layers, whatever their length.
ARRAYS = frozenset({"rope.dimension_sections", "classifier.output_labels"})
# Numbers that are not about layers, though their name or their value may look like it.
SCALARS = _words(
    """
    attention.key_length attention.key_length_mla attention.key_length_swa attention.kv_lora_rank
    attention.layer_norm_epsilon attention.layer_norm_rms_epsilon attention.q_lora_rank attention.sliding_window
    attention.temperature_length attention.value_length attention.value_length_mla attention.value_length_swa
    context_length embedding_length embedding_length_out expert_count expert_gating_func expert_group_count
    expert_group_used_count expert_shared_count expert_shared_feed_forward_length pooling_type rope.dimension_count
    rope.dimension_count_swa rope.scaling.original_context_length shortconv.l_cache ssm.conv_kernel ssm.group_count
    ssm.inner_size ssm.state_size ssm.time_step_rank vocab_size
    """
)


class ArchRule(NamedTuple):
    """How llama.cpp's code for an architecture depends on layer indices, besides the metadata."""

    period: int = 0
    period_key: str = ""
    only_if: str = ""
    counts: tuple[frozenset[int], ...] = ()


# For these, llama.cpp depends only on a layer's tensors and metadata.
_FREE = _words(
    """
    apertus arcee bailingmoe bitnet bloom chatglm codeshell dbrx deepseek dots1 ernie4_5 ernie4_5-moe exaone falcon
    falcon-h1 gemma glm4 glm4moe gpt2 gptneox granite granitehybrid granitemoe hunyuan-dense hunyuan-moe internlm2
    jamba lfm2 lfm2moe llama mamba mamba2 minimax-m2 mistral3 mpt nemotron olmo olmoe openelm orion phi2 phi3 phimoe
    plm qwen qwen2 qwen2moe qwen2vl qwen3 qwen3moe refact seed_oss stablelm starcoder starcoder2 xverse
    """
)
_WINDOW, _INTERVAL = "attention.sliding_window_pattern", "full_attention_interval"
ARCHITECTURES: dict[str, ArchRule] = {
    **{arch: ArchRule() for arch in _FREE},
    # Every fourth layer has no rotary embedding.
    "smollm3": ArchRule(4),
    # Sliding-window and full attention alternate. Where `counts` is given, llama.cpp derives the model size from the
    # layer count, and from it the attention scale or which tensors exist.
    "gemma2": ArchRule(2, _WINDOW, counts=(frozenset({46}),)),
    "gemma3": ArchRule(6, _WINDOW, counts=(frozenset({62}),)),
    "cohere2": ArchRule(4, _WINDOW),
    "gpt-oss": ArchRule(2, _WINDOW),
    "olmo2": ArchRule(4, _WINDOW, only_if="attention.sliding_window"),
    "llama4": ArchRule(4, _WINDOW),
    "exaone4": ArchRule(counts=(frozenset({64}),)),
    "command-r": ArchRule(counts=(frozenset(range(64, MAX_LAYERS + 1)),)),
    "deepseek2": ArchRule(counts=(frozenset({26, 27}), frozenset({47}), frozenset({48}))),
    # Linear and full attention alternate.
    "qwen3next": ArchRule(4, _INTERVAL),
    "qwen35": ArchRule(4, _INTERVAL),
    "qwen35moe": ArchRule(4, _INTERVAL),
}
