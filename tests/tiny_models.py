"""Tiny random models of every model type, each with its family's own alternations between layers.

    model = tiny_model("llama")

`SHRINK` has a small value for every field of a config class that is a size. `OVERRIDES` adds what a family needs to be valid
at that size, and to have all of its kinds of layers (sliding windows, dense and expert layers, shared keys and values)
among `LAYERS` layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from hf_layerprune.families.multimodal import packages_of
from hf_layerprune.runtime.model_class import auto_class_of

from .compat import PROVEN_AT, UNCUT

DOCUMENT = Path(__file__).parents[1] / "docs" / "architectures.md"
LAYERS = 8
VOCAB = 128
# The rounding of fused kernels depends on the alignment of a tensor in memory, which a reload changes.
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
# The types that `AutoModelForCausalLM` can't load; tiny_multimodal.py makes them.
MULTIMODAL_TYPES = tuple(sorted(set(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES) - set(MODEL_TYPES)))
ALL_TYPES = (*MODEL_TYPES, *MULTIMODAL_TYPES)
# Called for a type that is missing or broken in the installed transformers, or needs a package that is missing. tests/conftest.py
# sets it to skip the test; the matrix tries the type.
on_unusable: Callable[[str], Any] | None = None

_LAYER_COUNTS = dict.fromkeys(
    ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers"), LAYERS
)
SHRINK: dict[str, Any] = _LAYER_COUNTS | {
    # widths
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("intermediate_size", "n_inner", "d_inner", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "dff", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    "shared_experts_intermediate_size": 16,
    "lru_width": 32,
    # heads
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    "swa_num_attention_heads": 4,
    **dict.fromkeys(("head_dim", "kv_channels", "attention_head_size", "swa_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    "qk_head_dim": 16,
    "index_head_dim": 8,
    # Longer than the texts of the tests, since sparse attention picks other tokens with a cache than without one.
    "index_topk": 64,
    "index_n_heads": 2,
    # other stacks
    **dict.fromkeys(("encoder_layers", "num_encoder_layers"), 2),
    # vocabulary and positions
    "vocab_size": VOCAB,
    "type_vocab_size": 2,
    **dict.fromkeys(("shape_embed_dim", "pronunciation_embed_dim"), 16),
    **dict.fromkeys(("shape_vocab_size", "pronunciation_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions"), 128),
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    "zero_expert_num": 2,
    # state spaces and linear attention
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_chunk_size", "chunk_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_head_dim", "linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "linear_num_key_heads": 2,
    # what differs from layer to layer
    **dict.fromkeys(("sliding_window", "attention_window_size", "local_attention"), 6),
    "use_sliding_window": True,
    "max_window_layers": 3,
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 3),
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
}
# Scales of embeddings, residuals and logits: never 1, so that ignoring or inverting one changes the result.
SCALES: dict[str, float] = {
    **dict.fromkeys(("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"), 1.5),
    "attn_logit_softcapping": 3.0,
    "logit_scale": 0.7,
    "logits_scaling": 1.6,
    "logits_mup_width_multiplier": 3.0,
    "dim_model_base": 20,
    "lm_head_multiplier": 1.3,
    "output_multiplier": 1.3,
    "embedding_multiplier": 1.2,
    "residual_multiplier": 0.8,
    "attention_multiplier": 0.5,
    **dict.fromkeys(("attention_in_multiplier", "ssm_in_multiplier"), 1.1),
    **dict.fromkeys(("attention_out_multiplier", "ssm_out_multiplier", "key_multiplier"), 0.9),
    "mup_enabled": True,
}
# Parts of the names of fields that make training random.
_RANDOM = ("drop", "jitter")


def _cycle(*kinds: str, n: int = LAYERS) -> list[str]:
    return [kinds[i % len(kinds)] for i in range(n)]


_MLA = {"num_key_value_heads": 4}
_DECODER = {"is_decoder": True}
_ENCODER_AS_DEEP = {"encoder_layers": LAYERS}  # the cache of these decoders is sized by the encoder
# Not periodic: in a periodic list, the entries that the middle cut keeps can equal the first ones, so that truncating the list
# instead of selecting from it would go unnoticed (tests/test_matrix.py checks every list for that).
_ONE_OF_TWO = "01010111"


def mixed(first: str, second: str) -> list[str]:
    return [(first, second)[int(digit)] for digit in _ONE_OF_TWO]


_SLIDING = {"layer_types": mixed("sliding_attention", "full_attention")}
_DENSE_AND_SPARSE = {"mlp_layer_types": mixed("dense", "sparse")}
_SPARSE_STEP = {"decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}
_LINEAR = {"layer_types": _cycle("linear_attention", "full_attention", "linear_attention")}
_SMALL_VISION = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 48}
_SHARED_KV = {
    "num_kv_shared_layers": 3,
    "layer_types": [f"{kind}_attention" for kind in "full sliding sliding sliding full full sliding full".split()],
}
_DOTS = {
    "num_key_value_heads": 4,
    "head_dim": 16,
    "layer_types": mixed("indexed_attention", "sliding_attention"),
    "per_layer_config": {i: {"kv_lora_rank": 16} for i in range(LAYERS) if _ONE_OF_TWO[i] == "1"},
    **_DENSE_AND_SPARSE,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "hc_count": 2,
    "split_ngram_parts": 1,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
    "ple_layer_ids": [2, 5],
    "ple_embed_dim": 32,
    "eos_token_id": 2,
    "layer_types": _cycle("linear_attention", "linear_attention", "indexed_attention"),
}

OVERRIDES: dict[str, dict[str, Any]] = {
    **{t: _DECODER for t in (
        "bert", "bert-generation", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
        "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl",
    )},
    **{t: _ENCODER_AS_DEEP for t in (
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart",
        "whisper",
    )},
    "prophetnet": {"num_encoder_layers": LAYERS},
    **{t: _MLA for t in ("deepseek_v3", "longcat_flash", "minicpm3", "sarvam_mla", "youtu")},
    **{t: _MLA | _DENSE_AND_SPARSE for t in ("axk1", "axk2", "deepseek_v32", "glm4_moe_lite")},
    **{t: _MLA | _DENSE_AND_SPARSE | {"indexer_types": ["full", "shared"] * 3 + ["full", "full"]}
       for t in ("glm_moe_dsa", "hy_v4")},
    **{t: _MLA | _DENSE_AND_SPARSE | _LINEAR for t in ("bailing_hybrid", "kimi_linear")},
    **{t: _SLIDING for t in (
        "afmoe", "cohere2", "cohere2_moe", "cwm", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "kolibri1",
        "modernbert-decoder", "olmo3", "vaultgemma", "granitemoe_swa", "beam",
    )},
    **{t: _SLIDING | _DENSE_AND_SPARSE for t in ("exaone_moe", "mellum", "mimo_v2_flash")},
    **{t: _LINEAR for t in ("granitemoehybrid", "olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "minimax")},
    **{t: _SPARSE_STEP for t in ("qwen2_moe", "qwen3_moe")},
    "qwen3_next": _SPARSE_STEP | _LINEAR,
    "flint": _SPARSE_STEP | _SLIDING,
    "granite_swa": _SLIDING | {"layer_rope_theta": [1e4, 1e5] * 4},
    "granitemoe_swa": _SLIDING | {"layer_rope_theta": [1e4, 1e5] * 4},
    "bamba": {"attn_layer_indices": [1, 4]},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "cohere_compass_text": {
        "rope_parameters": {t: {"rope_type": "default", "rope_theta": 1e4} for t in _cycle("sliding_attention", "full_attention")},
        **_SLIDING,
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
             "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_top_k": 2}},
    "deepseek_v2": {"num_key_value_heads": 4, "topk_method": "greedy", "norm_topk_prob": False, "n_group": 1,
                    "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": _DOTS,
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "num_hidden_layers": 2, "pyramid_num_routed": [-1, -1]},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": 6, "moe_layer_interval": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "fuyu": {"text_config": {"model_type": "persimmon", "hidden_size": 32, "intermediate_size": 48, "vocab_size": VOCAB,
                             "num_hidden_layers": LAYERS, "num_attention_heads": 4, "max_position_embeddings": 128}},
    "gemma3n": {
        # The ids from the text's own on are those of the image's vocabulary, then of the audio's.
        "text_config": {"vocab_size": VOCAB + 32},
        "vision_config": {"architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": 16, "vocab_offset": VOCAB},
        "audio_config": {"vocab_size": 16, "vocab_offset": VOCAB + 16, "hidden_size": 32, "input_feat_size": 16,
                         "conf_num_attention_heads": 4, "conf_num_hidden_layers": 2, "sscp_conv_channel_size": [8, 4]},
        "image_token_id": VOCAB + 1, "audio_token_id": VOCAB + 17,
        "boi_token_id": VOCAB + 2, "eoi_token_id": VOCAB + 3, "boa_token_id": VOCAB + 18, "eoa_token_id": VOCAB + 19,
        "vision_soft_tokens_per_image": 4, "audio_soft_tokens_per_image": 4,
    },
    "gemma3n_text": _SHARED_KV | {"intermediate_size": [32, 48] * 4, "activation_sparsity_pattern": [0.5, 0.0] * 4},
    "gemma4_text": _SHARED_KV,
    "gemma4_unified_text": _SHARED_KV,
    "gemma4_unified_vision": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
    "git": {"vision_config": _SMALL_VISION | {"image_size": 32, "patch_size": 16}},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]], "window_size": 6},
    "hy_v3": _DENSE_AND_SPARSE,
    "inkling_text": {"layer_types": mixed("hybrid_sliding", "hybrid")},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": [1, 2] * 4},
    "jamba": {"num_hidden_layers": 12, "attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 4,
              "expert_layer_offset": 3, "use_mamba_kernels": False},
    "laguna": _SLIDING | _DENSE_AND_SPARSE | {"num_attention_heads_per_layer": [4, 2] * 4},
    "lfm2": {"full_attn_idxs": [1, 4, 6]},
    "lfm2_moe": {"layer_types": _cycle("conv", "full_attention", "conv")},
    "lfm3": {"layer_types": _cycle("conv", "full_attention", "sliding_attention")},
    "llama4_text": {"moe_layers": [1, 2, 4, 7], "attention_chunk_size": 6},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "mllama_text_model": {"cross_attention_layers": [1, 4], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "moshi": {"audio_vocab_size": 32, "sliding_window": 64},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": _cycle("linear_attention", "moe", "full_attention", "mlp"),
                   "n_groups": 1, "use_mamba_kernels": False},
    "phi4_multimodal": {"vision_config": _SMALL_VISION, "audio_config": {"num_blocks": 2}},
    "qwen4_exp_text": _QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small(config_class: type, overrides: dict[str, Any]) -> dict[str, Any]:
    fields = config_class().to_dict()
    small = {name: value for name, value in SHRINK.items() if fields.get(name) is not None}
    scales = {name: value for name, value in SCALES.items() if name in fields}
    still = {
        name: 0.0 for name, value in fields.items() if isinstance(value, float) and any(p in name for p in _RANDOM)
    }
    return small | scales | still | overrides


@cache
def is_current() -> bool:
    """Whether the matrix was run with the installed version of transformers."""
    return f"of transformers {transformers.__version__} is" in DOCUMENT.read_text(encoding="utf-8")


@cache
def unusable(model_type: str, version: str = transformers.__version__) -> str | None:
    """Why no test can use a type, or `None`: transformers lacks it, or its uncut model fails in that version."""
    if model_type not in CONFIG_MAPPING:
        return f"there is no model type {model_type} with transformers {version}"
    row = json.loads(PROVEN_AT.read_text()).get(version, {})
    if row and model_type in MULTIMODAL_TYPES and model_type not in row["proven"]:
        return f"the multimodal type {model_type} was not tried with transformers {version}"
    why = row.get("failed", {}).get(model_type, "")
    return (
        f"model type {model_type} with transformers {version} {shorten(why, 120)}" if why.startswith(UNCUT) else None
    )


def tiny_config(model_type: str):
    """A small config of the model type."""
    # With the version of transformers that the matrix was made with, a type that is missing or broken is a failure.
    if on_unusable is not None and not is_current() and (reason := unusable(model_type)):
        on_unusable(reason)
    if model_type in MULTIMODAL_TYPES:
        from .tiny_multimodal import multimodal_config

        return multimodal_config(model_type)
    config_class = CONFIG_MAPPING[model_type]
    overrides = dict(OVERRIDES.get(model_type, {}))
    for name, part in config_class.sub_configs.items():
        if part.__name__ == "AutoConfig":  # any class is possible; take that of the default
            part = type(getattr(config_class(), name))
        if part is not type(None) and not hasattr(overrides.get(name), "model_type"):
            base = _SMALL_VISION if name in ("vision_config", "audio_config") else {}
            own = OVERRIDES.get(part.model_type, {}) | (overrides.get(name) or {})
            section = small(part, {k: v for k, v in base.items() if k in part().to_dict()} | own)
            overrides[name] = {"model_type": part.model_type} | section
    return config_class(**small(config_class, overrides))


def tiny_model(model_type: str, seed: int = 0):
    """A small random model of the type, in float32 and evaluation mode, in which every layer matters."""
    torch.manual_seed(seed)
    config = tiny_config(model_type)
    if on_unusable is not None and "timm" in packages_of(config.to_dict()) and find_spec("timm") is None:
        on_unusable(f"model type {model_type} needs timm, which is not installed")
    model = auto_class_of(config).from_config(config, dtype=torch.float32, **EAGER).eval()
    randomize(model, seed)
    return model


@torch.no_grad()
def randomize(model, seed: int = 0) -> None:
    """Give every parameter a different value, so that mixing up two layers, or two biases, changes the result."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim < 2:
            parameter.add_(0.1 * noise)
        else:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def tiny_input(seed: int = 0, batch: int = 2, length: int = 16) -> torch.Tensor:
    """Token ids `[batch, length]` without special tokens."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
