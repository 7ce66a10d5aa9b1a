"""Architectures: where a decoder keeps its layers, and how a cut rewrites its config.

This is the only part of the package that names model families. An architecture is supported only if the matrix in
`tests/test_matrix.py` proves it (docs/architectures.md); unknown ones are refused.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CutError, UnsupportedModelError
from ..records.quantized import describe_quantization
from ..versions import installed_version
from .fields import COUNT_FIELDS, Cut, cut_without, rewrite_fields
from .multimodal import check_images_read, path_to_text, protected_by_towers, rewrite_outer_fields
from .quantization import names_layers, rewrite_quantization
from .special import SPECIAL, Family, WideTensor
from .types import (
    AFTER_PADDING,
    ENCODER_DECODER,
    REFUSED,
    REFUSED_AT,
    STAGES,
    UNREPAIRABLE,
    is_known_broken,
    proven,
    proven_stages,
    proven_versions,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "AFTER_PADDING", "MARKER", "REFUSED", "REFUSED_AT", "STAGES", "UNREPAIRABLE", "Cut", "check_stage", "check_supported", "check_trainable",
    "cut_config", "cut_quantization", "cut_without", "layer_count", "make_cut", "protected_layers", "proven", "proven_stages", "text_config",
    "wide_tensors",
]  # fmt: skip

# The config attribute in which a pruned model records its cut.
MARKER = "layer_drop"
# Quantisers that give plain weights where there is no GPU.
_UNPACKED_IN_LOADING = ("fp8", "mxfp4")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The section of a config that describes the language decoder, or the config itself; not a copy."""
    return path_to_text(config)[-1]


def _family(config: PreTrainedConfig) -> Family:
    return SPECIAL.get(config.model_type, Family())


def count_field(config: PreTrainedConfig) -> str:
    """The field that holds the layer count of a text config; empty if the count is the length of a list.

    Raises:
        UnsupportedModelError: The config has none.
    """
    declared = _family(config).count_field
    if declared is not None:
        return declared
    fields = config.to_dict()
    for name in COUNT_FIELDS:
        if isinstance(fields.get(name), int):
            return name
    raise UnsupportedModelError(
        f"the config of model type {config.model_type!r} has no layer count; only decoders with one can be pruned"
    )


def layer_count(config: PreTrainedConfig) -> int:
    """How many decoder layers the config describes."""
    part = text_config(config)
    name = count_field(part)
    return getattr(part, name) if name else part.num_hidden_layers


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse a model type that is not proven to survive a cut.

    Raises:
        UnsupportedModelError: The model type is refused (with the reason) or unknown, or this config enables a
            feature that a cut would break.
    """
    version = str(installed_version("transformers"))
    for part in path_to_text(config):
        reason, known = REFUSED.get(part.model_type), part.model_type in proven()
        if not known and getattr(part, "is_encoder_decoder", False):
            reason = reason or ENCODER_DECODER
        if reason:
            raise UnsupportedModelError(f"model type {part.model_type!r} can't be pruned by layers: {reason}")
        if not known:
            raise UnsupportedModelError(
                f"model type {part.model_type!r} is not among the {len(proven())} proven ones (docs/architectures.md), "
                "and a cut of an unknown layout could change silently on reload; choose a model of a proven type"
            )
        if is_known_broken(version, part.model_type):
            raise UnsupportedModelError(
                f"a cut of model type {part.model_type!r} is known to go wrong with transformers {version}; install one of "
                f"those that it is proven with: {', '.join(proven_versions(part.model_type))}"
            )
    part = text_config(config)
    family = _family(part)
    if family.refusal and (reason := family.refusal(part.to_dict())):
        raise UnsupportedModelError(f"this {part.model_type} model can't be pruned: {reason}")


def check_stage(config: PreTrainedConfig, stage: str) -> None:
    """Refuse a model whose type is known to fail at a stage, one of `STAGES`.

    Unproven types pass here; the code that runs them layer by layer checks them against their own forward.

    Raises:
        UnsupportedModelError: The type is refused at that stage; says why, and what to do instead.
    """
    for part in path_to_text(config):
        if reason := REFUSED_AT[stage].get(part.model_type):
            refused = STAGES[stage]
            unhealed = stage == "repair" and part.model_type in REFUSED_AT["heal"]  # which other ways out rely on
            instead = f"leave the repair out, and {STAGES['heal'].instead}" if unhealed else refused.instead
            raise UnsupportedModelError(
                f"model type {part.model_type!r} can't be {refused.can_not}: {reason}; {instead}"
            )


def check_trainable(config: PreTrainedConfig) -> None:
    """Refuse to repair or heal a checkpoint with quantised weights: what comes out could be neither saved nor verified.

    Raises:
        UnsupportedModelError: Its config says that it is quantised; says how, and what to use instead.
    """
    for part in path_to_text(config):
        if (settings := getattr(part, "quantization_config", None)) is not None:
            how = describe_quantization(settings)
            way = "use the unquantised model"
            if how.startswith(_UNPACKED_IN_LOADING):
                way += ", or a cut with unpacked weights, made without a GPU: hf-layerprune prune BASE FOLDER --dtype bfloat16"
            raise UnsupportedModelError(f"the weights are quantised ({how}), and can't be repaired or healed; {way}")


def protected_layers(config: PreTrainedConfig) -> dict[int, str]:
    """Layers that can't be dropped from this architecture: the reason, by base index."""
    part = text_config(config)
    protect = _family(part).protect
    return (protect(part.to_dict(), layer_count(part)) if protect else {}) | protected_by_towers(config)


def wide_tensors(config: PreTrainedConfig) -> tuple[tuple[WideTensor, int], ...]:
    """Tensors outside the layers that hold one slice per layer, each with the width of a slice."""
    part = text_config(config)
    return tuple((wide, width) for wide in _family(part).wide if (width := getattr(part, wide.width_field, None)))


def make_cut(config: PreTrainedConfig, drop_layers: Sequence[int]) -> Cut:
    """Check that a set of layers, in any order, can be dropped, and describe the cut.

    Raises:
        CutError: An index is out of range, given twice or protected, or no layer or all of them would be dropped.
    """
    cut, protected = cut_without(drop_layers, layer_count(config)), protected_layers(config)
    for i in cut.drop:
        if i in protected:
            raise CutError(
                f"layer {i} of this {text_config(config).model_type} model can't be dropped: {protected[i]}"
            )
    return cut


def cut_config(config: PreTrainedConfig, cut: Cut) -> PreTrainedConfig:
    """A new config of the same class for the pruned model, with a `layer_drop` entry that records the cut.

    Raises:
        CutError: The config class can't describe the kept layers.
        UnsupportedModelError: See `check_supported`.
    """
    check_supported(config)
    new = copy.deepcopy(config)
    old_part, part = text_config(config), text_config(new)
    fields, family, count = old_part.to_dict(), _family(part), count_field(part)
    if family.check:
        family.check(fields, cut)
    _check_attention_left(old_part, cut)
    check_images_read(config, cut)
    changed = rewrite_fields(fields, cut, family.rules, skip=(count,))
    if family.rewrite_together:
        changed |= family.rewrite_together(fields, cut)
    if count:
        changed[count] = len(cut.keep)
    rebuilt = _rebuild(old_part, fields | changed)
    _check_kept(rebuilt, changed)
    vars(part).clear()
    vars(part).update(vars(rebuilt))
    rewrite_outer_fields(new, cut)
    _cut_quantization(config, new, cut)
    setattr(new, MARKER, {"drop_layers": list(cut.drop), "num_base_layers": cut.num_layers})
    return new


def _cut_quantization(old: PreTrainedConfig, new: PreTrainedConfig, cut: Cut) -> None:
    """Renumber the layers named in quantisation settings, under whatever name a program keeps them (MLX, for one)."""
    for old_part, part in zip(path_to_text(old), path_to_text(new), strict=True):
        for name, value in vars(old_part).items():
            known = name in ("quantization_config", "compression_config") and value is not None
            if known or (isinstance(value, dict | list) and not name.startswith("_") and names_layers(value)):
                setattr(part, name, cut_quantization(value, old, cut, name))


def cut_quantization(settings: Any, config: PreTrainedConfig, cut: Cut, name: str = "quantization_config") -> Any:
    """Quantisation settings, as a dictionary or a quantiser's own class, with the kept layers renumbered; a copy.

    Raises:
        CutError: An entry names layers in a way that can't be rewritten exactly.
    """
    fields = settings if isinstance(settings, dict | list) else settings.to_dict()
    changed = rewrite_quantization(fields, cut, name, several_stacks=text_config(config) is not config)
    if changed == fields:
        return copy.deepcopy(settings)
    if isinstance(settings, dict | list):
        return changed
    try:
        return type(settings).from_dict(changed)
    except Exception as error:  # each quantiser's class raises its own errors
        raise CutError(
            f"{type(settings).__name__} can't hold the settings of the kept layers ({error}); drop other "
            "layers, or prune the model before it is quantised"
        ) from error


# Layer types whose cache does not track the number of tokens.
_UNCOUNTED = {"linear_attention", "mamba", "conv", "recurrent", "moe", "mlp"}


def _check_attention_left(part: PreTrainedConfig, cut: Cut) -> None:
    """A hybrid's cache gets its token count from an attention layer, so one must stay."""
    kinds = getattr(part, "layer_types", None) or getattr(part, "layers_block_type", None) or []
    counted = [i for i, kind in enumerate(kinds) if kind not in _UNCOUNTED]
    if counted and not any(i in cut.new_index for i in counted):
        raise CutError(
            f"no attention layer would be left, and without one this {part.model_type} model can't generate with a "
            f"cache; keep one of {counted}"
        )


def _rebuild(old: PreTrainedConfig, fields: dict[str, Any]) -> PreTrainedConfig:
    """Build a config of the same class from new fields, keeping the attributes that `to_dict` omits."""
    try:
        rebuilt = type(old).from_dict(copy.deepcopy(fields))
        rebuilt.validate()
    except Exception as error:  # each config class raises its own errors
        raise CutError(
            f"the kept layers don't give a valid {type(old).__name__} ({error}); drop other layers"
        ) from error
    # Run-time choices (attention and expert kernels, the resolved commit) are not in `to_dict`.
    for name, value in vars(old).items():
        if name.startswith("_") and name != "_heterogeneity_spec":
            vars(rebuilt)[name] = value
    return rebuilt


def _check_kept(config: PreTrainedConfig, changed: dict[str, Any]) -> None:
    """Refuse a config whose class replaces rewritten values, as it would on every reload."""
    fields = config.to_dict()
    for name, value in changed.items():
        if name == "per_layer_config":  # normalised by the class; the layers check its values
            continue
        if fields.get(name) != value:
            raise CutError(
                f"{type(config).__name__} turns {name}={value!r} into {fields.get(name)!r}, "
                "so the kept layers would change on reload; drop other layers"
            )
