"""Rank layers: load a base, score its layers by any number of criteria, write scores and pictures."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..errors import CheckpointError, CutError, LayerPruneError
from ..files.copy import write_text
from ..records.lineage import peak_rss, versions
from ..runtime.loading import load_base, load_config, load_tokenizer
from ..select import ALL, CRITERIA, drop_count, find_criterion
from ..select.sets import free_layers

if TYPE_CHECKING:
    from ..calibration.rows import CalibrationSet
    from ..runtime.walk import LayerWalk
    from ..select import Scores

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RankRequest:
    """What to rank, and how.

    Args:
        base (`str`): A Hub id, a model folder, or a GGUF file.
        output (`Path`, *optional*): The folder for `scores.json` and the pictures. Without one, only the text is made.
        criteria (`Sequence[str]`, defaults to all but `"auto"`): By what.
        variant (`str`, defaults to `"published"`): See `LayerDropConfig`.
        drop (`float` or `int`, defaults to 0.25): How many layers would go.
        lengths (`Sequence[int]`, *optional*): Score blocks of these lengths.
        protect_first (`int`, *optional*): So many layers at the start would stay.
        protect_last (`int`, *optional*): So many layers at the end would stay.
        contiguous (`bool`, defaults to `False`): Whether the layers that would go must lie side by side.
        repair (`str`, *optional*): The repair that `"auto"` takes into account.
        calibration (`str`, defaults to `"self"`): The text, see `LayerDropConfig`.
        calibration_samples (`int`, defaults to 128): So many rows of it.
        calibration_length (`int`, defaults to 512): So many tokens a row.
        seed (`int`, defaults to 42): For whatever is drawn.
        dtype (`str`, defaults to `"auto"`): Of the weights; `"auto"` is the base's, or float32 on a CPU that has no
            fast products of 16 bits.
        device (`str`, defaults to `"auto"`): Where layers run, one at a time: `"cpu"`, `"cuda"`, ...
        revision (`str`, *optional*): Branch, tag or commit of a base on the Hub.
        force (`bool`, defaults to `False`): Replace a ranking that is there.
    """

    base: str
    output: Path | None = None
    criteria: Sequence[str] = ALL
    variant: str = "published"
    drop: float | int = 0.25
    lengths: Sequence[int] | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    contiguous: bool = False
    repair: str | None = None
    calibration: str = "self"
    calibration_samples: int = 128
    calibration_length: int = 512
    seed: int = 42
    dtype: str = "auto"
    device: str = "auto"
    revision: str | None = None
    force: bool = False


@dataclass
class Ranking:
    """What was found.

    Args:
        scores (`dict[str, Scores]`): By criterion.
        drops (`dict[str, list[int]]`): What each would drop, by criterion.
        why (`dict[str, str]`): For criteria that explain themselves.
        record (`dict[str, Any]`): All of it, as in `scores.json`.
    """

    scores: dict[str, Scores]
    drops: dict[str, list[int]]
    why: dict[str, str]
    record: dict[str, Any]

    def __str__(self) -> str:
        from ..select.report import report

        return report(self.scores, self.drops, self.why)


def rank(request: RankRequest) -> Ranking:
    """Score the layers of a base.

    Args:
        request (`RankRequest`): What to do.

    Returns:
        `Ranking`: The scores, and what each criterion would drop.

    Raises:
        CutError: A criterion does not exist, or a setting makes no sense.
        CheckpointError: The base or the calibration set can't be read, or the output can't be written.
        UnsupportedModelError: The architecture is not proven, or its layers can't be run one at a time.
    """
    criteria = [find_criterion(name) for name in dict.fromkeys(request.criteria)]
    config = load_config(request.base, revision=request.revision)
    families.check_supported(config)
    n = families.layer_count(config)
    count = drop_count(request.drop, n)
    protected = families.protected_layers(config)
    # What is refused is refused before a weight is read.
    free = {
        criterion.name: free_layers(
            n, count, *criterion.protection(request.variant, request.protect_first, request.protect_last), protected
        )
        for criterion in criteria
    }
    if request.output is not None:
        _check_output(request)
    from ..select.runner import choose_layers, score_layers

    start = time.perf_counter()
    names = [criterion.name for criterion in criteria if criterion.name != "auto"]
    model, calibration = _open(request, names, count)
    scores: dict[str, Scores] = {}
    if names:
        scores = score_layers(
            model, calibration, names, variant=request.variant, drop=count, lengths=request.lengths, seed=request.seed
        )
    drops = {name: found.pick(count, free[name], request.contiguous) for name, found in scores.items()}
    why: dict[str, str] = {}
    record: dict[str, Any] = {name: found.record() | {"drop_layers": drops[name]} for name, found in scores.items()}
    if "auto" in free:
        choice = choose_layers(
            model,
            calibration,
            drop=count,
            criterion="auto",
            protect_first=request.protect_first,
            protect_last=request.protect_last,
            contiguous=request.contiguous,
            repair=request.repair,
            protected=protected,
        )
        drops["auto"], why["auto"] = choice.drop_layers, choice.why
        record["auto"] = choice.record() | {"drop_layers": choice.drop_layers}
    found = {
        "schema_version": SCHEMA_VERSION,
        "base": request.base,
        "commit": getattr(config, "_commit_hash", None),
        "num_layers": n,
        "drop": request.drop,
        "count": count,
        "variant": request.variant,
        "contiguous": request.contiguous,
        "seed": request.seed,
        "protect": {name: [i for i in range(n) if i not in layers] for name, layers in free.items()},
        "calibration": calibration.record() if calibration is not None else None,
        "criteria": record,
        "versions": versions(),
        "seconds": round(time.perf_counter() - start, 3),
        "peak_memory_bytes": peak_rss(),
    }
    ranking = Ranking(scores, drops, why, found)
    if request.output is not None:
        _write(ranking, request, n)
    return ranking


def _open(request: RankRequest, names: Sequence[str], count: int) -> tuple[Any, CalibrationSet | None]:
    """The model, walked where a criterion looks at its states, and the calibration set; says what it will cost."""
    import torch

    from ..calibration.rows import load_calibration
    from ..runtime.walk import LayerWalk
    from ..select.cost import estimate

    dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
    model = load_base(request.base, revision=request.revision, dtype=dtype)
    if not any(CRITERIA[name].needs == "text" for name in (*names, *request.criteria)):
        return model, None
    walk = _walk(request, model, LayerWalk)
    cost = estimate(
        walk,
        request.calibration_samples,
        request.calibration_length,
        names,
        count=count,
        lengths=request.lengths,
    )
    if cost.layers:
        logger.info("scoring takes %s", cost)
    try:
        tokenizer = load_tokenizer(request.base, revision=request.revision)
    except CheckpointError:
        if request.calibration != "self":
            raise
        tokenizer = None
    calibration = load_calibration(
        request.calibration,
        tokenizer,
        samples=request.calibration_samples,
        length=request.calibration_length,
        seed=request.seed,
        model=model,
    )
    return walk, calibration


def _walk(request: RankRequest, model: Any, walk: type[LayerWalk]) -> LayerWalk:
    import torch

    from ..runtime.precision import in_fast_precision

    device = request.device
    if device == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        device = str(found) if found is not None else "cpu"
    try:
        device = torch.device(device)
        if request.dtype == "auto" and device.type == "cpu":
            in_fast_precision(model)
        return walk(model, device=None if device.type == "cpu" else device, let_go=True)
    except (RuntimeError, AssertionError) as error:
        raise CutError(f"device {request.device!r} can't be used: {str(error).splitlines()[0]}") from error


def _check_output(request: RankRequest) -> None:
    if request.output.exists() and not (request.force and (request.output / "scores.json").is_file()):
        raise CheckpointError(f"{request.output} exists; name another folder, or use --force to replace a ranking")


def _write(ranking: Ranking, request: RankRequest, num_layers: int) -> None:
    folder = request.output
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "scores.json", json.dumps(ranking.record, indent=1, allow_nan=False) + "\n")
    try:
        draw_ranking(ranking.scores, ranking.drops, num_layers, folder)
    except LayerPruneError as error:
        logger.warning("%s; the scores are in %s", error, folder / "scores.json")


def draw_ranking(
    scores: Mapping[str, Scores], drops: Mapping[str, Sequence[int]], num_layers: int, folder: Path
) -> list[Path]:
    """Draw a ranking.

    Args:
        scores (`Mapping[str, Scores]`): By criterion.
        drops (`Mapping[str, Sequence[int]]`): What each would drop.
        num_layers (`int`): How many layers the base has.
        folder (`Path`): Where to.

    Returns:
        `list[Path]`: The pictures, as PNG and as SVG.

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
        for found in scores.values():
            if found.blocks:
                written.append(folder / f"blocks-{found.criterion}.{kind}")
                block = drops[found.criterion] if CRITERIA[found.criterion].blocks_only else best_block(found, drops)
                score_plots.block_scores(found, block, written[-1])
    return written


def best_block(found: Scores, drops: Mapping[str, Sequence[int]]) -> Sequence[int]:
    """The best block as long as what would be dropped, of a criterion that also scores layers."""
    count = len(drops[found.criterion])
    ranked = sorted((score, block) for block, score in found.blocks.items() if len(block) == count)
    return ranked[0][1] if ranked else ()
