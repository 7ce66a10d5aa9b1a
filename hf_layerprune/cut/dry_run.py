"""Compare empty models, before and after a cut.

The pruned model must be exactly the one that `from_pretrained` would build from the rewritten config. So two models are
built on the meta device, from the old and the new config, and compared layer by layer. The kept layers must have the
same modules, and attributes that differ may only hold the layer's position (its index, the layer count, the source of
shared keys and values): a cut in memory copies them to the live model. Any other difference, such as a scale computed
from the layer's position, would change the model on reload, so the cut is refused.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from .. import families
from ..errors import CutError, boundary
from ..families.layout import find_decoder_layers
from ..runtime.model_class import model_without_weights, without_zero3

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

ABSENT = object()  # the value of a missing attribute

# Attributes that may hold a layer's position, or the number of layers.
_POSITIONAL = (
    "idx", "index", "layer_id", "layer_number", "layer_num", "num_layers", "num_hidden_layers", "n_layers", "seed",
)  # fmt: skip
_MODULE_INTERNALS = vars(nn.Module()).keys() - {"training"}


def dry_run_cut(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, new_config: PreTrainedConfig, cut: families.Cut
) -> tuple[int, list[tuple[str, str, Any]]]:
    """Compare empty models of the old and the new config.

    Returns:
        `tuple[int, list[tuple[str, str, Any]]]`: The number of parameters that the cut removes; and for each change of
            an attribute, the name of a module in the dense model, the attribute's name, and its value after the cut.

    Raises:
        CutError: A kept layer would be built differently on reload.
    """
    old, new = _empty_model(model_class, config), _empty_model(model_class, new_config)
    new_modules = dict(new.named_modules(remove_duplicate=False))  # what layers share is listed for each of them
    attributes: list[tuple[str, str, Any]] = []
    prefix = find_decoder_layers(old).path + "."
    for name, before in old.named_modules(remove_duplicate=False):
        layer, inner = None, ""
        if name.startswith(prefix):
            index, _, inner = name[len(prefix) :].partition(".")
            layer = int(index)
            if layer not in cut.new_index:
                continue
        target = name if layer is None else ".".join(filter(None, [prefix + str(cut.new_index[layer]), inner]))
        after = new_modules.pop(target, None)
        if after is None and layer is None and next(before.parameters(), None) is None:
            continue  # such as a rotary embedding for a base frequency that only dropped layers use
        # Each module with a parametrised weight, such as a weight norm, has a class of its own.
        if after is None or type_before_parametrizations(before) is not type_before_parametrizations(after):
            raise CutError(
                f"{name} would be reloaded as {type(after).__name__ if after is not None else 'nothing'} after a cut, "
                f"not as {type(before).__name__}: its type depends on its position; drop other layers"
            )
        if layer is not None:
            _check_same_shapes(name, before, after)
        for attribute, own, value in _differences(before, after):
            if layer is not None and not _is_positional(attribute, own, value, layer, cut):
                shown = ["nothing" if one is ABSENT else repr(one) for one in (own, value)]
                raise CutError(
                    f"{name}.{attribute} is computed from the layer's position: {shown[0]} here, {shown[1]} after a "
                    "reload; this cut would silently change the model, so drop other layers"
                )
            if own is not ABSENT and value is not ABSENT:
                attributes.append((name, attribute, value))
    extra = [
        n for n, module in new_modules.items() if n.startswith(prefix) or next(module.parameters(), None) is not None
    ]
    if extra:
        raise CutError(
            f"{extra[0]} would be added on reload, because the kept layers would be built differently; drop other layers"
        )
    return old.num_parameters() - new.num_parameters(), attributes


def dry_run_cut_of_config(config: PreTrainedConfig, new_config: PreTrainedConfig, cut: families.Cut) -> None:
    """Make the checks of `dry_run_cut`, for the class that a config is loaded as."""
    with boundary("no model can be built from the config"), without_zero3():
        model = model_without_weights(config)
        part = families.text_config(new_config) if type(model.config) is not type(config) else new_config
    dry_run_cut(type(model), model.config, part, cut)


def _empty_model(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    """A model of this config without weights, as `from_pretrained` builds it before it loads any."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        dtype = getattr(part, "dtype", None)
        if part is not None and isinstance(dtype, str):  # as it is saved; not every class accepts the name of a dtype
            part.dtype = getattr(torch, dtype)
    what = "no model can be built from the config"
    with boundary(what), torch.random.fork_rng(devices=[]), torch.device("meta"), without_zero3():
        return model_class(config)


def _is_positional(attribute: str, before: Any, after: Any, layer: int, cut: families.Cut) -> bool:
    """Whether two values only give a layer's position, are equal up to rounding, or are a rewritten per-layer list."""
    if isinstance(before, list) and len(before) == cut.num_layers:
        return after == [before[i] for i in cut.keep]
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=1e-12)
    if not (type(before) is type(after) is int and any(part in attribute for part in _POSITIONAL)):
        return False
    moved = layer - cut.new_index[layer]
    # The layer's own index, or twice that where it has two caches; the index of a layer that it reads; the layer count.
    return (
        before - after in (moved, 2 * moved)
        or after == cut.new_index.get(before)
        or (before, after) == (cut.num_layers, len(cut.keep))
    )


def _check_same_shapes(name: str, before: nn.Module, after: nn.Module) -> None:
    for kind in ("_parameters", "_buffers"):
        old, new = getattr(before, kind), getattr(after, kind)
        shapes = [{k: tuple(t.shape) for k, t in tensors.items() if t is not None} for tensors in (old, new)]
        if shapes[0] != shapes[1]:
            raise CutError(
                f"{name} has tensors {shapes[0]}, but {shapes[1]} after a reload at its new position; drop other layers"
            )


def _differences(before: nn.Module, after: nn.Module) -> list[tuple[str, Any, Any]]:
    """Plain attributes (numbers, strings, collections of these) that differ, with their value in both modules."""
    different: list[tuple[str, Any, Any]] = []
    for name in sorted((vars(before) | vars(after)).keys() - _MODULE_INTERNALS):
        value, other = (vars(module).get(name, ABSENT) for module in (before, after))
        if isinstance(value, tuple) and isinstance(other, list):  # a JSON round trip turns tuples into lists
            other = tuple(other)
        if _is_plain(value) and _is_plain(other) and value != other:
            different.append((name, value, other))
    return different


def _is_plain(value: Any) -> bool:
    """Whether an attribute is plain; the lists in which an LSTM keeps its weights, and references to them, are not."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, list | tuple):
        return not any(isinstance(one, torch.Tensor | weakref.ref) for one in value)
    return value is ABSENT or isinstance(value, int | float | str | bool | None)
