"""Inputs with images or audio for the tiny multimodal models, in the layout of the type's own processor.

    inputs = media_inputs("qwen2_vl", model)     # {"image": {"input_ids": ..., "pixel_values": ..., ...}}

There are as many placeholder tokens as the model's own tower produces features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .tiny_models import VOCAB

Media = dict[str, torch.Tensor]
BATCH, BEFORE, AFTER = 2, 3, 6
FRAMES = 32


def _noise(*shape: int, seed: int = 7) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tower(config: Any) -> Any:
    return getattr(config, "thinker_config", config).vision_config


def _pixels(config: Any) -> Media:
    """One image per row: `[batch, 3, size, size]`."""
    size = getattr(_tower(config), "image_size", 16) if hasattr(config, "vision_config") else 16
    high, wide = (size, size) if isinstance(size, int) else size
    return {"pixel_values": _noise(BATCH, 3, high, wide)}


def _of_size(size: int) -> Callable[[Any], Media]:
    return lambda config: {"pixel_values": _noise(BATCH, 3, size, size)}


def _sized(config: Any) -> Media:
    """One image per row, and its size."""
    pixels = _pixels(config)["pixel_values"]
    return {"pixel_values": pixels, "image_sizes": torch.tensor([pixels.shape[-2:]] * BATCH)}


def _tiled(config: Any) -> Media:
    """The whole image and one tile of it per row: `[batch, 2, 3, size, size]`, and the image's size."""
    pixels = _pixels(config)["pixel_values"]
    size = pixels.shape[-1]
    return {"pixel_values": _noise(BATCH, 2, 3, size, size), "image_sizes": torch.tensor([[size, size]] * BATCH)}


def _nested(config: Any) -> Media:
    """A list of one image per row, `[batch, 1, 3, size, size]`, and which of its pixels are not padding."""
    pixels = _pixels(config)["pixel_values"][:, None]
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(BATCH, 1, *pixels.shape[-2:], dtype=torch.bool)}


def _listed(config: Any) -> Media:
    """A list of one tile per row: `[batch, 1, 3, size, size]`."""
    return {"pixel_values": _pixels(config)["pixel_values"][:, None]}


def _tiles(config: Any) -> Media:
    """A list of one tile per row, and which tiles are not padding."""
    return {
        "pixel_values": _pixels(config)["pixel_values"][:, None],
        "pixel_attention_mask": torch.ones(BATCH, 1).bool(),
    }


def _grid() -> torch.Tensor:
    return torch.tensor([[1, 4, 4]] * BATCH)


def _patches(config: Any) -> Media:
    """Flattened patches of all images, and the grid of each."""
    tower = _tower(config)
    deep = getattr(tower, "temporal_patch_size", None) or getattr(tower, "patch_temporal", None) or 1
    return {"pixel_values": _noise(BATCH * 16, 3 * deep * tower.patch_size**2), "image_grid_thw": _grid()}


def _square_patches(config: Any) -> Media:
    """Patches `[patches, 3, size, size]` of all images, and the grid of each."""
    size = _tower(config).patch_size
    return {"pixel_values": _noise(BATCH * 16, 3, size, size), "image_grid_thw": _grid()}


def _merged(config: Any) -> Media:
    return _patches(config) | {"image_merge_sizes": torch.tensor([2] * BATCH)}


def _packed(config: Any) -> Media:
    """Flattened patches of each image, padded to a length, and their layout."""
    wide = 3 * _tower(config).patch_size ** 2
    return {
        "pixel_values": _noise(BATCH, 16, wide),
        "spatial_shapes": torch.tensor([[4, 4]] * BATCH),
        "pixel_attention_mask": torch.ones(BATCH, 16, dtype=torch.long),
    }


def _tiles_beside_text(config: Any) -> Media:
    """Two tiles of an image per row, for cross-attention layers."""
    size = config.vision_config.image_size
    return {
        "pixel_values": _noise(BATCH, 1, 2, 3, size, size),
        "aspect_ratio_ids": torch.full((BATCH, 1), 2),
        "aspect_ratio_mask": torch.ones(BATCH, 1, 2, dtype=torch.long),
    }


def _two_sizes(config: Any) -> Media:
    return _pixels(config) | {"high_res_pixel_values": _noise(BATCH, 3, 64, 64)}


def _strips(config: Any) -> Media:
    """All patches of all images in one row of patches, and the grid of each."""
    size = _tower(config).patch_size
    return {"pixel_values": _noise(1, 3, size, size * 16 * BATCH), "target_sizes": torch.tensor([[4, 4]] * BATCH)}


def _mel(mask: str | None, frames: int = FRAMES, stacked: bool = False) -> Callable[[Any], Media]:
    """A spectrogram per row, `[batch, bins, frames]` or stacked frames `[batch, frames, bins]`, and a mask of its frames."""

    def make(config: Any) -> Media:
        tower = config.audio_config
        bins = tower.num_mel_bins * tower.num_stacked_frames if stacked else tower.num_mel_bins
        media: Media = {"input_features": _noise(BATCH, *((frames, bins) if stacked else (bins, frames)))}
        return media if mask is None else media | {mask: torch.ones(BATCH, frames, dtype=torch.long)}

    return make


def _frames(config: Any) -> Media:
    """A spectrogram per row, `[batch, frames, bins]`, and which of its frames are not padding."""
    mask = torch.ones(BATCH, 2 * FRAMES, dtype=torch.bool)
    return {"input_features": _noise(*mask.shape, config.audio_config.input_feat_size), "input_features_mask": mask}


def _wave(config: Any) -> Media:
    """Samples `[batch, 1, samples]`."""
    return {"input_values": _noise(BATCH, 1, 400)}


# The format of images or audio for each type; a type that is not listed is proven with text alone.
IMAGES: dict[str, Callable[[Any], Media]] = {
    **dict.fromkeys(
        (
            "aria", "aya_vision", "cohere2_vision", "deepseek_vl", "internvl", "janus", "llava", "paligemma",
            "pp_chart2table", "qianfan_ocr", "shieldgemma2", "vipllava", "step3p7", "ovis2",
        ),
        _pixels,
    ),
    "deepseek_ocr2": _of_size(64),
    "gemma3n": _of_size(64),
    "fast_vlm": _of_size(32),
    "deepseek_vl_hybrid": _two_sizes,
    **dict.fromkeys(("apertus1p5", "lighton_ocr", "mistral3", "mistral_large4"), _sized),
    **dict.fromkeys(("idefics2", "idefics3", "smolvlm"), _nested),
    "granite_docling": _tiles,
    "perception_lm": _listed,
    **dict.fromkeys(("granite4_vision", "llava_next", "llava_next_video", "llava_onevision"), _tiled),
    **dict.fromkeys(
        (
            "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "glm4v", "glm46v", "glmga", "glm4v_moe", "glm_ocr",
            "cohere_compass", "cosmos3_edge", "cosmos3_omni", "ernie4_5_vl_moe", "exaone4_5", "glm5_next", "hy_v4_vl",
            "hyperclovax_vision_v2", "lfm3_vl", "qwen2_5_omni_thinker", "qwen3_omni_moe_thinker", "minimax_m3_vl",
            "hunyuan_vl", "muse_glimmer", "muse_spark", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "dots3_note",
        ),
        _patches,
    ),
    **dict.fromkeys(("kimi_k25", "paddleocr_vl"), _square_patches),
    "mllama": _tiles_beside_text,
    "video_llama_3": _merged,
    "lfm2_vl": _packed,
    **dict.fromkeys(("minicpm_ocr", "minicpmv4_6", "minicpmv4_7"), _strips),
}  # fmt: skip
AUDIO: dict[str, Callable[[Any], Media]] = {
    "gemma3n": _frames,
    "glmasr": _mel("input_features_mask"),
    "qwen3_asr": _mel("input_features_mask", frames=100),
    "fun_asr_nano": _mel("input_features_mask", stacked=True),
    "qwen2_audio": _mel("feature_attention_mask", frames=2 * FRAMES),
    "voxtral": _mel(None, frames=2 * FRAMES),
    "omniasr": _wave,
}


def media_inputs(model_type: str, model: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs of a model by kind, `image` or `audio`; empty for a type that is proven with text alone."""
    made = {}
    for kind, makers in (("image", IMAGES), ("audio", AUDIO)):
        if model_type in makers:
            media = makers[model_type](model.config)
            made[kind] = _with_placeholders(model, media, kind)
            _check_media_matter(model, made[kind], media)
    return made


def _with_placeholders(model: Any, media: Media, kind: str) -> Media:
    config = getattr(model.config, "thinker_config", model.config)
    token = getattr(config, f"{kind}_token_id")
    count = _features(model, media, kind)
    text = torch.randint(3, VOCAB, (BATCH, BEFORE + AFTER), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([text[:, :BEFORE], torch.full((BATCH, count), token), text[:, BEFORE:]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **media}
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in inspect.signature(model.forward).parameters:
            inputs[name] = (ids == token).long()
    return inputs


@torch.no_grad()
def _features(model: Any, media: Media, kind: str) -> int:
    """The number of feature vectors that the tower produces for a row."""
    if model.config.model_type == "mllama":
        return 1
    if model.config.model_type == "qwen2_audio":
        frames = media["feature_attention_mask"].sum(-1)
        return int(model.model.audio_tower._get_feat_extract_output_lengths(frames)[1][0])
    owner = model if hasattr(model, f"get_{kind}_features") else model.model
    made = getattr(owner, f"get_{kind}_features")(**media)
    if model.config.model_type == "granite4_vision":
        made = made.deepstack_features[0][1]
    made = getattr(made, "pooler_output", made)
    parts = list(made) if isinstance(made, list | tuple) else [made]
    total = sum(part.numel() // part.shape[-1] for part in parts)
    assert total % BATCH == 0, total
    return total // BATCH


@torch.no_grad()
def _check_media_matter(model: Any, inputs: Media, media: Media) -> None:
    """Check that other media give other logits; otherwise they would prove nothing."""
    name = next(name for name, value in media.items() if value.is_floating_point())
    own, other = (
        model(**{k: v for k, v in given.items() if k != "use_cache"}, use_cache=False).logits
        for given in (inputs, inputs | {name: 2 * inputs[name] + 1})
    )
    assert not torch.allclose(own[:, -1], other[:, -1], rtol=1e-3, atol=1e-5), f"{name} changes nothing"
