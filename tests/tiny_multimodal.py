"""Small configs of every multimodal type: a language decoder of `LAYERS` layers, and towers of one or two.

    config = multimodal_config("qwen2_vl")

The decoder's section is made as in `tiny_models`. The others get small values for every field that is a size (`TOWER`), and
`SECTIONS` adds what a type needs. Special tokens have ids from `VOCAB` up, so that random text has none.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.auto import modeling_auto as names
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_layerprune.families.multimodal import TEXT_ONLY_TYPES, TEXT_SECTIONS
from hf_layerprune.runtime.model_class import auto_class_of

from .tiny_models import EAGER, LAYERS, MODEL_TYPES, OVERRIDES, VOCAB, mixed, randomize, small

# The multimodal class of each type that also has a text class, as `architectures` in a config can name it.
WHOLE = {
    model_type: name
    for model_type, name in names.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.items()
    if model_type in MODEL_TYPES
    and names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] != name
    and model_type not in TEXT_ONLY_TYPES
}
SPECIAL_TOKENS = 32
TOWER: dict[str, Any] = {
    **dict.fromkeys(("depth", "encoder_layers", "num_hidden_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("hidden_size", "embed_dim", "d_model", "out_hidden_size", "output_dim", "hidden_dim"), 32),
    **dict.fromkeys(("num_heads", "num_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "mlp_dim", "ffn_dim"), 48),
    **dict.fromkeys(("num_key_value_heads",), 4),
    "projection_dim": 32,
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 4,
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "text_hidden_size": 32,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
_NARROW_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}}
_MLA_EVEN = {"num_key_value_heads": 4}
_SLIDING = {"layer_types": mixed("sliding_attention", "full_attention")}
_INDEXERS = {"indexer_types": ["full", "shared"] * 3 + ["full", "full"]}
_SPARSE = {"mlp_layer_types": mixed("dense", "sparse")}
# What a decoder needs in a multimodal model, besides what `tiny_models` gives it.
TEXT: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "cosmos3_edge_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text",
            "qwen2_5_omni_text", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3_omni_moe_text", "qwen3_vl_moe_text",
            "qwen3_vl_text",
        ),
        _MROPE,
    ),
    "glm4v_moe_text": _NARROW_MROPE | {"first_k_dense_replace": 3},
    "hy_v4_vl_text": {"rope_parameters": _MROPE["rope_parameters"]} | _MLA_EVEN | _SPARSE | _INDEXERS,
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [16, 16], **_SPARSE,
                             "rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 2]}},
    "hunyuan_vl_text": {"head_dim": 8, "rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 1, 1]}},
    "chameleon": {"num_key_value_heads": 4},
    "glm5_next_text": _MLA_EVEN | _SPARSE | {
        "layer_types": mixed("linear_attention", "indexed_attention"),
        "indexer_types": ["full"] * 7 + ["shared"],
        "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4},
    "minimax_m3_vl_text": _SPARSE | {"dense_intermediate_size": 48, "index_block_size": 4},
    "mistral4": _MLA_EVEN | {"first_k_dense_replace": 3, "head_dim": 16},
    "mistral_large4_text": _MLA_EVEN | _INDEXERS | _SPARSE | {"first_k_dense_replace": 3, "kv_source_layers": [0, 0, 0, 3, 4, 4, 4, 7]},
    "step3p5": _SPARSE | _SLIDING | {"sliding_window": 6, "share_expert_dim": 16},
    "muse_glimmer_text": _SLIDING,
    "muse_spark_text": _SLIDING | _SPARSE | {"moe_hidden_size": 32},
    "kosmos_2_text_model": {"layers": LAYERS, "embed_dim": 32, "ffn_dim": 48, "attention_heads": 4, "dropout": 0.0},
    "kosmos_2_5_text_model": {"layers": LAYERS, "embed_dim": 32, "ffn_dim": 48, "attention_heads": 4, "dropout": 0.0},
    "kyutai_speech_to_text": {"codebook_vocab_size": 64, "num_codebooks": 2, "audio_bos_token_id": 63,
                              "audio_pad_token_id": 62, "num_key_value_heads": 4},
    "unlimited_ocr_text": _SPARSE | {"num_key_value_heads": 4},
    "deepseek_ocr2_text": _SPARSE | {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "molmo2_text": {"additional_vocab_size": SPECIAL_TOKENS, "rope_scaling_layers": [1, 4, 6],
                    "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
}  # fmt: skip
_QFORMER = {"hidden_size": 32, "encoder_hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2,
            "intermediate_size": 48, "vocab_size": VOCAB}  # fmt: skip
_BLIP = {"qformer_config": _QFORMER, "": {"num_query_tokens": 4}}
_SAM = {"hidden_size": 32, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 64,
        "patch_size": 8, "mlp_dim": 48, "window_size": 4, "global_attn_indexes": [1], "downsample_channels": [16, 32]}  # fmt: skip
_GLM_TOWER = {"vision_config": {"patch_size": 4, "out_hidden_size": 32}}
_CONFORMER = {"encoder_config": {"num_layers": 2, "hidden_dim": 32, "input_dim": 16, "num_heads": 4, "dim_head": 8,
                                 "output_dim": 8, "context_size": 8, "max_pos_emb": 16},
              "projector_config": _QFORMER, "": {"downsample_rate": 2, "window_size": 4}}  # fmt: skip
# A tower in which the features of all layers are added to the decoder.
_DEEPSTACK = {"vision_config": {"depth": 3, "deepstack_visual_indexes": [0, 1, 2]}}
_VOCAB_TOO = {"": {"vocab_size": VOCAB + SPECIAL_TOKENS}}
# For each type: the fields of its sections, and its own under "".
SECTIONS: dict[str, dict[str, dict[str, Any]]] = {
    "apertus1p5": {"audio_config": {"codebook_dim": 32, "codebook_size": 16},
                   "vision_config": {"codebook_size": 16, "embed_dim": 8, "latent_channels": 32, "base_channels": 32,
                                     "channel_multiplier": [1, 1], "num_res_blocks": 1},
                   "text_config": {"vocab_size": 256}, "": {"image_token_offset": 176, "audio_token_offset": 192}},
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo"), _BLIP),
    "chameleon": {"vq_config": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 32, "embed_dim": 8,
                                "channel_multiplier": [1, 1], "num_res_blocks": 1},
                  "": {"vocabulary_map": {"<image>": 130, "IMGIMGA": 131, "IMGIMGB": 132}, "vocab_size": VOCAB + SPECIAL_TOKENS}},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 4, "num_filters": 4, "num_quantizers": 2,
                                               "codebook_size": 16, "codebook_dim": 8, "vector_quantization_hidden_dimension": 8}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2, "max_img_size": 32}, "": {"vision_hidden_size": 32, "projector_hidden_size": 32}},
    "cohere2_vision": {"": {"alignment_intermediate_size": 32}},
    "cosmos3_edge": {"vision_config": {"num_patches": 16}, "": {"projector_hidden_size": 32}},
    "deepseek_ocr2": {"vision_config": {"sam_config": _SAM, "encoder_config": {"hidden_size": 32,
                      "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}}},
    "deepseek_vl_hybrid": {"high_res_vision_config": {"output_channels": 16, "window_size": 4, "global_attn_indexes": [1],
                                                      "image_size": 64, "patch_size": 8, "mlp_dim": 48}},
    # Towers of the published models' own kinds, with fewer and narrower blocks.
    "fast_vlm": {"vision_config": {"architecture": "fastvit_mci3", "hidden_size": 32, "model_args": {
        "inference_mode": True, "layers": [1, 1], "embed_dims": [8, 16], "mlp_ratios": [2, 2], "pos_embs": [None, None],
        "downsamples": [False, True], "se_downsamples": [False, False], "token_mixers": ["repmixer", "repmixer"]}}},
    "perception_lm": {"vision_config": {"architecture": "vit_pe_core_large_patch14_336", "model_args": {
        "embed_dim": 32, "depth": 2, "num_heads": 4, "img_size": [16, 16], "patch_size": 4, "global_pool": "",
        "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]}},
        "": {"projector_pooling_ratio": 2}},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8, "projector_hidden_size": 32}},
    **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr"), _GLM_TOWER),
    "glm_ocr": {"vision_config": {"patch_size": 4, "out_hidden_size": 32, "in_channels": 3}},
    "granite4_vision": {"qformer_config": _QFORMER, "vision_config": {"hidden_size": 64}, "": {"deepstack_layer_map": [[1, 0]], "downsample_rate": "1/2",
                        "spatial_target_layers": [1, 1, 4, 4], "image_grid_pinpoints": [[16, 16], [16, 32]]}},
    **dict.fromkeys(("granite_speech", "granite_speech_plus"), _CONFORMER),
    "hunyuan_vl": {"vision_config": {"max_image_size": 32, "min_image_size": 8, "img_max_token_num": 16}},
    "idefics": {"": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
                     "vocab_size": VOCAB, "cross_layer_interval": 2, "alpha_initializer": "ones"}},
    **{key: {"vision_config": {"num_hidden_layers": 2, "patch_size": 8}, "audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16}} for key in ("inkling2", "inkling2_loop", "inkling_mm_model")},
    "janus": {"vq_config": {"base_channels": 32, "latent_channels": 32, "num_embeddings": 32, "embed_dim": 8,
                            "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 8, "projection_dim": 32,
                            "image_token_embed_dim": 32}},
    "minimax_m3_vl": {"vision_config": {"image_size": 32}, "": {"projector_hidden_size": 32}},
    "molmo2": {"vision_config": {"image_size": [16, 16]},
               "adapter_config": {"vision_feature_layer": [1, 0], "num_hidden_layers": None, "text_hidden_size": 32}},
    "muse_glimmer": {"": {"out_hidden_size": 128, "projector_hidden_size": 32}},
    "muse_spark": {"audio_config": {"patch_sizes": [2, 2], "hidden_sizes": [8, 16], "depths": [1, 1]},
                   "": {"out_hidden_size": 128, "projector_hidden_size": 32}},
    "omniasr": {"audio_config": {"conv_dim": [8, 8], "conv_kernel": [10, 3], "conv_stride": [5, 2]}},
    "ovis2": {"vision_config": {"vocab_size": 32}, "": {"visual_indicator_token_ids": [140, 141, 142, 143, 144]} | _VOCAB_TOO[""] | {"hidden_size": 32}},
    "aria": {"": {"projector_patch_to_query_dict": {16: 8}}},
    "glmasr": {"audio_config": {"intermediate_size": 128}},
    "kimi_k25": {"": {"projection_hidden_size": 32}},
    **{t: {"": {"image_token_id": 150, "video_token_id": 151}} for t in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "paligemma": {"": {"projection_dim": 32}},
    "voxtral": {"audio_config": {"intermediate_size": 128}, "": {"audio_token_id": 150}},
    "dots3_note": {"audio_config": OVERRIDES["dots3_note_audio_encoder"],
                   "vision_config": OVERRIDES["dots3_note_vision_encoder"]},
    "emu3": {"vq_config": {"base_channels": 32, "latent_channels": 32, "embed_dim": 8, "codebook_size": 16,
                           "channel_multiplier": [1, 1], "num_res_blocks": 1, "hidden_size": 32, "num_attention_heads": 4},
             "": {"vocabulary_map": {"<image>": 130, "<|extra_200|>": 131, "<|visual token 000000|>": 132}}},
    "mllama": {"vision_config": {"num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "vision_output_dim": 64,
                                 "intermediate_layers_indices": [0], "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]}},
    "shieldgemma2": {"": {"mm_tokens_per_image": 4}},
    **{t: {"": {"image_grid_pinpoints": [[16, 16], [16, 32]]}} for t in ("llava_next", "llava_next_video", "llava_onevision")},
    "vipllava": {"": {"vision_feature_layers": [-1, -2]}},
    "qwen2_5_omni_thinker": {"": {"vision_start_token_id": 150, "audio_start_token_id": 151}},
    "pp_chart2table": {"vision_config": {"output_channels": 8}},
    "qwen2_vl": {"vision_config": {"embed_dim": 32, "hidden_size": 32}},
    "qwen3_asr": {"audio_config": {"downsample_hidden_size": 8}},
    **dict.fromkeys(("cohere_compass", "cosmos3_omni", "granite_docling", "qwen3_vl", "qwen3_vl_moe"), _DEEPSTACK),
    "qwen3_omni_moe_thinker": _DEEPSTACK | {"audio_config": {"downsample_hidden_size": 8},
                               "": {"vision_start_token_id": 150, "audio_start_token_id": 151}},
    "unlimited_ocr": {"vision_config": {"sam_config": _SAM, "encoder_config": {"hidden_size": 32, "intermediate_size": 48,
                      "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}}},
    **dict.fromkeys(("vibevoice_asr",), {
        f"{kind}_tokenizer_encoder_config": {"num_filters": 2, "downsampling_ratios": [2, 2], "depths": [1, 1, 1],
                                             "hidden_size": 8} for kind in ("acoustic", "semantic")}
        | {"": {"acoustic_tokenizer_chunk_size": 64}}),
}  # fmt: skip


def multimodal_config(model_type: str) -> Any:
    """A small config of a multimodal type."""
    config_class = CONFIG_MAPPING[model_type]
    given = SECTIONS.get(model_type, {})
    sections = {name: given.get(name, {}) for name in config_class.sub_configs}
    if not sections:
        return config_class(**small(config_class, TEXT.get(model_type, {})))
    default = config_class()
    made: dict[str, Any] = {}
    for name, own in sections.items():
        part = CONFIG_MAPPING[own["model_type"]] if "model_type" in own else type(getattr(default, name))
        if part is type(None):
            continue
        if name in TEXT_SECTIONS:
            special = {"vocab_size": VOCAB + SPECIAL_TOKENS}
            fields = small(part, OVERRIDES.get(part.model_type, {}) | TEXT.get(part.model_type, {}) | special | own)
        else:
            known = part().to_dict()
            fields = {field: value for field, value in TOWER.items() if known.get(field) is not None} | own
            fields = {field: value for field, value in fields.items() if value is not None}
        made[name] = {"model_type": part.model_type} | fields
    own = _special_tokens(default) | given.get("", {})
    if not set(TEXT_SECTIONS) & set(made):  # the decoder is described by the config itself
        own = small(config_class, TEXT.get(model_type, {}) | own)
    return config_class(**own | made)


def whole_model(model_type: str) -> Any:
    """A small random model of the multimodal class of a type that also has a text class."""
    config = multimodal_config(model_type)
    config.architectures = [WHOLE[model_type]]
    torch.manual_seed(0)
    model = auto_class_of(config).from_config(config, dtype=torch.float32, **EAGER).eval()
    randomize(model)
    return model


def _special_tokens(default: Any) -> dict[str, int]:
    """An id for each special token that a config names."""
    fields = [
        name
        for name, value in default.to_dict().items()
        if name.endswith(("_token_id", "_token_index", "_token_idx"))
        and isinstance(value, int)
        and name not in ("pad_token_id", "bos_token_id", "eos_token_id")
    ]
    return {name: VOCAB + i for i, name in enumerate(sorted(fields))}
