"""Which modules of a pruned model are tuned, by full name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedConfig

from .. import families
from ..errors import CutError
from ..families.layout import DecoderStack, find_final_norm, find_output_head
from ..options import pluralize
from ..runtime.precision import is_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import LayerDropConfig

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def tuned_layers(cut: families.Cut, tune_layers: int | str | Collection[int]) -> list[int]:
    """Base indices, ascending, of the layers that are tuned; see `LayerDropConfig` for `tune_layers`.

    Raises:
        CutError: More layers than remain, or a layer that is dropped or does not exist.
    """
    if isinstance(tune_layers, str):  # "cut", the only word that a config takes
        adjacent = {neighbour for i in cut.drop for neighbour in (i - 1, i + 1)}
        return sorted(adjacent & set(cut.keep))
    if isinstance(tune_layers, int):
        if tune_layers > len(cut.keep):
            raise CutError(
                f"tune_layers={tune_layers}, but the cut leaves {pluralize(len(cut.keep), 'layer')}; tune fewer"
            )
        return list(cut.keep[len(cut.keep) - tune_layers :])
    for i in tune_layers:
        if not 0 <= i < cut.num_layers:
            raise CutError(f"tune_layers has {i}, but the model's layers are 0..{cut.num_layers - 1}")
        if i not in cut.new_index:
            raise CutError(f"tune_layers has {i}, but layer {i} is dropped; specify remaining layers")
    return sorted(set(tune_layers))


def tuned_modules(
    model: PreTrainedModel, config: LayerDropConfig, cut: families.Cut, stack: DecoderStack
) -> list[str]:
    """Full names, in the pruned model, of all modules that are tuned. The model may be whole or already cut.

    Layers come first, then the final norm, then the head, then the config's own `modules_to_save`.

    Raises:
        CutError: The model has no such module, or its weights are quantised, or a name would also match another one.
    """
    names = [f"{stack.path}.{cut.new_index[i]}" for i in tuned_layers(cut, config.tune_layers)]
    if config.tune_final_norm and (norm := find_final_norm(model, stack)):
        names.append(norm)
    if config.tune_lm_head:
        head = find_output_head(model)
        if head is None:
            raise CutError(f"{type(model).__name__} has no output head to tune; use tune_lm_head=False")
        names.append(head)
    modules = kept_modules(model, cut, stack)
    for requested in config.modules_to_save or []:
        matches = [name for name in modules if name == requested or name.endswith(f".{requested}")]
        if not matches:
            base = config.base_model_name_or_path
            way_out = "specify one of its modules" if config.is_new else f"use the adapter with its base ({base})"
            raise CutError(
                f"modules_to_save has {requested!r}, but {type(model).__name__} has no such module; {way_out}"
            )
        if container := next((name for name in matches if isinstance(modules[name], _CONTAINERS)), None):
            raise CutError(
                f"modules_to_save has {requested!r}, but {container} is a {type(modules[container]).__name__}, which PEFT can't "
                "tune as a whole; specify the modules in it"
            )
        names += [name for name in matches if name not in names]
    names = _outermost(names)
    if getattr(model, "is_quantized", False):
        _check_trainable({name: modules[name] for name in names if name in modules})
    for name in names:
        # PEFT matches by the end of the name alone.
        others = [other for other in modules if other.endswith(name) and other != name and name in modules]
        if others:
            raise CutError(
                f"{name} can't be tuned alone: PEFT would also tune {', '.join(others[:3])}; tune other modules"
            )
    return names


def kept_modules(model: PreTrainedModel, cut: families.Cut, stack: DecoderStack) -> dict[str, nn.Module]:
    """The modules of a model, which may be whole or already cut, by their full names in the pruned model."""
    if len(stack.layers) != cut.num_layers:  # it may have adapters, whose copies are left out
        named = ((name.replace(".original_module", ""), module) for name, module in model.named_modules())
        return {name: module for name, module in named if ".modules_to_save" not in name}
    modules, start = {}, f"{stack.path}."
    for name, module in model.named_modules():
        if name.startswith(start):
            index, dot, inside = name.removeprefix(start).partition(".")
            if int(index) not in cut.new_index:
                continue
            name = f"{start}{cut.new_index[int(index)]}{dot}{inside}"
        modules[name] = module
    return modules


def saved_modules(tuned: Collection[str], repaired: Collection[str] | None) -> list[str] | None:
    """What an adapter saves: what it tunes, and what a repair changed, unless that is inside a module that is tuned."""
    return _outermost([*tuned, *(repaired or ())]) or None


def _outermost(names: Collection[str]) -> list[str]:
    """Names without those inside other modules: they are tuned with these, and PEFT can't load one copy inside another."""
    inside = tuple(f"{name}." for name in names)
    return [name for name in dict.fromkeys(names) if not name.startswith(inside)]


def check_not_nested(config: LayerDropConfig, others: Mapping[str, Any]) -> None:
    """Refuse an adapter with modules inside those of another adapter, or around them, of which PEFT saves neither.

    Raises:
        CutError: There is such a module.
    """
    for name in config.modules_to_save or ():
        for adapter, other in others.items():
            for theirs in other.modules_to_save or ():
                if other is not config and (theirs.startswith(f"{name}.") or name.startswith(f"{theirs}.")):
                    raise CutError(
                        f"this adapter has {name}, and adapter {adapter!r} {theirs}: one is inside the other, and PEFT could "
                        "save neither; tune the same module, or load the base again for another adapter"
                    )


def share_configs(model: nn.Module, adapter_name: str) -> None:
    """Give an adapter's copies of modules the configs of the originals, so that later changes reach them.

    PEFT's deep copies have configs of their own. After `set_attn_implementation`, such a layer would compute another kind of
    attention than the one that its model makes the mask for.
    """
    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or adapter_name not in wrapper.modules_to_save:
            continue
        copies = wrapper.modules_to_save[adapter_name].modules()
        for original, copied in zip(wrapper.original_module.modules(), copies, strict=True):
            vars(copied).update((k, v) for k, v in vars(original).items() if isinstance(v, PreTrainedConfig))


def _check_trainable(modules: dict[str, nn.Module]) -> None:
    """Refuse to tune packed weights: they have no gradient, and their copies would not be theirs to change."""
    for name, module in modules.items():
        for tensor_name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if is_packed(tensor):
                raise CutError(
                    f"{name}.{tensor_name} is quantised and can't be tuned; load the base unquantised, or leave it out of "
                    "what is tuned, such as by tune_layers=0"
                )
