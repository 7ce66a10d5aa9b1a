"""Auto: short-list cheaply, try the best few out, say why.

What counts is how far the model that the cut leaves, repaired where a repair will follow, is from the dense one: KL of
the next token, on text that nothing was fitted to. So that is what the short list is drawn up by as well, on few rows:

1. Every block of the wanted length is tried on a few held-out rows. Where a fitted repair will follow, one pass over
   the other rows has fitted the map of every block before, and each block is tried with its map. All blocks advance
   through the model together, so this costs about as much as running the model once for each three blocks.
2. If the layers need not lie side by side: the layers are also removed one after the other, each time the one whose
   loss changes the model least.
3. The best few are tried on all held-out rows, each with the repair that it would really get, and the best one stays.

Neither the damage of the raw cut nor the share that a map leaves unexplained finds the best repaired block alone:
docs/experiments.md has the comparison.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..calibration.rows import CalibrationSet, check_vocabulary
from ..errors import CutError
from ..layer_ranges import format_layers
from ..repair import FITTED, Repair, fit_repair, swapped
from ..runtime.walk import LayerWalk
from .passes import run_pass
from .repairability import BlockFit, Repairability
from .runner import Choice
from .scores import Scores
from .sets import lowest_block, lowest_layers, neighbours
from .trials import Cut, Outcome, try_cuts

logger = logging.getLogger(__name__)

HELD_OUT = 0.25
# Rows for the short list: to fit every block's map, to try every block, to try layers one after the other.
_FIT_ROWS, _TRY_ROWS, _GREEDY_ROWS = 48, 8, 2
_SHORT_LIST = 3


@dataclass
class Candidate:
    """A set of layers on the short list.

    Args:
        drop (`tuple[int, ...]`): The layers.
        found_by (`str`): Where it comes from.
        outcome (`Outcome`, *optional*): What it does to the model, on all held-out rows, repaired.
    """

    drop: tuple[int, ...]
    found_by: str
    outcome: Outcome | None = None

    def record(self) -> dict[str, Any]:
        """For the lineage."""
        return {
            "layers": format_layers(self.drop),
            "found_by": self.found_by,
            "kl": round(self.outcome.kl, 5),
            "perplexity": round(self.outcome.perplexity, 4),
        }


def choose(
    walk: LayerWalk,
    calibration: CalibrationSet,
    count: int,
    free: Collection[int],
    *,
    contiguous: bool = False,
    repair: str | None = None,
) -> Choice:
    """Choose layers.

    Args:
        walk (`LayerWalk`): The dense model.
        calibration (`CalibrationSet`): The text; a quarter of its rows is held out to judge by.
        count (`int`): How many layers go.
        free (`Collection[int]`): Which may.
        contiguous (`bool`, defaults to `False`): Whether they must lie side by side.
        repair (`str`, *optional*): What will make up for them: `"linear"`, `"refit"`, `"magnitude"` or nothing.

    Returns:
        `Choice`: The layers, and why.

    Raises:
        CutError: No such set of layers may go, or there are too few rows.
    """
    check_vocabulary(calibration, walk.model)
    if len(calibration) < 4:
        raise CutError("criterion 'auto' holds a quarter of the calibration rows out; raise calibration_samples to 4")
    fitting, judging = calibration.split(HELD_OUT)
    free = {i for i in free if i} if repair in FITTED else set(free)  # the map needs a layer in front
    blocks = [block for block in neighbours(range(walk.num_layers), count) if all(i in free for i in block)]
    looked_at: list[Scores] = []
    candidates: list[Candidate] = []
    if blocks:
        scores = _try_blocks(walk, blocks, _first(fitting, _FIT_ROWS), _first(judging, _TRY_ROWS), repair)
        looked_at.append(scores)
        ranked = sorted(scores.blocks, key=scores.blocks.__getitem__)[:_SHORT_LIST]
        candidates += [Candidate(block, "best block") for block in ranked]
    if not contiguous and count > 1:
        candidates.append(Candidate(_one_after_the_other(walk, _first(judging, _GREEDY_ROWS), count, free), "greedy"))
    elif not blocks:
        lowest_block({}, count, free)  # says that there is none
    candidates = list({candidate.drop: candidate for candidate in reversed(candidates)}.values())[::-1]
    logger.info("short list: %s", "; ".join(format_layers(candidate.drop) for candidate in candidates))
    _judge(walk, candidates, fitting, judging, repair)
    candidates.sort(key=lambda candidate: candidate.outcome.kl)
    details = {
        "short_list": [candidate.record() for candidate in candidates],
        "fitted_rows": len(fitting),
        "judged_rows": len(judging),
        "repair": repair,
    }
    return Choice(list(candidates[0].drop), "auto", _why(candidates, repair, judging), looked_at, details)


def _try_blocks(
    walk: LayerWalk,
    blocks: list[tuple[int, ...]],
    fitting: CalibrationSet,
    judging: CalibrationSet,
    repair: str | None,
) -> Scores:
    """KL of every block, on a few rows, with its map where the linear repair will follow."""
    fits: dict[tuple[int, ...], BlockFit] = {}
    if repair in FITTED:
        observer = Repairability("published", {len(blocks[0])}, keep=True)
        run_pass(walk, fitting, [observer])
        fits = observer.fits
    cuts = [Cut(block, {fits[block].before: fits[block].applied} if block in fits else {}) for block in blocks]
    outcomes = try_cuts(walk, judging, cuts)
    return Scores(
        "kl",
        "published",
        tuple(range(walk.num_layers)),
        blocks={block: outcome.kl for block, outcome in zip(blocks, outcomes, strict=True)},
    )


def _one_after_the_other(
    walk: LayerWalk, judging: CalibrationSet, count: int, free: Collection[int]
) -> tuple[int, ...]:
    """Greedy removal by KL."""
    gone: list[int] = []
    for _ in range(count):
        left = sorted(set(free) - set(gone))
        outcomes = try_cuts(walk, judging, [Cut(tuple(sorted([*gone, i]))) for i in left])
        by_layer: list[float | None] = [None] * walk.num_layers
        for i, outcome in zip(left, outcomes, strict=True):
            by_layer[i] = outcome.kl
        gone += lowest_layers(by_layer, 1, left)
    return tuple(sorted(gone))


def _judge(
    walk: LayerWalk,
    candidates: list[Candidate],
    fitting: CalibrationSet,
    judging: CalibrationSet,
    repair: str | None,
) -> None:
    """Fill in what each candidate does to the model, with the repair that it would get."""
    cuts = []
    for candidate in list(candidates):
        changes = {}
        if repair is not None:
            try:
                changes = changes_of(fit_repair(walk, candidate.drop, fitting, repair))
            except CutError:  # nothing to fold a map into in front of one of its cuts
                candidates.remove(candidate)
                continue
        cuts.append(Cut(candidate.drop, changes))
    if not cuts:
        # Say why it can't be done in the words of the repair.
        raise CutError(f"repair={repair!r} works for none of the layers on the short list; use repair=None")
    for candidate, outcome in zip(candidates, try_cuts(walk, judging, cuts), strict=True):
        candidate.outcome = outcome


def changes_of(repair: Repair) -> dict[int, Any]:
    """What a repair does to the layers that it changes, as [`~trials.Cut`] takes it."""
    by_layer: dict[int, dict[str, torch.Tensor]] = {}
    for (index, name), value in repair.tensors.items():
        by_layer.setdefault(index, {})[name] = value
    return {index: partial(swapped, values=values) for index, values in by_layer.items()}


def _why(ranked: list[Candidate], repair: str | None, judging: CalibrationSet) -> str:
    best = ranked[0]
    state = f"cut and {repair} repair" if repair else "cut"
    found = f"layers {format_layers(best.drop)} ({best.found_by}): after the {state}, KL to the dense model is "
    found += f"{best.outcome.kl:.3g} nats on {len(judging)} held-out rows"
    if len(ranked) > 1:
        others = ", ".join(f"{format_layers(c.drop)} ({c.found_by}) has {c.outcome.kl:.3g}" for c in ranked[1:])
        found += f"; {others}"
    return found


def _first(calibration: CalibrationSet, rows: int) -> CalibrationSet:
    return CalibrationSet.of(calibration.input_ids[:rows], calibration.source, calibration.seed)
