"""The file of a curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.json_file import read_object
from ..records.curve import is_point
from ..repair.registry import REPAIRS

FILE = "curve.json"


def read_curve(path: Path) -> dict[str, Any]:
    """Read and check what a run of `rank --curve` has written, whole or in part.

    Raises:
        CheckpointError: It is something else.
    """
    record = read_object(path)
    n, points, steps, decode = (record.get(name) for name in ("num_layers", "points", "steps", "decode"))
    sound = (
        type(n) is int
        and isinstance(points, list)
        and len(points) > 0
        and all(is_point(point, n) and point["dropped"] == i for i, point in enumerate(points, 1))
        and all(_is_number(point.get(name)) for point in points for name in ("parameters", "bytes", "speedup"))
        and isinstance(steps, list)
        and len(set(map(str, steps))) == len(steps)
        and all(type(step) is int and 0 <= step < n for step in steps)
        and isinstance(decode, dict)
        and isinstance(decode.get("layers"), list)
        and len(decode["layers"]) == n
        and all(map(_is_number, [*decode["layers"], decode.get("rest")]))
        and isinstance(record.get("dense"), dict)
        and all(_is_number(record["dense"].get(name)) for name in ("parameters", "bytes"))
        and isinstance(record.get("identity"), dict)
        and record.get("repair") in (None, *REPAIRS)
    )
    if not sound:
        raise CheckpointError(f"{path} is not a curve; make it again with --force")
    return record


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e18
