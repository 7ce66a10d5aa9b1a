"""Rank layers: load a base, score its layers by any number of criteria, write scores and pictures."""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..calibration.documents import check_source
from ..errors import CheckpointError, CutError, LayerPruneError, UnsupportedModelError
from ..files.copy import write_text
from ..files.folders import check_target, new_folder
from ..options import AMOUNTS, CutOptions, take
from ..records.lineage import peak_rss, versions
from ..runtime.loading import load_base, load_config
from ..select import CRITERIA, drop_count, find_criterion
from ..select.sets import free_layers
from ..select.targets import Target
from .requests import AdviseRequest, RankRequest

WalkRequest = RankRequest | AdviseRequest
Opened = tuple[Any, "CalibrationSet | None", Target | None]

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from ..calibration.rows import CalibrationSet
    from ..runtime.walk import LayerWalk
    from ..select.registry import Criterion
    from ..select.scores import Scores

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
# What a ranking consists of. A folder that holds anything else is not replaced.
_OURS = re.compile(r"scores\.json|(choices|scores|blocks-\w+)\.(png|svg)")


@dataclass
class Ranking:
    """Scores, and what follows from them.

    Args:
        scores (`dict[str, Scores]`): By criterion.
        drops (`dict[str, list[int]]`): What each would drop, by criterion.
        why (`dict[str, str]`): For criteria that explain themselves.
        record (`dict[str, Any]`): All of it, as in `scores.json`.
        on_text (`bool`): Whether a criterion or a curve could run the model on text.
    """

    scores: dict[str, Scores]
    drops: dict[str, list[int]]
    why: dict[str, str]
    record: dict[str, Any]
    on_text: bool = True

    def __str__(self) -> str:
        from ..select.report import report

        return report(self.scores, self.drops, self.why, self.record["protect"])


def rank(request: RankRequest) -> Ranking:
    """Score the layers of a base.

    Raises:
        CutError: Too few layers may be dropped, or a device can't be used.
        CheckpointError: The base or the calibration set can't be read, or the output can't be written.
        UnsupportedModelError: The architecture is not proven, or its layers can't be run one at a time.
    """
    source = Path(request.base).expanduser()
    if request.output is not None:  # at once: before torch is imported
        check_target(request.output.expanduser(), source, request.force, replaces=_OURS)
    from ..runtime.walk import LayerWalk
    from ..select.runner import choose_layers

    # What is refused is refused before a weight is read.
    config = load_config(request.base, revision=request.revision)
    criteria = _checked(request, config)
    n = families.layer_count(config)
    protected = families.protected_layers(config)
    count = 1 if request.drop is None else drop_count(request.drop, n)
    free = _free(request, criteria, n, count, protected)
    start = time.perf_counter()
    model, calibration, target = opened = _open(request, list(free), count)
    if target is not None:  # what blocks are scored at: the number of layers that go if the last ones do
        order = sorted(free_layers(n, 1, 0, 0, protected))
        count = target.choose(n, find_criterion("reverse_order"), request, protected, lambda k: order[-k:])
    scores, drops = _scored(request, opened, n, count, free, protected)
    why: dict[str, str] = {}
    found = {name: score.record() for name, score in scores.items()}
    if "auto" in free:
        by_auto = take(CutOptions, request, criterion="auto")
        choice = choose_layers(model, calibration, by_auto, protected=protected, target=target)
        drops["auto"], why["auto"], found["auto"] = choice.drop_layers, choice.why, choice.record()
    record = {
        "schema_version": SCHEMA_VERSION,
        "base": request.base,
        "commit": getattr((model.model if isinstance(model, LayerWalk) else model).config, "_commit_hash", None),
        "num_layers": n,
        **{name: value for name in AMOUNTS if (value := getattr(request, name)) is not None},
        "count": count,
        "variant": request.variant,
        "contiguous": request.contiguous,
        "seed": request.seed,
        "protect": {name: [i for i in range(n) if i not in layers] for name, layers in free.items()},
        "calibration": calibration.record() if calibration is not None else None,
        "criteria": {name: one | {"drop_layers": drops[name]} for name, one in found.items()},
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes": peak_rss(),
    }
    ranking = Ranking(scores, drops, why, record, len(criteria) == len(request.criteria))
    if request.output is not None:
        with new_folder(request.output, force=request.force, apart_from=source, replaces=_OURS) as folder:
            _write(ranking, folder, n)
    return ranking


def _free(
    request: RankRequest, criteria: Sequence[Criterion], n: int, count: int, protected: Collection[int]
) -> dict[str, set[int]]:
    """The layers that each criterion may drop. Of several criteria, those that may not drop enough are left out."""
    free, refused = dict[str, set[int]](), dict[str, CutError]()
    for criterion in criteria:
        try:
            free[criterion.name] = free_layers(n, count, *criterion.protection(request), protected)
        except CutError as error:
            refused[criterion.name] = error
    if not free:
        raise next(iter(refused.values()))
    for name, why in refused.items():
        logger.warning("%s is left out: %s", name, why)
    return free


def _checked(request: RankRequest, config: PreTrainedConfig) -> list[Criterion]:
    """The criteria, without those that need text if the model can't be run on it a layer at a time.

    Refuses a model, a text or options that they can't use.
    """
    from ..runtime.windows import check_context

    criteria = [find_criterion(name) for name in request.criteria]
    families.check_supported(config)
    if by_text := [criterion for criterion in criteria if criterion.needs == "text"]:
        try:
            families.check_stage(config, "rank")
        except UnsupportedModelError as error:
            if len(by_text) == len(criteria):
                raise
            logger.warning("%s are left out: %s", ", ".join(criterion.name for criterion in by_text), error)
            criteria = [criterion for criterion in criteria if criterion not in by_text]
        else:
            check_context(config, request.calibration_length, "calibration_length")
            check_source(request.calibration)
    if request.budget is not None and any(criterion.name != "auto" for criterion in criteria):
        raise CutError(
            f"{request.budget} is for --curve or --criterion auto; specify one of them, or a drop or target"
        )
    return criteria


def _scored(
    request: RankRequest, opened: Opened, n: int, count: int, free: Mapping[str, set[int]], protected: Collection[int]
) -> tuple[dict[str, Scores], dict[str, list[int]]]:
    """The scores by all criteria but `auto`, and what each would drop."""
    from ..select.runner import score_layers

    model, calibration, target = opened
    names = [name for name in free if name != "auto"]
    if not names:
        return {}, {}
    scores = score_layers(
        model, calibration, names, variant=request.variant, drop=count, lengths=request.lengths, seed=request.seed
    )

    def pick(name: str, count: int) -> list[int]:
        score = scores[name]
        if score.layers is None and not any(len(block) == count for block in score.blocks):
            more = score_layers(model, calibration, [name], variant=request.variant, drop=count, lengths=[count])
            score.blocks |= more[name].blocks
        return score.pick(count, free[name], request.contiguous)

    counts = {
        name: target.choose(n, find_criterion(name), request, protected, partial(pick, name)) if target else count
        for name in scores
    }
    return scores, {name: pick(name, number) for name, number in counts.items()}


def _open(request: RankRequest, names: Sequence[str], count: int) -> Opened:
    """Open the model (as a `LayerWalk` if a criterion needs text), the calibration set and the target; log the cost."""
    from ..adapter.prepare import calibration_of
    from ..select.cost import estimate

    model, device = open_base(request)
    # Sizes and times are those of the type in which the base is.
    target = Target.of(request, model.config, request.base, revision=request.revision, model=model, device=device)
    if not any(CRITERIA[name].needs == "text" for name in names):
        return model, None, target
    walk = open_walk(request, model, device)
    scored = [name for name in names if name != "auto"]
    cost = estimate(
        walk, request.calibration_samples, request.calibration_length, scored, count=count, lengths=request.lengths
    )
    if cost.layers:
        logger.info("scoring takes %s", cost)
    return walk, calibration_of(request, walk, request.revision), target


def open_base(request: WalkRequest) -> tuple[Any, torch.device]:
    """Load a request's base in the requested type, and return it with the device that will run its layers.

    Raises:
        CutError: The device can't be used. Nothing was loaded.
    """
    import torch

    from ..runtime.devices import pick_device

    device = torch.device(pick_device(request.device))
    dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    return load_base(request.base, revision=request.revision, dtype=dtype), device


def open_walk(request: WalkRequest, model: Any, device: torch.device) -> LayerWalk:
    """Prepare the model from [`open_base`] to be run layer by layer on that device."""
    from ..runtime.precision import in_fast_precision
    from ..runtime.walk import LayerWalk

    if request.dtype == "auto" and device.type == "cpu":
        in_fast_precision(model)
    return LayerWalk(model, device=None if device.type == "cpu" else device)


def _write(ranking: Ranking, folder: Path, num_layers: int) -> None:
    write_text(folder / "scores.json", json.dumps(ranking.record, indent=1, allow_nan=False) + "\n")
    try:
        draw_ranking(ranking.scores, ranking.drops, num_layers, folder)
    except CheckpointError:  # a picture can't be written, so the disk may be full: all or nothing
        raise
    except LayerPruneError as error:  # matplotlib is not installed
        logger.warning("%s; only the scores are written", error)


def draw_ranking(
    scores: Mapping[str, Scores], drops: Mapping[str, Sequence[int]], num_layers: int, folder: Path
) -> list[Path]:
    """Draw the scores and what each criterion would drop; return the plots, each as PNG and as SVG.

    Raises:
        LayerPruneError: matplotlib is not installed.
    """
    from ..publish.card import score_plots

    of_layers = [s for s in scores.values() if s.layers is not None and CRITERIA[s.criterion].needs != "count"]
    written = []
    for kind in ("png", "svg"):
        written.append(folder / f"choices.{kind}")
        score_plots.choices(drops, num_layers, written[-1])
        if of_layers:
            written.append(folder / f"scores.{kind}")
            score_plots.layer_scores(of_layers, drops, written[-1])
        for score in scores.values():
            if score.blocks:
                written.append(folder / f"blocks-{score.criterion}.{kind}")
                drop = drops[score.criterion]
                # A criterion that also scores single layers may drop no block; the best one of that length is shown.
                of_length = (block for block in score.blocks if len(block) == len(drop))
                best = min(of_length, key=score.blocks.__getitem__, default=())
                score_plots.block_scores(score, drop if CRITERIA[score.criterion].blocks_only else best, written[-1])
    return written
