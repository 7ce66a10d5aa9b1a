"""Make up for dropped layers in closed form, before anything is trained.

    repair = fit_repair(model, drop_layers, calibration, method="linear")

A repair is a file of its own, and a line in `registry.py`. `fit.py` walks the model for all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registry import REPAIRS, RepairMethod, find_repair

if TYPE_CHECKING:
    from .fit import Repair, fit_repair

__all__ = ["REPAIRS", "Repair", "RepairMethod", "find_repair", "fit_repair"]


def __getattr__(name: str) -> Any:
    if name in ("Repair", "fit_repair"):  # they import torch
        return getattr(import_module(".fit", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
