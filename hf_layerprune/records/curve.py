"""The points of a curve of quality against depth, in the records of a model or in `curve.json`."""

from __future__ import annotations

from typing import Any

from ..layer_ranges import parse_layers
from .history import History

STATES = ("cut", "repaired")
_FIGURES = ("kl", "perplexity_ratio", "top1_agreement")


def curve_points(history: History) -> list[dict[str, Any]]:
    """The points of the search for a budget, or of `rank --curve`, in the records; empty if any of them is malformed."""
    for stage in history.stages:
        points = stage.entry.get("selection", {}).get("curve", [])
        if len(points) > 1 and all(is_point(point, history.num_base_layers) for point in points):
            return sorted(points, key=lambda point: point["dropped"])
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
    figures = [m.get(figure) for m in measured if isinstance(m, dict) for figure in _FIGURES]
    figures += [m.get("kl_stderr", 0) for m in measured if isinstance(m, dict)]
    return (
        len(layers) == point.get("dropped")
        and layers[-1] < num_layers
        and len(figures) == 4 * len(measured)
        and all(isinstance(figure, int | float) and abs(figure) < 1e6 for figure in figures)
    )
