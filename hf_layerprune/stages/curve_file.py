"""The file of a curve, and the cut that a request asks for among its points."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CutError
from ..files.json_file import read_object
from ..layer_ranges import parse_layers
from ..options import AmountOptions, format_bytes, format_count, format_percent, pluralize
from ..records.curve import final_quality, is_point
from ..records.fingerprints import fingerprint
from ..records.names import is_gguf_name
from ..repair.registry import REPAIRS
from ..runtime.loading import is_hub_id
from ..select.sets import drop_count
from .requests import AdviseRequest, PruneRequest, RankRequest

logger = logging.getLogger(__name__)

FILE = "curve.json"
SCHEMA_VERSION = 1


@dataclass(repr=False)
class Curve:
    """Quality against the number of dropped layers.

    Args:
        points (`list[dict[str, Any]]`): One for each number of layers, from 1: `dropped`, `layers`, `found_by`,
            `parameters`, `bytes`, `speedup` (expected), and the quality before (`cut`) and after repair (`repaired`).
        record (`dict[str, Any]`): The whole content of `curve.json`.
    """

    points: list[dict[str, Any]]
    record: dict[str, Any] = field(repr=False)

    @property
    def drops(self) -> dict[int, list[int]]:
        """The layers that each point drops, by their number."""
        return {point["dropped"]: parse_layers(point["layers"]) for point in self.points}

    @property
    def chosen(self) -> int | None:
        """How many layers the options of the request would drop, if the curve goes that far."""
        return self.record.get("chosen")

    @property
    def knee(self) -> int | None:
        """The number of layers beyond which quality falls off, if the curve has such a point."""
        return self.record.get("knee")

    def __str__(self) -> str:
        headings = [
            "dropped", "parameters", "bytes", "speed-up", "KL, cut", "KL, repaired", "perplexity", "top-1", "layers",
        ]  # fmt: skip
        rows = [headings, ["0", *_format_sizes(self.record["dense"]), "1x", "0", "0", "x1", "100 %", "dense"]]
        for point in self.points:
            best = final_quality(point)
            marks = {"chosen": self.chosen, "knee": self.knee}
            here = ", ".join(word for word, count in marks.items() if count == point["dropped"])
            kls = [f"{point[name]['kl']:.3g}" if name in point else "-" for name in ("cut", "repaired")]
            quality = [f"x{best['perplexity_ratio']:.3g}", format_percent(best["top1_agreement"])]
            layers = point["layers"] + (f"  <- {here}" if here else "")
            rows.append(
                [str(point["dropped"]), *_format_sizes(point), f"{point['speedup']:.2f}x", *kls, *quality, layers]
            )
        widths = [max(len(row[k]) for row in rows) for k in range(len(headings) - 1)]
        lines = ["  ".join([*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[-1]]) for row in rows]
        repair = self.record["repair"]
        note = f"perplexity and top-1 after the {repair} repair; " if repair else ""
        device = self.record["decode"]["device"]
        lines += ["", f"{note}speed-up as expected from the times of layers and head on this {device}"]
        meanings = {
            "knee": "beyond it, each layer costs more quality",
            "chosen": "what was asked for, by default 25 % of the layers",
        }
        lines += [f"{word}: {meaning}" for word, meaning in meanings.items() if getattr(self, word) is not None]
        return "\n".join(lines)

    __repr__ = __str__  # a notebook shows the table


def _format_sizes(entry: dict[str, Any]) -> list[str]:
    return [format_count(entry["parameters"]), format_bytes(entry["bytes"])]


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
            and all(isinstance(record[name], dict) for name in ("identity", "calibration"))
            and record["repair"] in (None, *REPAIRS)
        )
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise CheckpointError(
            f"{path} is not a curve; make it again: hf-layerprune rank BASE {path.parent} --curve --force"
        )
    return record


def choose_point(request: PruneRequest, folder: Path) -> tuple[PruneRequest, dict[str, Any]]:
    """The cut that a request asks for, among the points of a curve.

    Returns:
        `tuple[PruneRequest, dict[str, Any]]`: The request with the layers and the repair of the point, and the curve
            for the lineage.

    Raises:
        CheckpointError: The folder has no curve, or one of another base.
        CutError: No point of the curve meets the request.
    """
    check_answerable(request)
    if request.target_size is not None and is_gguf_name(request.output):
        raise CutError(
            "a curve has the sizes of unpacked weights, not of a GGUF file; use drop=N, or leave out from_curve"
        )
    curve = load_curve(folder, request)
    record = curve.record
    is_open = not (request.budget or request.target) and request.drop is None
    count = curve.chosen if is_open else chosen_count(request, curve)
    if count is None and is_open:
        raise CutError(
            f"no point of {folder}, which drops up to {pluralize(len(curve.points), 'layer')}, is what was asked for when it was "
            f"made; choose one, such as drop={len(curve.points)}"
        )
    if count is None:
        way_out = "allow more loss" if request.budget else "ask for less, or extend the curve with rank --curve-up-to"
        name = request.budget or request.target
        asked = f"meets {name}" if name else f"drops {drop_count(request.drop, record['num_layers'])}"
        raise CutError(
            f"no point of {folder}, which drops up to {pluralize(len(curve.points), 'layer')}, {asked}; {way_out}"
        )
    point = curve.points[count - 1]
    measured = record["repair"] if "repaired" in point else None
    if request.budget and request.repair not in (None, measured):
        raise CutError(
            f"{folder} was measured with {f'the {measured} repair' if measured else 'no repair'}, so it can't say which cut meets "
            f"{request.budget} after the {request.repair} repair; leave out repair={request.repair}, or make a curve with it"
        )
    repair = request.repair or measured
    if repair and request.repair is None and is_gguf_name(request.output):
        raise CutError(
            f"{folder} was measured with the {repair} repair, which a GGUF file that stays one can't have; write a folder, or "
            f"drop the same layers without repair: drop_layers={parse_layers(point['layers'])}"
        )
    sizes = ("bytes", "parameters", "speedup")
    points = [{name: value for name, value in one.items() if name not in sizes} for one in curve.points]
    if repair and request.calibration is None:
        logger.info("fitting the repair on the calibration text of %s", folder)
    request = replace(request, drop_layers=parse_layers(point["layers"]), repair=repair)
    request = request.with_calibration(record["identity"])
    return request, {"criterion": "curve", "curve": points}


def load_curve(folder: Path, request: PruneRequest | AdviseRequest) -> Curve:
    """The curve of a request's base that `rank --curve` has written.

    Raises:
        CheckpointError: The folder has no curve, or one of another base.
    """
    if not (folder / FILE).is_file():
        raise CheckpointError(f"{folder} has no {FILE}; make it with hf-layerprune rank BASE {folder} --curve")
    record = read_curve(folder / FILE)
    if record["identity"].get("base") != base_identity(request):
        raise CheckpointError(
            f"{folder} holds the curve of a base other than {request.base}; specify that base, or make a curve of this one"
        )
    return Curve(record["points"], record)


def chosen_count(request: AmountOptions, curve: Curve) -> int | None:
    """How many layers a request would drop, by the points of the curve."""
    if name := request.budget or request.target:
        found = [point["dropped"] for point in curve.points if _meets_limit(point, name, getattr(request, name))]
        return found[-1 if request.budget else 0] if found else None
    count = drop_count(request.drop, curve.record["num_layers"])
    return count if count <= len(curve.points) else None


def check_answerable(request: AmountOptions) -> None:
    """Refuse what no curve can answer, before one is made or read."""
    if request.target_memory is not None:
        raise CutError("a curve has no figures for memory; use target_size, or prune without a curve")


def _meets_limit(point: dict[str, Any], name: str, value: float) -> bool:
    """Whether a point meets a target or, with one standard error, a budget."""
    from ..select.budget import budget_margin

    best = final_quality(point)
    if name in ("target_params", "target_size"):
        return point["parameters" if name == "target_params" else "bytes"] <= value
    if name == "target_speedup":
        return point["speedup"] >= value
    if f"{name.partition('_')[2]}_stderr" not in best:
        raise CutError(
            f"{name} needs a standard error, and the curve has none; make it again with calibration_samples=8 or more"
        )
    return budget_margin(best, name, value) >= 0


def base_identity(request: RankRequest | PruneRequest | AdviseRequest) -> str:
    """A hash of the base's files."""
    if is_hub_id(request.base):
        from ..files.hub import Repo

        repo = Repo.open(request.base, request.revision)
        return f"{request.base}@{repo.commit}"
    files = fingerprint(Path(request.base).expanduser())
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
