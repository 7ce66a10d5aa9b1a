"""The repairs: name, requirements and source of each. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from ..options import check_choice


@dataclass(frozen=True)
class RepairMethod:
    """A way to compensate for dropped layers.

    Args:
        name (`str`): Its name in options and records.
        module (`str`): The module in this package that fits it, and defines `fitter(walk, cuts, name)`.
        description (`str`): A noun phrase for cards: "The cut was repaired with ...".
        source (`str`): The publication it comes from.
        needs_layer_before (`bool`): Whether it changes the layer before a dropped block, and so needs one there.
        changes_mixtures (`bool`, *optional*, defaults to `False`): Whether it also changes mixtures of experts.
        judged_by (`str`, *optional*): The repair that `auto` judges its short list with, if this one would take too
            long for every candidate.
    """

    name: str
    module: str
    description: str
    source: str
    needs_layer_before: bool
    changes_mixtures: bool = False
    judged_by: str | None = None

    def load(self) -> ModuleType:
        return import_module(f".{self.module}", __package__)


_LINEAR = "ReplaceMe, arXiv:2505.02819"
_OURS = f"this project, after {_LINEAR}"

REPAIRS: dict[str, RepairMethod] = {
    repair.name: repair
    for repair in (
        RepairMethod("linear", "linear", "a linear map folded into the projection before it", _LINEAR, True, True),
        RepairMethod("refit", "linear", "a refit of the projection before it", _OURS, True, False),
        RepairMethod(
            "borrow", "borrow", "neurons borrowed from the dropped layers and a refit of the projection before it", _OURS, True,
            False, "refit",
        ),
        RepairMethod("magnitude", "magnitude", "a rescaling of the hidden states", "Prune&Comp, arXiv:2507.18212", False, True),
    )
}  # fmt: skip


def find_repair(name: str) -> RepairMethod:
    """Look up a repair by name.

    Raises:
        CutError: The repair does not exist.
    """
    return REPAIRS[check_choice("repair", name, REPAIRS)]
