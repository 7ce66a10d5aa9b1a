"""The repairs: what each is called, what it needs, and where it comes from. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from ..options import find


@dataclass(frozen=True)
class RepairMethod:
    """One way to make up for dropped layers. The module of that name fits it.

    Args:
        name (`str`): What people write.
        module (`str`): The file beside this one, with `fitter(walk, cuts, name)`.
        what (`str`): A few words for help and tables.
        source (`str`): Where it was published.
        in_front (`bool`): Whether it changes the layer in front of a cut, and so needs one there.
    """

    name: str
    module: str
    what: str
    source: str
    in_front: bool

    def load(self) -> ModuleType:
        """The module that fits it."""
        return import_module(f".{self.module}", __package__)


_LINEAR = "ReplaceMe, arXiv:2505.02819"

REPAIRS: dict[str, RepairMethod] = {
    repair.name: repair
    for repair in (
        RepairMethod("linear", "linear", "a linear map, folded into the projection in front of a cut", _LINEAR, True),
        RepairMethod("refit", "linear", "that projection itself, by least squares", f"this project, after {_LINEAR}", True),
        RepairMethod("magnitude", "magnitude", "the size of the hidden states", "Prune&Comp, arXiv:2507.18212", False),
    )
}  # fmt: skip


def find_repair(name: str) -> RepairMethod:
    """Look a repair up.

    Raises:
        CutError: There is none of that name.
    """
    return REPAIRS[find("repair", name, REPAIRS)]
