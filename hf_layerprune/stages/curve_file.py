"""The file of a curve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.json_file import read_object
from ..records.curve import is_point
from ..repair.registry import REPAIRS

FILE = "curve.json"
SCHEMA_VERSION = 1


def read_curve(path: Path) -> dict[str, Any]:
    """Read and check what a run of `rank --curve` has written, whole or in part.

    Raises:
        CheckpointError: It is something else.
    """
    record = read_object(path)
    try:
        n, points, steps, dense, decode = (
            record[name] for name in ("num_layers", "points", "steps", "dense", "decode")
        )
        figures = [point[name] for point in points for name in ("parameters", "bytes", "speedup")]
        figures += [dense["parameters"], dense["bytes"], *decode["layers"], decode["rest"]]
        sound = (
            all(is_point(point, n) and point["dropped"] == i for i, point in enumerate(points, 1))
            and all(not isinstance(figure, bool) and 0 <= figure < 1e18 for figure in figures)
            and len(points) > 0
            and record["schema_version"] == SCHEMA_VERSION
            and len(decode["layers"]) == n
            and decode.keys() == {"layers", "rest", "device"}
            and len({range(n).index(step) for step in steps}) == len(steps)
            and isinstance(record["identity"], dict)
            and record["repair"] in (None, *REPAIRS)
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} is not a curve; make it again with --force")
    return record
