"""Repaired modules in an adapter: saved with it, but not trained.

PEFT saves whole modules with `ModulesToSaveWrapper`, which also enables gradients on its copies. The parameters
defined here ignore that, so repaired modules stay frozen, and so do the layers below the first trained one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import families
from ..families.layout import DecoderStack
from .fit import Repair


class _Frozen(nn.Parameter):
    """A parameter that never requires gradients; nor do its copies."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        return super().requires_grad_(False)


def freeze(module: nn.Module) -> None:
    """Freeze a module for good; its copies are frozen too."""
    for parameter in module.parameters(recurse=False):
        parameter.requires_grad_(False)
        parameter.__class__ = _Frozen  # a new one would lack what DeepSpeed ZeRO-3 keeps with it


def unfreeze(model: nn.Module) -> None:
    """Undo [`freeze`] for all modules of a model."""
    frozen: list[nn.Parameter] = [parameter for parameter in model.parameters() if isinstance(parameter, _Frozen)]
    for parameter in frozen:
        parameter.__class__ = nn.Parameter


def repaired_module_names(repair: Repair, stack: DecoderStack, cut: families.Cut) -> list[str]:
    """Full names in the pruned model of the modules that a repair changes."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in repaired_tensors(repair, stack.path, cut)))


def repaired_tensors(repair: Repair, stack_path: str, cut: families.Cut) -> dict[str, torch.Tensor]:
    """The tensors that a repair changes, by their full names in the pruned model."""
    return {
        f"{stack_path}.{cut.new_index[index]}.{name}": repair.tensors[index, name]
        for index, name in sorted(repair.tensors)
    }


def apply_to_adapter(repair: Repair, model: nn.Module, stack_path: str, cut: families.Cut, adapter_name: str) -> None:
    """Write the new weights into an adapter's copies of a pruned model's modules; the originals stay unchanged."""
    for name, value in repaired_tensors(repair, stack_path, cut).items():
        module: Any = model
        *path, last = name.split(".")
        for part in path:
            module = getattr(_adapter_copy(module, adapter_name), part)
        module = _adapter_copy(module, adapter_name)
        parameter: torch.Tensor = getattr(module, last)
        parameter.data = value.to(parameter.device, parameter.dtype)


def _adapter_copy(module: Any, adapter_name: str) -> Any:
    from peft.utils.other import ModulesToSaveWrapper

    return module.modules_to_save[adapter_name] if isinstance(module, ModulesToSaveWrapper) else module
