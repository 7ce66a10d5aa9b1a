"""How GGUF metadata keys describe layers, and which GGUF architectures can be pruned.

There are two tables. The first classifies each architecture's keys: one value per layer, a number of layers, a period,
or not about layers. The second lists architectures whose llama.cpp code was reviewed: it depends only on a layer's
tensors and keys, or on a fixed period or layer count that is noted here. Architecture names are those of
`general.architecture`, which are llama.cpp's, not transformers'.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..files.gguf_header import MAX_LAYERS


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# One value for all layers, or an array with one value per layer.
PER_LAYER = _words(
    """
    activation_sparsity_scale attention.compress_ratios attention.head_count attention.head_count_kv
    attention.indexer.types attention.recurrent_layers attention.rope_pattern attention.sliding_window_pattern
    deepstack_mapping expert_feed_forward_length expert_used_count feed_forward_length swiglu_clamp_exp
    swiglu_clamp_shexp
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
# A number of layers at the start, or at the end, that differ from the rest.
LEADING = frozenset({"leading_dense_block_count", "hash_layer_count"})
TRAILING = frozenset({"nextn_predict_layers"})
# Periods (every n-th layer differs): whether llama.cpp treats a layer as different.
PERIODS: dict[str, Callable[[int, int], bool]] = {
    "attention.sliding_window_pattern": lambda layer, n: (layer + 1) % n == 0,
    "full_attention_interval": lambda layer, n: (layer + 1) % n == 0,
    "interleave_moe_layer_step": lambda layer, n: (layer + 1) % n == 0,
    "moe_every_n_layers": lambda layer, n: layer % n == 1,
}
# Layers that must keep their index, because something outside the file, or baked into the weights, depends on it:
# the first n layers, or all kept layers.
UNMOVED_FIRST = frozenset({"n_deepstack_layers"})
UNMOVED_ALL = frozenset({"rescale_every_n_layers"})
# Other keys about layers, without a known exact rewrite; accepted only if 0.
ZERO_ONLY = _words(
    """
    attention.shared_kv_layers attn_res.block_size block_size convnext.block_count decoder_block_count
    hrm.layers_per_stack num_loops posnet.block_count
    """
)
# Not about layers; arrays are copied unchanged.
ARRAYS = frozenset({"rope.dimension_sections", "classifier.output_labels"})
# Not about layers, and never an array.
SCALARS = _words(
    """
    activation.situ_beta activation.situ_linear_beta altup.active_idx altup.num_inputs attention.causal
    attention.clamp_kqv attention.compress_rope_freq_base attention.decay_lora_rank attention.gate_lora_rank
    attention.group_norm_epsilon attention.group_norm_groups attention.iclr_lora_rank
    attention.indexer.block_size attention.indexer.head_count attention.indexer.key_length
    attention.indexer.kpool attention.indexer.kpool_select_tail attention.indexer.local_blocks
    attention.indexer.top_k attention.key_length attention.key_length_mla attention.key_length_mla_swa
    attention.key_length_swa attention.kv_lora_rank attention.kv_lora_rank_swa attention.layer_norm_epsilon
    attention.layer_norm_rms_epsilon attention.max_alibi_bias attention.output_group_count
    attention.output_lora_rank attention.output_scale attention.q_lora_rank attention.relative_buckets_count
    attention.scale attention.sliding_window attention.temperature_length attention.temperature_scale
    attention.value_length attention.value_length_mla attention.value_length_mla_swa attention.value_length_swa
    attention.value_residual_mix_lora_rank attention.value_scale attn_logit_softcapping
    classifier.pooling_type context_length convnext.embedding_length decoder_start_token_id embedding_length
    embedding_length_out embedding_length_per_layer_input embedding_scale expert_chunk_feed_forward_length
    expert_count expert_gating_func expert_group_count expert_group_scale expert_group_used_count
    expert_latent_length expert_shared_count expert_shared_feed_forward_length expert_weights_norm
    expert_weights_scale experts_per_group features_length final_logit_softcapping hidden_activation
    hyper_connection.count hyper_connection.epsilon hyper_connection.low_rank hyper_connection.magnitude
    hyper_connection.sinkhorn_iterations kda.gate_lower_bound kda.head_dim kda.safe_gate logit_scale
    moe_latent_size pooling_type posnet.embedding_length residual_scale rope.dimension_count
    rope.dimension_count_swa rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.alpha
    rope.scaling.attn_factor rope.scaling.factor rope.scaling.finetuned
    rope.scaling.original_context_length rope.scaling.type rope.scaling.yarn_attn_factor
    rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow rope.scaling.yarn_ext_factor
    rope.scaling.yarn_log_multiplier router_logit_softcapping shortconv.l_cache ssm.conv_kernel ssm.dt_b_c_rms
    ssm.group_count ssm.inner_size ssm.state_size ssm.time_step_rank swin_norm tensor_data_layout
    time_decay_extra_dim time_mix_extra_dim token_shift_count use_parallel_residual vocab_size wkv.head_size
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
# Known not to work.
REFUSED = {
    "baichuan": "llama.cpp picks rotary or ALiBi positions by the number of layers",
    "deci": "its layers may have no tensors at all",
    "gemma3n": "its per-layer embeddings are one tensor for all layers, and its last layers reuse earlier caches",
    "gemma4": "its per-layer embeddings are one tensor for all layers, and its last layers reuse earlier caches",
    "minicpm": "llama.cpp derives the residual scale from the number of layers",
    "minicpm3": "llama.cpp derives the residual scale from the number of layers",
    "minimax-01": "the decay of a layer depends on its index",
    "nanbeige": "its layers run in a loop",
    "rwkv6": "its weights are scaled by their layer's index",
    "rwkv7": "its first layer feeds all others",
    "t5": "it is an encoder and a decoder",
}
