"""Multimodal models: which section of a config describes the language decoder, and what else refers to its layers.

A cut changes the language decoder alone. Towers, projectors and their sections of the config stay as they are. But
some models feed visual features straight into chosen decoder layers, so a few fields outside the decoder's section
count or index its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import CutError
from .fields import Cut, Rule, looks_per_layer, remap, unchanged

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Attributes in which composite configs keep the config of their language decoder; a thinker has a section of its own.
TEXT_SECTIONS = ("text_config", "thinker_config", "decoder")

# Types whose multimodal model fails uncut with the newest transformers, so that a checkpoint of it is loaded as its
# text model.
TEXT_ONLY_TYPES = ("llama4",)

# Vision towers that the package timm builds, by the model type of their section.
TIMM_TOWERS = ("gemma3n_vision", "timm_wrapper")


def path_to_text(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    """The configs from a whole one down to the one of its language decoder; only the whole one for a text model."""
    path = [config]
    while True:
        for name in TEXT_SECTIONS:
            part = getattr(path[-1], name, None)
            if part is not None and hasattr(part, "model_type"):
                path.append(part)
                break
        else:
            return path


def packages_of(fields: Mapping[str, Any]) -> list[str]:
    """The packages that a model with this `config.json` needs besides transformers to see: most processors' torchvision,
    and its tower's timm, without which the model can't be built at all.
    """
    tower = fields.get("vision_config")
    if not isinstance(tower, dict):
        return []
    return ["torchvision", *(["timm"] if tower.get("model_type") in TIMM_TOWERS else [])]


def placeholder_tokens(config: PreTrainedConfig) -> list[int]:
    """The placeholder tokens for the features of images, video and audio; none for a text model."""
    names = [f"{kind}_token_{end}" for kind in ("image", "video", "audio") for end in ("id", "index")]
    found = [getattr(part, name, None) for part in path_to_text(config)[:-1] for name in names]
    return sorted({token for token in found if isinstance(token, int)})


def _remap_targets(value: Any, cut: Cut) -> Any:
    """Pairs of a layer of the tower and the decoder layer that takes its features in."""
    return None if value is None else [(tower, cut.new_index[layer]) for tower, layer in value]


# Fields outside the decoder's section that mention layers, and how a cut changes them.
OUTER_FIELDS: dict[str, Rule] = {
    "deepstack_layer_map": _remap_targets,
    "spatial_target_layers": remap,
    # Layers of a tower.
    "vision_feature_layer": unchanged,
    "vision_feature_layers": unchanged,
    "spatial_vision_layer": unchanged,
    "insert_layer_id": unchanged,
    "deepstack_visual_indexes": unchanged,
    # Neither.
    "image_grid_pinpoints": unchanged,
    "visual_indicator_token_ids": unchanged,
}


def protected_by_towers(config: PreTrainedConfig) -> dict[int, str]:
    """Decoder layers that take in features of a tower, by base index: they can't be dropped, and the reason."""
    found: dict[int, str] = {}
    for part in path_to_text(config)[:-1]:
        for owner in (part, getattr(part, "vision_config", None)):
            for i, tower in enumerate(getattr(owner, "deepstack_visual_indexes", None) or ()):
                found[i] = f"the features of the vision tower's layer {tower} are added to its output"
        pairs = getattr(part, "deepstack_layer_map", None) or ()
        for tower, i in (*pairs, *((None, i) for i in getattr(part, "spatial_target_layers", None) or ())):
            what = "the vision tower" if tower is None else f"the vision tower's layer {tower}"
            found[i] = f"the features of {what} are added to its input"
    return found


def check_images_read(config: PreTrainedConfig, cut: Cut) -> None:
    """Refuse to drop all layers in which the decoder attends to images: it would ignore them without a word.

    Raises:
        CutError: None of them would be left.
    """
    *outer, part = path_to_text(config)
    readers = getattr(part, "cross_attention_layers", None) or []
    if outer and readers and not any(i in cut.new_index for i in readers):
        raise CutError(
            f"no layer that attends to images would be left, and this {outer[0].model_type} model would ignore them; keep one "
            f"of {list(readers)}"
        )


def rewrite_outer_fields(config: PreTrainedConfig, cut: Cut) -> None:
    """Rewrite, in place, the fields of a composite config that refer to decoder layers outside the decoder's section.

    Raises:
        CutError: An unknown field may be per layer.
    """
    for part in path_to_text(config)[:-1]:
        for name, value in part.to_dict().items():
            if name in part.sub_configs:
                continue
            rule = OUTER_FIELDS.get(name)
            if rule is not None:
                new = rule(value, cut)
                if new != value:
                    setattr(part, name, new)
            elif _mentions_layers(name, value, cut.num_layers):
                raise CutError(
                    f"config field {name!r} of the {part.model_type} model may refer to layers of its decoder, and no "
                    "rule says how a cut changes it; if the model does not use it, remove it from config.json, or else "
                    "add a rule in families/multimodal.py"
                )


# Fields that any config may have.
_COMMON = ("id2label", "label2id", "architectures", "layer_drop", "quantization_config", "transformers_version")


def _mentions_layers(name: str, value: Any, num_layers: int) -> bool:
    if name in _COMMON or value is None:
        return False
    return "deepstack" in name or looks_per_layer(name, value, num_layers) is not None
