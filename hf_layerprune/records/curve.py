"""The points of a curve of quality against depth, in the records of a model or in `curve.json`."""

from __future__ import annotations

from typing import Any

from ..layer_ranges import parse_layers
from .history import History

STATES = ("cut", "repaired")
# The figures of a point, and how large they and their standard errors may be; see `Outcome.quality`.
_FIGURES = {"kl": 1e6, "perplexity_ratio": 1e20, "top1_agreement": 1.0}


def curve_points(history: History) -> list[dict[str, Any]]:
    """The points of the search for a budget, or of `rank --curve`, in the records; empty if any of them is malformed."""
    for stage in history.stages:
        points = stage.entry.get("selection", {}).get("curve", [])
        if len(points) > 1 and all(is_point(point, history.num_base_layers) for point in points):
            return points
    return []


def final_quality(point: dict[str, Any]) -> dict[str, Any]:
    """The quality at a point: after the repair if there is one, otherwise of the plain cut."""
    return point.get("repaired") or point["cut"]


def is_point(point: Any, num_layers: int) -> bool:
    """Whether a value read from a file is a valid point of a curve."""
    if not isinstance(point, dict) or not any(name in point for name in STATES):
        return False
    try:
        layers = parse_layers(str(point["layers"])) if isinstance(point.get("layers"), str) else [num_layers]
    except ValueError:
        return False
    measured = [point[name] for name in STATES if name in point]
    return (
        len(layers) == point.get("dropped")
        and layers[-1] < num_layers
        and all(isinstance(one, dict) and _is_quality(one) for one in measured)
    )


def _is_quality(measured: dict[str, Any]) -> bool:
    """Whether a point has its figures, and a perplexity ratio has a logarithm."""
    return (
        all(
            isinstance(value, int | float) and abs(value) <= most
            for name, most in _FIGURES.items()
            for value in (measured.get(name), measured.get(f"{name}_stderr", 0))
        )
        and measured["perplexity_ratio"] > 0
    )
