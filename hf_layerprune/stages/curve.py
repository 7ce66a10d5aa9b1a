"""The curve of a base: for each number of layers, the best cut found, what is left, and what it costs in quality.

    from hf_layerprune import quality_curve

    curve = quality_curve("org/base", "curve", repair="refit", curve_up_to=12)
    print(curve)
    curve.drops[6], curve.points[5]["repaired"]["kl"]  # six layers; LayerDropConfig(drop_layers=curve.drops[6])

Each point is on disk once it is found, so an interrupted curve continues where it stopped.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..calibration.documents import check_source
from ..errors import CutError, ExistingOutputError, LayerPruneError
from ..files.copy import write_text
from ..files.folders import check_target
from ..layer_ranges import describe_layers, parse_layers
from ..options import DEFAULT_DROP, format_count, join_words, pluralize
from ..records.curve import final_quality
from ..runtime.loading import load_config
from ..select.registry import find_criterion
from ..select.sets import drop_count, free_layers
from ..versions import __version__
from .curve_file import FILE, SCHEMA_VERSION, Curve, base_identity, check_answerable, chosen_count, read_curve
from .requests import RankRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..calibration.rows import CalibrationSet
    from ..runtime.walk import LayerWalk
    from ..select.search import Search

logger = logging.getLogger(__name__)

_CURVE_FILES = re.compile(r"curve\.(json|png|svg)")
_BEST_REPAIR = "refit"
# The options that decide the points.
_IDENTITY_OPTIONS = (
    "calibration", "calibration_samples", "calibration_length", "seed", "protect_first", "protect_last", "contiguous",
    "dtype", "context", "batch",
)  # fmt: skip


def quality_curve(base: str, output: str | os.PathLike[str] | None = None, **options: Any) -> Curve:
    """Find the best cut of each depth, and measure it.

    Args:
        base (`str`): A Hub id, a model folder, or a GGUF file.
        output (`str` or `os.PathLike`, *optional*): A folder for `curve.json` and the plot. An unfinished curve of the
            same base with the same options is resumed.
        options: Those of `hf-layerprune rank --curve`: `repair`, `curve_up_to`, `calibration`, `max_kl`, ...

    Returns:
        `Curve`: The points.

    Raises:
        CutError: No layer may be dropped, or an option is not accepted.
        CheckpointError: The base can't be read, or the folder holds something else.
        UnsupportedModelError: The architecture is not proven, or its layers can't be run one at a time.
    """
    return make_curve(RankRequest.from_call(base, output, True, options))


def make_curve(request: RankRequest) -> Curve:
    """Do as `quality_curve` does, for a request."""
    if request.output is not None:  # at once: before torch is imported
        source = Path(request.base).expanduser()
        # An earlier curve is continued.
        check_target(request.output, source, force=True, replaces=_CURVE_FILES)
    from ..runtime.windows import check_context
    from ..select.budget import check_budget_rows
    from .provenance import has_same_rows

    check_answerable(request)
    check_budget_rows(request, request.calibration_samples)
    check_source(request.calibration)
    config = load_config(request.base, revision=request.revision)
    families.check_supported(config)
    families.check_stage(config, "rank")
    check_context(config, request.calibration_length, "calibration_length")
    n = families.layer_count(config)
    protected = families.protected_layers(config)
    free = free_layers(n, drop_count(1, n), *find_criterion("auto").protected_ends(request), protected)
    up_to = _last_count(request, n, min(len(free), n - 1))
    identity = {
        "base": base_identity(request),
        "repair": request.repair,
        **{name: getattr(request, name) for name in _IDENTITY_OPTIONS},
        "version": __version__,
    }
    record = None if request.output is None else _read_earlier(request.output, identity, request.force)
    if record is None:
        record = {"schema_version": SCHEMA_VERSION, "identity": identity, "points": [], "steps": [], "num_layers": n}
    if len(record["points"]) < up_to:
        _extend(request, config, record, free, up_to)
    elif not has_same_rows(record["calibration"], request):
        raise _other_rows_error(request)
    points = record["points"][:up_to]
    curve = Curve(points, record)
    too_few = request.drop == DEFAULT_DROP and DEFAULT_DROP * n < 1  # for the default, which nobody asked for
    record["chosen"] = None if too_few else chosen_count(request, curve)
    record["knee"] = knee(points)
    if request.output is not None:
        folder = request.output
        _write(folder, record)
        _draw_curve(curve, folder)
    return curve


def knee(points: list[dict[str, Any]]) -> int | None:
    """The number of layers after which quality falls off: the point that is farthest below the chord of the curve."""
    kls = [0.0, *(final_quality(point)["kl"] for point in points)]
    if len(kls) < 4 or kls[-1] <= 0:
        return None
    last = len(kls) - 1
    below = [i / last - kl / kls[-1] for i, kl in enumerate(kls)]
    best = max(range(len(kls)), key=below.__getitem__)
    return best if below[best] > 0.05 else None


def _last_count(request: RankRequest, num_layers: int, most: int) -> int:
    """The most layers that the curve drops; refuses more than can be dropped, and a `drop` beyond its end."""
    if request.curve_up_to is not None and request.curve_up_to > most:
        raise CutError(
            f"curve_up_to={request.curve_up_to}, but only {most} of {num_layers} layers can be dropped; use {most} or less"
        )
    up_to = request.curve_up_to or min(num_layers // 2, most)
    if request.drop not in (None, DEFAULT_DROP) and (count := drop_count(request.drop, num_layers)) > up_to:
        raise CutError(
            f"drop={request.drop} is not on the curve, which ends at {pluralize(up_to, 'layer')}; use curve_up_to={count}, or "
            "drop fewer"
        )
    return up_to


def _extend(
    request: RankRequest, config: PreTrainedConfig, record: dict[str, Any], free: set[int], up_to: int
) -> None:
    """Find and measure the points that are missing."""
    from ..adapter.prepare import load_calibration_for
    from ..cut.sizes import Sizes
    from ..select.decode_times import DecodeTimes, time_decoding
    from .opening import dtype_of_cut, open_base, open_walk

    model, device = open_base(request)
    sizes = Sizes(config, request.base, revision=request.revision)
    if "decode" not in record:
        times = time_decoding(model, sizes.resolve_context(request.context, 512), request.batch, device)
        record["decode"] = asdict(times)
        record["dense"] = {"parameters": sizes.parameters(), "bytes": sizes.file_bytes()}
    times = DecodeTimes(**record["decode"])
    walk = open_walk(request, model, device)
    calibration = load_calibration_for(request, walk, request.revision)
    if record.setdefault("calibration", calibration.record()) != calibration.record():
        raise _other_rows_error(request)
    search = _make_search(request, record, walk, calibration, free)
    dtype = dtype_of_cut(request, record["repair"])
    repaired = sizes if dtype == "auto" else Sizes(config, request.base, revision=request.revision, dtype=dtype)
    left = up_to - len(record["points"])
    search.log_estimate(f"a curve up to {pluralize(up_to, 'layer')}", left, left, left)
    for count in range(len(record["points"]) + 1, up_to + 1):
        try:
            point = search.find_point(count)
        except CutError as error:
            if count == 1:
                raise
            logger.warning("the curve ends at %s: %s", pluralize(count - 1, "layer"), error)
            break
        drop = parse_layers(point["layers"])
        point |= {
            "parameters": sizes.parameters(drop),
            "bytes": (repaired if "repaired" in point else sizes).file_bytes(drop),
            "speedup": round(times.speedup(drop), 4),
        }
        record["points"].append(point)
        record["steps"] = search.steps
        kl = final_quality(point)["kl"]
        logger.info("%d of %d: without %s, KL is %.3g", point["dropped"], up_to, describe_layers(drop), kl)
        if request.output is not None:
            _write(request.output, record)


def _other_rows_error(request: RankRequest) -> ExistingOutputError:
    return ExistingOutputError(
        f"{request.output} holds a curve on other calibration rows; choose another folder, or start again with force=True"
    )


def _make_search(
    request: RankRequest, record: dict[str, Any], walk: LayerWalk, calibration: CalibrationSet, free: set[int]
) -> Search:
    """A search, by default with the best repair if the model can be repaired."""
    from ..select.search import Search

    def with_repair(repair: str | None) -> Search:
        if repair and request.dtype == "auto":  # as the cut will be, also where loading unpacks quantised weights
            families.check_trainable(load_config(request.base, revision=request.revision))
        return Search(walk, calibration, free, replace(request, repair=repair), record["steps"])

    if request.repair is None and "repair" not in record:
        try:
            search = with_repair(_BEST_REPAIR)
            search.best_sets(1)
            record["repair"] = _BEST_REPAIR
            return search
        except LayerPruneError as error:
            logger.info("the curve is measured without repair: %s", error)
    return with_repair(record.setdefault("repair", request.repair))


def _read_earlier(folder: Path, identity: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """What an earlier run has found; raises if it was about something else."""
    if force or not (folder / FILE).exists():
        return None
    record = read_curve(folder / FILE)
    if other := [name for name, value in identity.items() if record["identity"].get(name) != value]:
        raise ExistingOutputError(
            f"{folder} holds a curve with another {join_words(other)}; choose another folder, or start again with force=True"
        )
    logger.info("continuing %s, which has %s", folder / FILE, pluralize(len(record["points"]), "point"))
    return record


def _write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")


def _draw_curve(curve: Curve, folder: Path) -> None:
    from ..publish.card.curve_plot import draw_curve

    remark = ""
    if curve.chosen is not None:
        point = curve.points[curve.chosen - 1]
        best = final_quality(point)
        remark = (
            f"{point['dropped']} of {curve.record['num_layers']} layers dropped: {format_count(point['parameters'])} parameters,\n"
            f"{point['speedup']:.2f} times as fast, perplexity \N{MULTIPLICATION SIGN} {best['perplexity_ratio']:.2f}"
        )
    try:
        for kind in ("png", "svg"):
            draw_curve(curve.points, folder / f"curve.{kind}", chosen=curve.chosen, knee=curve.knee, remark=remark)
    except LayerPruneError as error:
        logger.warning("%s; only the numbers are written", error)
