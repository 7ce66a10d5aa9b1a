"""Rank layers: load a base, score its layers by any number of criteria, and find what each would drop."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..calibration.documents import check_source
from ..errors import CutError, UnsupportedModelError
from ..files.folders import check_target, new_folder
from ..options import AMOUNTS, CutOptions, copy_fields
from ..records.lineage import package_versions, peak_rss
from ..runtime.loading import load_config
from ..select import CRITERIA, drop_count, find_criterion
from ..select.sets import check_lengths, free_layers
from ..select.targets import Target
from .opening import open_base, open_walk
from .ranking import RANKING_FILES, Ranking, write_ranking
from .requests import RankRequest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..calibration.rows import CalibrationSet
    from ..select.registry import Criterion
    from ..select.scores import Scores

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


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
        check_target(request.output, source, request.force, replaces=RANKING_FILES)
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
        with new_folder(request.output, force=request.force, source=source, replaces=RANKING_FILES) as folder:
            write_ranking(ranking, folder)
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

    def pick(name: str, number: int) -> list[int]:
        score, again = scores[name], partial(score_layers, model, calibration, [name], variant=request.variant)
        if CRITERIA[name].kind == "count" and target is not None:  # the order may depend on how many go
            score = scores[name] = again(drop=number, seed=request.seed)[name]
        if CRITERIA[name].scores_blocks(request.contiguous) and all(len(block) != number for block in score.blocks):
            score.blocks |= again(drop=number, lengths=[number])[name].blocks
        return score.pick(number, free[name], request.contiguous)

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
