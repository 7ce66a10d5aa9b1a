"""Compensate for dropped layers in closed form, without training.

    repair = fit_repair(model, drop_layers, calibration, method="linear")

Each repair has its own file and one entry in `registry.py`. `fit.py` runs the dense model for all of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registry import REPAIRS, RepairMethod, find_repair

if TYPE_CHECKING:
    from .fit import Repair, fit_repair

__all__ = ["REPAIRS", "Repair", "RepairMethod", "find_repair", "fit_repair"]


def __getattr__(name: str) -> Any:
    if name in ("Repair", "fit_repair"):  # loaded on first use, since they import torch
        return getattr(import_module(".fit", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
