"""Rank layers: load a base, score its layers by any number of criteria, write scores and pictures."""

from __future__ import annotations

import json
import logging
import os
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
from ..layer_ranges import describe_layers, format_layers
from ..options import AMOUNTS, CutOptions, copy_fields
from ..records.lineage import package_versions, peak_rss
from ..runtime.loading import load_config
from ..select import CRITERIA, drop_count, find_criterion
from ..select.sets import check_lengths, free_layers
from ..select.targets import Target
from .requests import AdviseRequest, RankRequest

WalkRequest = RankRequest | AdviseRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

    from ..calibration.rows import CalibrationSet
    from ..runtime.walk import LayerWalk
    from ..select.registry import Criterion
    from ..select.scores import Scores

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_BEST_BLOCKS = 3
# What a ranking consists of. A folder that holds anything else is not replaced.
_RANKING_FILES = re.compile(r"scores\.json|(choices|scores|blocks-\w+)\.(png|svg)")


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

    @property
    def layer_scores(self) -> list[Scores]:
        """The scores of single layers, but for those that are only an order."""
        return [s for s in self.scores.values() if s.layers is not None and CRITERIA[s.criterion].needs != "count"]

    def __str__(self) -> str:
        rows = [[name, format_layers(gone), CRITERIA[name].description] for name, gone in self.drops.items()]
        lines = _columns([["criterion", "would drop", "by"], *rows])
        for name, reason in self.why.items():
            lines += ["", f"{name}: {reason}"]
        if shown := self.layer_scores:
            table = [["layer", *(s.criterion for s in shown)]]
            for i, scores in enumerate(zip(*(s.layers or () for s in shown), strict=True)):
                cells = zip(scores, shown, strict=True)
                table.append([str(i), *(_cell(score, i in self.drops[s.criterion]) for score, s in cells)])
            note = "layers with lower scores are dropped first; * would be dropped"
            lines += ["", *_columns(table, right=True), "", note]
        if required := self.record["required"]:
            lines.append(f"{describe_layers(required)} can't be dropped from this architecture")
        protected: dict[tuple[int, ...], list[str]] = {}
        for name, layers in self.record["protect"].items():
            protected.setdefault(tuple(layers), []).append(name)
        for layers, names in protected.items():
            if layers:
                options = "--protect-first, --protect-last"
                lines.append(f"{', '.join(names)}: {describe_layers(layers)} may not be dropped ({options})")
        for name, found in self.scores.items():
            # Angular distance has scores of blocks of every length.
            lengths = {len(block) for block in found.blocks}
            for length in sorted(lengths.intersection([*self.record.get("lengths", ()), len(self.drops[name])])):
                ranked = sorted((score, block) for block, score in found.blocks.items() if len(block) == length)
                best = ", ".join(f"{format_layers(block)} ({score:.4g})" for score, block in ranked[:_BEST_BLOCKS])
                lines.append(f"{name}, blocks of {length}: {best}")
        return "\n".join(lines)


def _cell(score: float | None, dropped: bool) -> str:
    return ("-" if score is None else f"{score:.4g}") + ("*" if dropped else " ")


def _columns(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def rank_layers(base: str, output: str | os.PathLike[str] | None = None, **options: Any) -> Ranking:
    """Score the layers of a base, and find what each criterion would drop.

    Args:
        base (`str`): A Hub id, a model folder, or a GGUF file.
        output (`str` or `os.PathLike`, *optional*): A folder for `scores.json` and the plots.
        options: Those of `hf-layerprune rank`: `criteria` (one name or a list; all by default), `drop`, `contiguous`,
            `lengths`, `calibration`, ...

    Returns:
        `Ranking`: The scores.

    Raises:
        CutError: Too few layers may be dropped, a device can't be used, or an option is not accepted.
        CheckpointError: The base or the calibration set can't be read, or the output can't be written.
        UnsupportedModelError: The architecture is not proven, or its layers can't be run one at a time.
    """
    return rank(RankRequest.from_call(base, output, False, options))


def rank(request: RankRequest) -> Ranking:
    """Do as `rank_layers` does, for a request."""
    source = Path(request.base).expanduser()
    if request.output is not None:  # at once: before torch is imported
        check_target(request.output, source, request.force, replaces=_RANKING_FILES)
    from ..adapter.prepare import load_calibration_for
    from ..select.cost import count_runs, log_estimate
    from ..select.runner import choose_layers

    # What is refused is refused before a weight is read.
    config = load_config(request.base, revision=request.revision)
    criteria = _usable_criteria(request, config)
    n = families.layer_count(config)
    protected = families.protected_layers(config)
    count = 1 if request.drop is None else drop_count(request.drop, n)
    check_lengths(request.lengths or (), n)
    free = _free_by_criterion(request, criteria, n, count, protected)
    start = time.perf_counter()
    dense, device = open_base(request)
    # Sizes are those of the type in which the base is.
    target = Target.from_options(request, config, request.base, revision=request.revision, model=dense, device=device)
    if target is not None:  # what blocks are scored at: the number of layers that go if the last ones do
        order = sorted(free_layers(n, 1, request.protect_first or 0, request.protect_last or 0, protected))
        count = target.choose_count(n, order, lambda k: order[-k:])
    lengths = request.lengths or ([count] if request.contiguous else None)
    model, calibration = dense, None
    if any(CRITERIA[name].needs == "text" for name in free):
        model = open_walk(request, dense, device)
        calibration = load_calibration_for(request, model, request.revision)
        runs = count_runs(n, _scored(free), count, lengths)
        log_estimate(model, calibration, "scoring", *(len(calibration) * each for each in runs))
    scores, drops = _score_and_pick(request, model, calibration, target, n, count, free, lengths)
    why: dict[str, str] = {}
    found = {name: score.record() for name, score in scores.items()}
    for name in free:
        if CRITERIA[name].kind == "choice":
            by_name = copy_fields(CutOptions, request, criterion=name)
            choice = choose_layers(model, calibration, by_name, protected=protected, target=target)
            drops[name], why[name], found[name] = choice.drop_layers, choice.why, choice.record()
    record = {
        "schema_version": SCHEMA_VERSION,
        "base": request.base,
        "commit": getattr(dense.config, "_commit_hash", None),
        "num_layers": n,
        **{name: value for name in AMOUNTS if (value := getattr(request, name)) is not None},
        "count": count,
        **({"lengths": sorted(request.lengths)} if request.lengths else {}),
        "variant": request.variant,
        "contiguous": request.contiguous,
        "seed": request.seed,
        "required": sorted(protected),
        "protect": {
            name: sorted({*range(n)} - layers - protected.keys()) for name, layers in free.items() if name in found
        },
        "calibration": calibration.record() if calibration is not None else None,
        "criteria": {name: one | {"drop_layers": drops[name]} for name, one in found.items()},
        "versions": package_versions(),
        "seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes": peak_rss(),
    }
    ranking = Ranking(scores, drops, why, record, len(criteria) == len(request.criteria))
    if request.output is not None:
        with new_folder(request.output, force=request.force, source=source, replaces=_RANKING_FILES) as folder:
            _write(ranking, folder, n)
    return ranking


def _free_by_criterion(
    request: RankRequest, criteria: Sequence[Criterion], n: int, count: int, protected: Collection[int]
) -> dict[str, set[int]]:
    """The layers that each criterion may drop. Of several criteria, those that may not drop enough are left out."""
    free: dict[str, set[int]] = {}
    for criterion in criteria:
        try:
            free[criterion.name] = free_layers(n, count, *criterion.protected_ends(request), protected)
        except CutError as error:
            if criterion is criteria[-1] and not free:
                raise
            logger.warning("%s is left out: %s", criterion.name, error)
    return free


def _usable_criteria(request: RankRequest, config: PreTrainedConfig) -> list[Criterion]:
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
            f"{request.budget} is for curve=True or criteria=auto; specify one of them, or drop=N, or a target"
        )
    return criteria


def _scored(criteria: Collection[str]) -> list[str]:
    """The criteria that give scores."""
    return [name for name in criteria if CRITERIA[name].kind != "choice"]


def _score_and_pick(
    request: RankRequest,
    model: Any,
    calibration: CalibrationSet | None,
    target: Target | None,
    n: int,
    count: int,
    free: Mapping[str, set[int]],
    lengths: list[int] | None,
) -> tuple[dict[str, Scores], dict[str, list[int]]]:
    """The scores by all criteria that give some, and what each would drop."""
    from ..select.runner import score_layers

    scores = score_layers(
        model, calibration, _scored(free), variant=request.variant, drop=count, lengths=lengths, seed=request.seed
    )

    def pick(name: str, count: int) -> list[int]:
        score = scores[name]
        if CRITERIA[name].scores_blocks(request.contiguous) and not any(len(block) == count for block in score.blocks):
            more = score_layers(model, calibration, [name], variant=request.variant, drop=count, lengths=[count])
            score.blocks |= more[name].blocks
        return score.pick(count, free[name], request.contiguous)

    drops: dict[str, list[int]] = {}
    for name in scores:
        try:
            number = target.choose_count(n, free[name], partial(pick, name)) if target else count
            drops[name] = pick(name, number)
        except CutError as error:
            if not drops and name == [*scores][-1] and _scored(free) == [*free]:
                raise
            logger.warning("%s is left out: %s", name, error)
    return {name: scores[name] for name in drops}, drops


def open_base(request: WalkRequest) -> tuple[Any, torch.device]:
    """Load a request's base in the requested type, and return it with the device that will run its layers.

    Raises:
        CutError: The device can't be used. Nothing was loaded.
    """
    import torch

    from ..runtime.devices import pick_device
    from ..runtime.mapping import load_mapped

    device = torch.device(pick_device(request.device))
    return load_mapped(request.base, revision=request.revision, dtype=request.dtype), device


def dtype_of_cut(request: WalkRequest, repair: str | None) -> str:
    """The type to write a cut of a base in, after it was scored in the requested one.

    Weights are converted only where a repair needs that: quantised ones have none, and float16 may overflow.
    """
    config = load_config(request.base, revision=request.revision) if repair else None
    converts = hasattr(config, "quantization_config") or str(getattr(config, "dtype", None)) == "torch.float16"
    return request.dtype if converts else "auto"


def open_walk(request: WalkRequest, model: Any, device: torch.device) -> LayerWalk:
    """Prepare the model from [`open_base`] to be run layer by layer on that device."""
    from ..runtime.precision import to_fast_precision
    from ..runtime.walk import LayerWalk

    if request.dtype == "auto" and device.type == "cpu":
        to_fast_precision(model)
    return LayerWalk(model, device=device)


def _write(ranking: Ranking, folder: Path, num_layers: int) -> None:
    write_text(folder / "scores.json", json.dumps(ranking.record, indent=1, allow_nan=False) + "\n")
    try:
        draw_ranking(ranking, num_layers, folder)
    except CheckpointError:  # a picture can't be written, so the disk may be full: all or nothing
        raise
    except LayerPruneError as error:  # matplotlib is not installed
        logger.warning("%s; only the scores are written", error)


def draw_ranking(ranking: Ranking, num_layers: int, folder: Path) -> None:
    """Draw the scores and what each criterion would drop; each plot as PNG and as SVG.

    Raises:
        LayerPruneError: matplotlib is not installed.
    """
    from ..publish.card import score_plots

    drops = ranking.drops
    for kind in ("png", "svg"):
        score_plots.draw_choices(drops, num_layers, folder / f"choices.{kind}")
        if ranking.layer_scores:
            score_plots.draw_layer_scores(ranking.layer_scores, drops, folder / f"scores.{kind}")
        for name, score in ranking.scores.items():
            if score.blocks:
                drop = drops[name]
                # A criterion that also scores single layers may drop no block; the best one of that length is shown.
                of_length = (block for block in score.blocks if len(block) == len(drop))
                best = min(of_length, key=score.blocks.__getitem__, default=())
                shown = drop if tuple(drop) in score.blocks else best
                score_plots.draw_block_scores(score, shown, folder / f"blocks-{name}.{kind}")
