"""Auto: build a short list cheaply, evaluate the best few candidates, and explain the choice.

Candidates are judged by the KL divergence of the cut model's next-token distribution from the dense model's, after the
repair if one will follow, on held-out text. The short list uses the same measure on fewer rows:

1. Every block of the requested length is evaluated on a few held-out rows. If a fitted repair will follow, one pass
   over the remaining rows first fits a map for every block, and each block is evaluated with its map. All blocks
   advance through the model together, so this costs about one run of the model per three blocks.
2. If the layers need not be contiguous, layers are also removed greedily: in each step, the one whose removal changes
   the model least.
3. The best few candidates are evaluated on all held-out rows, each with the repair it would actually get, and the best
   one is chosen.

Neither the KL of the unrepaired cut nor the share that a map leaves unexplained is enough to find the best repaired
block; docs/experiments.md has the comparison.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..calibration.rows import CalibrationSet, check_vocabulary
from ..errors import CutError
from ..families import check_stage
from ..layer_ranges import format_layers
from ..repair.fit import Repair, fit_repair
from ..repair.registry import find_repair
from ..repair.writers import swapped
from ..runtime.walk import LayerWalk
from .passes import run_pass
from .registry import ORIGINAL
from .repairability import BlockFit, Repairability
from .runner import Choice
from .scores import Scores
from .sets import lowest_block, lowest_layers, neighbours
from .trials import Outcome, Trial, try_out

if TYPE_CHECKING:
    from ..options import ChoiceOptions

logger = logging.getLogger(__name__)

HELD_OUT = 0.25
# Rows for the short list: to fit the maps, to evaluate the blocks, and for greedy removal.
_FIT_ROWS, _TRY_ROWS, _GREEDY_ROWS = 48, 8, 2
_SHORT_LIST = 3


@dataclass
class Candidate:
    """A set of layers on the short list.

    Args:
        drop (`tuple[int, ...]`): The layers.
        found_by (`str`): `"best block"` or `"greedy"`.
        outcome (`Outcome`, *optional*): The loss and KL of the repaired cut on all held-out rows.
    """

    drop: tuple[int, ...]
    found_by: str
    outcome: Outcome | None = None

    @property
    def tried(self) -> Outcome:
        """The outcome; the candidate must have been evaluated."""
        assert self.outcome is not None, "the candidate has not been evaluated yet"
        return self.outcome

    def record(self) -> dict[str, Any]:
        """The entry for `lineage.json`."""
        return {
            "layers": format_layers(self.drop),
            "found_by": self.found_by,
            "kl": round(self.tried.divergence, 5),
            "perplexity": round(self.tried.perplexity, 4),
        }


def choose(
    walk: LayerWalk, calibration: CalibrationSet, count: int, free: Collection[int], choice: ChoiceOptions
) -> Choice:
    """Choose the layers to drop.

    Args:
        walk (`LayerWalk`): The dense model.
        calibration (`CalibrationSet`): The text; a quarter of its rows is held out for evaluation.
        count (`int`): How many layers to drop.
        free (`Collection[int]`): The layers that may be dropped.
        choice (`ChoiceOptions`): Whether the layers must be contiguous, and which repair will follow.

    Returns:
        `Choice`: The layers, and the reason.

    Raises:
        CutError: No set of `count` layers may be dropped, or there are too few rows.
    """
    if choice.repair:
        check_stage(walk.model.config, "repair")
    check_vocabulary(calibration, walk.model)
    if len(calibration) < 4:
        raise CutError(
            "criterion 'auto' holds out a quarter of the calibration rows; raise calibration_samples to 4 or more"
        )
    fitting, judging = calibration.split(HELD_OUT)
    repair = choice.repair and find_repair(choice.repair)
    in_front = bool(repair and repair.in_front)
    free = {i for i in free if i} if in_front else set(free)  # the map needs a layer in front
    blocks = [block for block in neighbours(range(walk.num_layers), count) if all(i in free for i in block)]
    looked_at: list[Scores] = []
    candidates: list[Candidate] = []
    if blocks:
        scores = _try_blocks(walk, blocks, _first(fitting, _FIT_ROWS), _first(judging, _TRY_ROWS), in_front)
        looked_at.append(scores)
        ranked = sorted(scores.blocks, key=scores.blocks.__getitem__)[:_SHORT_LIST]
        candidates += [Candidate(block, "best block") for block in ranked]
    if not choice.contiguous and count > 1:
        candidates.append(Candidate(_one_after_the_other(walk, _first(judging, _GREEDY_ROWS), count, free), "greedy"))
    elif not blocks:
        lowest_block({}, count, free)  # raises the error that no block may be dropped
    candidates = list({candidate.drop: candidate for candidate in reversed(candidates)}.values())[::-1]
    logger.info("short list: %s", "; ".join(format_layers(candidate.drop) for candidate in candidates))
    judged = _judged(walk, candidates, fitting, judging, choice.repair)
    details = {
        "short_list": [candidate.record() for candidate in judged],
        "fitted_rows": len(fitting),
        "judged_rows": len(judging),
        "repair": choice.repair,
    }
    return Choice(list(judged[0].drop), "auto", _why(judged, choice.repair, judging), looked_at, details)


def _try_blocks(
    walk: LayerWalk,
    blocks: list[tuple[int, ...]],
    fitting: CalibrationSet,
    judging: CalibrationSet,
    in_front: bool,
) -> Scores:
    """KL of every block on a few rows, with its map applied if a fitted repair will follow."""
    fits: dict[tuple[int, ...], BlockFit] = {}
    if in_front:
        observer = Repairability({len(blocks[0])}, keep=True)
        run_pass(walk, fitting, [observer])
        fits = observer.fits
    trials = [Trial(block, {fits[block].before: fits[block].applied} if block in fits else {}) for block in blocks]
    outcomes = zip(blocks, try_out(walk, judging, trials), strict=True)
    alive = tuple(range(walk.num_layers))
    return Scores("kl", ORIGINAL, alive, blocks={block: outcome.divergence for block, outcome in outcomes})


def _one_after_the_other(
    walk: LayerWalk, judging: CalibrationSet, count: int, free: Collection[int]
) -> tuple[int, ...]:
    """Greedy removal by KL."""
    gone: list[int] = []
    for _ in range(count):
        left = sorted(set(free) - set(gone))
        outcomes = try_out(walk, judging, [Trial(tuple(sorted([*gone, i]))) for i in left])
        by_layer: list[float | None] = [None] * walk.num_layers
        for i, outcome in zip(left, outcomes, strict=True):
            by_layer[i] = outcome.kl
        gone += lowest_layers(by_layer, 1, left)
    return tuple(sorted(gone))


def _judged(
    walk: LayerWalk,
    candidates: list[Candidate],
    fitting: CalibrationSet,
    judging: CalibrationSet,
    repair: str | None,
) -> list[Candidate]:
    """Evaluate each candidate with the repair it would get, and sort them, best first."""
    trials: list[Trial] = []
    fitted: list[Candidate] = []
    for candidate in candidates:
        try:
            changes = changes_of(fit_repair(walk, candidate.drop, fitting, repair)) if repair else {}
        except CutError:  # no projection to fold a map into in front of one of its blocks
            continue
        fitted.append(candidate)
        trials.append(Trial(candidate.drop, changes))
    if not trials:
        raise CutError(f"repair={repair!r} works for none of the candidates on the short list; use repair=None")
    for candidate, outcome in zip(fitted, try_out(walk, judging, trials), strict=True):
        candidate.outcome = outcome
    return sorted(fitted, key=lambda candidate: candidate.tried.divergence)


def changes_of(repair: Repair) -> dict[int, Any]:
    """A repair as the `changes` of a [`~trials.Trial`]."""
    return {index: partial(swapped, values=values) for index, values in repair.by_layer().items()}


def _why(ranked: list[Candidate], repair: str | None, judging: CalibrationSet) -> str:
    best = ranked[0]
    state = f"cut and {repair} repair" if repair else "cut"
    why = f"layers {format_layers(best.drop)} ({best.found_by}): after the {state}, KL to the dense model is "
    why += f"{best.tried.divergence:.3g} nats on {len(judging)} held-out rows"
    others = "".join(f"; {format_layers(c.drop)} ({c.found_by}) has {c.tried.divergence:.3g}" for c in ranked[1:])
    return why + others


def _first(calibration: CalibrationSet, rows: int) -> CalibrationSet:
    return CalibrationSet.of(calibration.input_ids[:rows], calibration.source, calibration.seed)
