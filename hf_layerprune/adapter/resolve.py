"""Which layers of a base a config drops: filled in where the config leaves it open, checked where it does not."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import families
from ..errors import CutError
from ..families.fields import cut_without
from ..select import select_layers
from ..select.targets import Target
from .tail import tuned_layers

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..cut.memory import LayerCut
    from .config import LayerDropConfig


def resolve_drop(
    config: LayerDropConfig, model_config: PreTrainedConfig, cut: LayerCut | None = None, target: Target | None = None
) -> None:
    """Fill in `drop_layers` and `num_base_layers`, and refuse a config that was resolved for another base."""
    families.check_supported(model_config)
    # The settings of a second adapter are about the dense base.
    n = families.layer_count(model_config) if cut is None else cut.cut.num_layers
    if config.drop_layers is None:
        if cut is not None and config.target is not None:
            raise CutError(
                f"{config.target} is about the dense model, and this one is cut already; specify its layers with "
                f"drop_layers={list(cut.cut.drop)}"
            )
        base = config.base_model_name_or_path
        target = target or Target.from_options(config, model_config, base, revision=config.revision)
        protected = families.protected_layers(model_config) if cut is None else ()
        config.drop_layers = select_layers(n, config, protected, target)
    if config.num_base_layers is None:
        config.num_base_layers = n
    elif config.num_base_layers != n and not is_already_cut(config, model_config):
        # By now, PEFT has put the name of the model into a config that is not a saved one.
        its_base = (
            f"use it with its base ({config.base_model_name_or_path}; if that is an adapter, merge it first with "
            "merge_and_unload()), or "
        )
        raise CutError(
            f"this config drops layers {config.drop_layers} of a base with {config.num_base_layers} layers, and the "
            f"model has {n}; {'' if config.is_new else its_base}make a new config"
        )
    if cut is None and config.num_base_layers == n:
        # Also refuses, before weights are read and a repair is fitted, what the config can't describe, and what isn't left.
        families.cut_config(model_config, families.make_cut(model_config, config.drop_layers))
        tuned_layers(resolved_cut(config), config.tune_layers)


def resolved_cut(config: LayerDropConfig) -> families.Cut:
    """The cut that a resolved config describes."""
    dropped, n = config.drop_layers, config.num_base_layers
    if dropped is None or n is None:
        raise CutError(
            "this config does not say which layers are dropped; prune its base with it first, or set drop_layers"
        )
    return cut_without(dropped, n)


def is_already_cut(config: LayerDropConfig, model_config: PreTrainedConfig) -> bool:
    """Whether a model is what is left of its base after exactly the cut that a config describes."""
    dropped, n = config.drop_layers, config.num_base_layers
    marker = getattr(model_config, families.MARKER, None) or {}
    return (
        dropped is not None
        and n is not None
        and (marker.get("num_base_layers"), marker.get("drop_layers")) == (n, sorted(dropped))
        and families.layer_count(model_config) == n - len(dropped)
    )
