"""Drop decoder layers of a model in memory, and put them back.

The cut is first tried out on empty models (`dry_run.py`), and afterwards checked by running the model (`check.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import families
from ..errors import CutError
from ..families.layout import find_decoder_layers
from ..families.multimodal import path_to_text
from ..layer_ranges import describe_layers
from ..options.kinds import LAYERS, check_value
from ..runtime.devices import is_offloaded
from .check import CannotCheckError, bypassed_logits, check_logits
from .dry_run import ABSENT, dry_run_cut

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


@dataclass
class _Change:
    """One attribute of an object before and after a cut. Plain data, so that the model can still be deep-copied."""

    owner: Any
    name: str
    old: Any
    new: Any

    def apply(self, value: Any) -> None:
        """Set or remove the attribute."""
        if isinstance(value, nn.Parameter):  # PEFT's low_cpu_mem_usage=True empties what is registered
            self.owner._parameters[self.name] = value
        elif isinstance(self.owner, nn.Module):
            setattr(self.owner, self.name, value)
        elif value is ABSENT:
            vars(self.owner).pop(self.name, None)
        else:
            vars(self.owner)[self.name] = value


@dataclass
class LayerCut:
    """A cut of a model in memory, with the data to undo it.

    Args:
        cut (`families.Cut`): The kept and dropped layers.
        dropped (`list[nn.Module]`): The dropped layers, if they were kept in memory; otherwise empty.
        changes (`list[_Change]`): The changes in order, if the dropped layers were kept in memory; otherwise empty.
        active (`bool`): Whether the model is cut now; `False` after `restore`.
    """

    cut: families.Cut
    dropped: list[nn.Module]
    changes: list[_Change]
    active: bool = True

    def restore(self) -> None:
        """Put the dropped layers back, which restores the dense model bit for bit.

        Raises:
            CutError: The dropped layers were not kept, or the layers were changed since, such as by a later cut.
        """
        if not self.dropped:
            raise CutError(
                "the dropped layers were not kept, so the dense model can't be restored; "
                "prune with keep_dropped=True, or load the base again"
            )
        if self.active:
            self._check_unchanged()
            for change in reversed(self.changes):
                change.apply(change.old)
            self.active = False
            self._capture_again()

    def reapply(self) -> None:
        """Cut again after `restore`.

        Raises:
            CutError: The layers were changed since, such as by another cut.
        """
        if not self.active:
            self._check_unchanged()
            for change in self.changes:
                change.apply(change.new)
            self.active = True
            self._capture_again()

    def _capture_again(self) -> None:
        """Have transformers install its hooks for `output_hidden_states` and the like again: restored layers lack them."""
        owners = [change.owner for change in self.changes if isinstance(change.owner, nn.Module)]
        for module in {id(m): m for top in (*owners, self.inactive_modules()) for m in top.modules()}.values():
            vars(module).pop("_output_capturing_hooks_installed", None)
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__name__", "") == "output_capturing_hook":
                    del module._forward_hooks[key]

    def _check_unchanged(self) -> None:
        """Refuse to change layers that are not those that this cut left: the indices in them would be wrong."""
        for change in self.changes:
            wanted = change.new if self.active else change.old
            if isinstance(wanted, nn.ModuleList) and getattr(change.owner, change.name) is not wanted:
                raise CutError(
                    f"the model's layers were changed after this cut was {'made' if self.active else 'undone'}, such as by "
                    "another cut; undo that first, or load the model again"
                )

    def inactive_modules(self) -> nn.ModuleList:
        """What is not in the model: what was dropped, if it was kept; while that is restored, what took its place."""
        values = [change.old if self.active else change.new for change in self.changes]
        parameters = nn.Module()
        parameters._parameters.update((str(i), one) for i, one in enumerate(values) if isinstance(one, nn.Parameter))
        return nn.ModuleList([*(value for value in values if isinstance(value, nn.Module)), parameters])


def check_plain_model(model: Any) -> None:
    """Refuse anything but a transformers model without adapters.

    Raises:
        CutError: It is something else.
    """
    if hasattr(model, "peft_config"):
        raise CutError(
            f"this {type(model).__name__} has adapters ({', '.join(model.peft_config)}), which are for the layers that it has "
            "now; pass the result of their PeftModel's merge_and_unload(), or load the model again"
        )
    plain = isinstance(model, PreTrainedModel)
    if not plain or any(part._compiled_call_impl is not None for part in model.modules()):
        found = "has been compiled" if plain else "is not a transformers model"
        raise CutError(
            f"{'this' if plain else 'a'} {type(model).__name__} {found}; load one with from_pretrained, and wrap or compile it "
            "only after the cut, or let prune_with load it: LayerDropConfig(base_model_name_or_path=...)"
        )


def drop_layers(
    model: PreTrainedModel, layers: Sequence[int], *, keep_dropped: bool = False, check: bool = True
) -> LayerCut:
    """Drop decoder layers of a model in memory, in place.

    Args:
        model (`PreTrainedModel`): A causal language model. Its modules, config and layer indices change; its weights do
            not. Another model that was built from the same config object would see the config change too.
        layers (`Sequence[int]`): Indices of the layers to drop.
        keep_dropped (`bool`, defaults to `False`): Keep the dropped layers in memory, outside of the module tree,
            so that `LayerCut.restore` can put them back. They don't follow when the model is moved or cast.
        check (`bool`, defaults to `True`): Compare logits with those of the dense model with the dropped layers
            bypassed, which takes two forward passes over 8 tokens. A model that can't be run here is not checked.

    Returns:
        `LayerCut`: The cut.

    Raises:
        CutError: These layers can't be dropped, or the model has adapters. The model is unchanged.
        UnsupportedModelError: The architecture is not proven. The model is unchanged.
        LayerPruneError: The pruned model gives different logits. The model is unchanged.
    """
    check_plain_model(model)
    cut = families.make_cut(model.config, check_value("drop_layers", layers, LAYERS))
    new_config = families.cut_config(model.config, cut)
    stack = find_decoder_layers(model)
    live = dict(model.named_modules(remove_duplicate=False))
    _, attribute_changes = dry_run_cut(type(model), model.config, new_config, cut)
    attributes = [
        _Change(live[name], attribute, vars(live[name])[attribute], value)
        for name, attribute, value in attribute_changes
        if name in live and attribute in vars(live[name])
    ]
    parent = model.get_submodule(stack.parent_path) if stack.parent_path else model
    kept = nn.ModuleList(stack.layers[i] for i in cut.keep)
    kept.training = stack.layers.training
    changes = [
        *_slice_wide_tensors(model, cut),
        _Change(parent, stack.name, stack.layers, kept),
        *_swap_configs(model, new_config),
        *attributes,
        # Another model now: PEFT would record the base under this name as that of an adapter. The config's stays.
        _Change(model, "name_or_path", model.name_or_path, None),
    ]
    expected = None
    if check:
        try:
            expected = bypassed_logits(model, cut.drop)
        except CannotCheckError as error:
            logger.info("the logits of the cut are not checked: %s", error)
    made = LayerCut(cut, [stack.layers[i] for i in cut.drop], changes, active=False)
    made.reapply()
    if expected is not None:
        try:
            check_logits(model, expected)
        except BaseException:  # a wrong cut, and also memory that ran out or an interrupt: the model stays whole
            made.restore()
            raise
    logger.info("dropped %s of %d from %s", describe_layers(cut.drop), cut.num_layers, stack.path)
    # The changes reference the old layers and would keep them in memory.
    return made if keep_dropped else LayerCut(cut, [], [])


def _swap_configs(model: PreTrainedModel, new_config: PreTrainedConfig) -> list[_Change]:
    """Changes to every config object that a module holds, in place, since they are shared by reference.

    Some modules hold a modified copy of the config, so only the fields that the cut changes are set.
    """
    marker = getattr(model.config, families.MARKER, ABSENT)
    changes = [_Change(model.config, families.MARKER, marker, getattr(new_config, families.MARKER))]
    path = path_to_text(model.config)
    towers = [getattr(part, name, None) for part in path[:-1] for name in part.sub_configs]
    others = {id(tower) for tower in towers} - {id(part) for part in path}  # may be of the decoder's own class
    held = [getattr(module, "config", None) for module in model.modules()]
    held = [config for config in held if id(config) not in others]
    for old_part, new_part in zip(path, path_to_text(new_config), strict=True):
        before, after = dict(vars(old_part)), vars(new_part)
        delta = {
            name: after.get(name, ABSENT)
            for name in before.keys() | after.keys()
            if name not in (families.MARKER, *old_part.sub_configs)
            and not _equal_values(before.get(name, ABSENT), after.get(name, ABSENT))
        }
        for config in {id(config): config for config in [old_part, *held] if type(config) is type(old_part)}.values():
            for name, value in delta.items():
                own = vars(config).get(name, ABSENT)
                if _equal_values(own, before.get(name, ABSENT)):
                    changes.append(_Change(config, name, own, value))
    return changes


def _equal_values(one: Any, other: Any) -> bool:
    """Whether two values of a config are equal; a quantiser's settings are compared as dictionaries."""
    one, other = (value.to_dict() if hasattr(value, "to_dict") else value for value in (one, other))
    return one == other


def kept_slices(name: str, tensor: Any, shape: Sequence[int], dim: int, width: int, cut: families.Cut) -> torch.Tensor:
    """The kept layers' slices, each `width` wide in dimension `dim`, of a tensor or of a slice of a safetensors file.

    Raises:
        CutError: The tensor has another size.
    """
    if shape[dim] != width * cut.num_layers:
        raise CutError(f"{name} is {tuple(shape)}, not {cut.num_layers} layers of {width} wide")
    before = (slice(None),) * dim
    return torch.cat([tensor[(*before, slice(i * width, (i + 1) * width))] for i in cut.keep], dim=dim)


def _slice_wide_tensors(model: PreTrainedModel, cut: families.Cut) -> list[_Change]:
    changes: list[_Change] = []
    for wide, width in families.wide_tensors(model.config):
        for name, parameter in list(model.named_parameters()):
            if not f".{name}".endswith(f".{wide.suffix}"):
                continue
            owner, leaf = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            if is_offloaded(owner):  # accelerate would put the uncut tensor back
                raise CutError(
                    f"{name} holds a slice for each layer, and it is offloaded, so it can't be cut; load the model without "
                    "offloading, let prune_with load it (without keep_dropped), or cut it on disk (hf-layerprune prune)"
                )
            kept = kept_slices(name, parameter.detach(), parameter.shape, wide.dim, width, cut)
            new = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            changes.append(_Change(owner, leaf, parameter, new))
            old_size, new_size = parameter.shape[wide.dim], new.shape[wide.dim]
            for size in ("embedding_dim", "out_features"):
                if getattr(owner, size, None) == old_size:
                    changes.append(_Change(owner, size, old_size, new_size))
    return changes
