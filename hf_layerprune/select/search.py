"""Search for sets of layers, with the repair in the loop: nested sets, the best block of a length, and what they cost.

Three parts of the calibration set have a job each: to fit the maps and the repair, to try sets out, and to judge those
that were found. A set is tried with a linear map in place of each of its blocks, if the repair is fitted, and judged
with the repair that it would really get.

- Nested sets: layers go one after the other, each time the one whose removal, repaired, changes the model least. Maps
  are fitted to the dense model, so after a step only the blocks next to the layer that went need new ones.
- Blocks: all blocks of one length advance through the model together.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from torch import nn

from ..calibration.rows import CalibrationSet, check_vocabulary
from ..errors import CutError
from ..families import UNREPAIRABLE, check_stage, cut_config, make_cut, text_config
from ..layer_ranges import find_blocks, format_layers
from ..options import pluralize
from ..repair.fit import Repair, fit_repair
from ..repair.registry import find_repair
from ..repair.writers import swap_parameters
from ..runtime.walk import LayerWalk
from .cost import log_estimate
from .passes import run_pass
from .repairability import BlockFit, Repairability
from .scores import NOT_COMPARABLE, drop_non_finite
from .sets import consecutive_blocks, lowest_block
from .trials import Outcome, Trial, evaluate_trials

if TYPE_CHECKING:
    from ..options import SelectionOptions

logger = logging.getLogger(__name__)

HELD_OUT = 0.25
BLOCK, GREEDY = "best block", "greedy"  # what found a set
# The most rows: to fit maps to, to try blocks on, and to try the steps of nested sets on.
_MAX_MAP_ROWS, _MAX_TRIAL_ROWS, _MAX_STEP_ROWS = 48, 8, 2
_TOKENS_PER_DIMENSION = 8
_MAX_JUDGED = 3  # how many sets are judged where the best ones overflow


@dataclass(frozen=True)
class Candidate:
    """A set of layers that was judged: found as `"best block"`, by `"greedy"` search or by a criterion.

    The outcome was measured on the rows held out for judging, after the repair.
    """

    drop: tuple[int, ...]
    found_by: str
    outcome: Outcome
    repair: Repair | None


class Search:
    """Finds sets of layers and judges them.

    Args:
        walk (`LayerWalk`): The dense model.
        calibration (`CalibrationSet`): The text; a quarter of its rows is held out for judging.
        free (`Collection[int]`): The layers that may be dropped.
        choice (`SelectionOptions`): Whether the layers must be contiguous, and which repair will follow.
        found (`Sequence[int]`): The first steps of the nested sets, if an earlier search has found them.

    Raises:
        CutError: There are too few rows.
        UnsupportedModelError: The model type can't be repaired.
    """

    def __init__(
        self,
        walk: LayerWalk,
        calibration: CalibrationSet,
        free: Collection[int],
        choice: SelectionOptions,
        found: Sequence[int] = (),
    ) -> None:
        if choice.repair:
            check_stage(walk.model.config, "repair")
        check_vocabulary(calibration, walk.model)
        if len(calibration) < 4:
            raise CutError(
                "a search holds out a quarter of the calibration rows; raise calibration_samples to 4 or more"
            )
        self.walk, self.repair, self.contiguous = walk, choice.repair, choice.contiguous
        self.fit_rows, self.judge_rows = calibration.split(HELD_OUT)
        self._needs_front = bool(choice.repair and find_repair(choice.repair).needs_layer_before)
        # The map needs a layer in front.
        self.free = {i for i in free if i or not self._needs_front}
        self._map_rows, self._trial_rows = self.fit_rows.split(min(0.34, _MAX_TRIAL_ROWS / len(self.fit_rows)))
        self._warn_of_few_tokens()
        self.steps = list(found)
        self._fits: dict[tuple[int, ...], BlockFit | None] = {}
        self._any_lost = False  # whether one of the sets that were tried last had no KL
        self._refusal: CutError | None = None  # why a config could describe none of them

    @cached_property
    def dense(self) -> Outcome:
        """The dense model on the rows for judging."""
        return evaluate_trials(self.walk, self.judge_rows, [Trial(())])[0]

    def nested(self, count: int) -> tuple[int, ...]:
        """The set of a size among sets each of which contains the one before.

        Raises:
            CutError: There is none.
        """
        while len(self.steps) < count:
            self.steps.append(self._next_layer())
        return tuple(sorted(self.steps[:count]))

    def score_blocks(self, count: int) -> dict[tuple[int, ...], float]:
        """KL of every block of a length on a few rows, with its map if a fitted repair will follow."""
        every = [
            block for block in consecutive_blocks(range(self.walk.num_layers), count) if self.free.issuperset(block)
        ]
        return {block: one.kl for block, one in self._try_sets(self._describable(every), _MAX_TRIAL_ROWS).items()}

    def find_sets(self, count: int) -> tuple[dict[tuple[int, ...], float], tuple[int, ...] | None]:
        """Find the blocks of a size, by [`score_blocks`] and the best first, and the nested set of that size.

        The latter is `None` where one block has to go, or where the search is stuck and there are blocks.

        Raises:
            CutError: No set of that size may be dropped.
        """
        blocks = dict(sorted(self.score_blocks(count).items(), key=itemgetter(1)))
        if self.contiguous or count == 1:
            self.best_block(blocks, count)  # raises the error that no block may be dropped
            return blocks, None
        try:
            return blocks, self.nested(count)
        except CutError:
            if not blocks:
                raise
            return blocks, None

    def best_sets(self, count: int) -> dict[tuple[int, ...], str]:
        """The sets of a size and what found them, the best on the rows for trying first.

        Raises:
            CutError: No set of that size may be dropped.
        """
        blocks, nested = self.find_sets(count)
        found = dict.fromkeys(blocks, BLOCK)
        if nested is None:
            return found
        if blocks and nested != (best := next(iter(blocks))):
            one = self._try_sets([nested], _MAX_TRIAL_ROWS).get(nested)
            if one is None or one.kl >= blocks[best]:
                return found
        return {nested: GREEDY} | {drop: by for drop, by in found.items() if drop != nested}

    def find_point(self, count: int) -> dict[str, Any]:
        """Find and judge the best set of a size.

        Returns:
            `dict[str, Any]`: How many layers, which, what found them, and the quality of the `cut` and of what is
                `repaired`, where it has a KL.

        Raises:
            CutError: There is none.
        """
        for drop, found_by in islice(self.best_sets(count).items(), _MAX_JUDGED):
            repair = self.fit(drop)
            trials = {"cut": Trial(drop)} | ({"repaired": Trial(drop, repair_changes(repair))} if repair else {})
            found = dict(zip(trials, evaluate_trials(self.walk, self.judge_rows, list(trials.values())), strict=True))
            states = {name: one.quality(self.dense) for name, one in found.items() if math.isfinite(one.kl)}
            if states:
                return {"dropped": count, "layers": format_layers(drop), "found_by": found_by, **states}
        raise CutError(NOT_COMPARABLE)

    def best_block(self, scores: Mapping[tuple[int, ...], float], count: int) -> tuple[int, ...]:
        """The block of a length with the lowest score, of those that [`score_blocks`] gave one.

        Raises:
            CutError: There is none.
        """
        if not scores and (self._refusal or self._any_lost):
            raise self._refusal or CutError(NOT_COMPARABLE)
        if not scores and self._needs_front and any(end - start >= count for start, end in find_blocks(self.free)):
            raise CutError(
                f"no block of {pluralize(count, 'layer')} can be repaired: no layer in front of one has an output projection that "
                f"repair={self.repair!r} could change; {self._other_repair or UNREPAIRABLE}"
            )
        return tuple(lowest_block(scores, count, self.free))

    @property
    def _other_repair(self) -> str | None:
        """What to do if the repair works for no cut, but another one may."""
        if self.repair is None or find_repair(self.repair).changes_mixtures:
            return None
        return 'use repair="linear", which also changes mixtures of experts'

    def judge(self, sets: Iterable[tuple[tuple[int, ...], str]]) -> list[Candidate]:
        """Evaluate sets with the repair that each would really get, best first; those without one, or KL, are left out.

        Raises:
            CutError: The repair works for none of them, or none has a KL.
        """
        sets = list(sets)
        possible = self._describable([drop for drop, _ in sets])
        if self._refusal:
            raise self._refusal
        fitted = [(drop, by, self.fit(drop)) for drop, by in sets if drop in possible]
        if self.repair:
            fitted = [one for one in fitted if one[2] is not None]
        if not fitted:
            raise CutError(
                f"repair={self.repair!r} works for none of the candidates on the short list; "
                f"{self._other_repair or 'leave it out'}"
            )
        trials = {drop: Trial(drop, repair_changes(repair) if repair else {}) for drop, _, repair in fitted}
        outcomes = self._evaluate(self.judge_rows, trials)
        if not outcomes:
            raise CutError(NOT_COMPARABLE)
        candidates = [Candidate(drop, by, outcomes[drop], repair) for drop, by, repair in fitted if drop in outcomes]
        return sorted(candidates, key=lambda one: one.outcome.kl)

    def fit(self, drop: tuple[int, ...]) -> Repair | None:
        """The repair that a set would get; `None` where none will follow, or none can be fitted."""
        try:
            return fit_repair(self.walk, drop, self.fit_rows, self.repair) if self.repair else None
        except CutError:  # no projection to fold a map into before one of its blocks
            return None

    def log_estimate(self, what: str, depth: int, rounds: int, judged: int) -> None:
        """Log about how long a search takes.

        It finds nested sets of up to `depth` layers, tries all blocks of as many lengths as there are rounds, and
        judges some sets.
        """
        n, nested = self.walk.num_layers, 0 if self.contiguous else depth
        mapping = min(_MAX_MAP_ROWS, len(self._map_rows)) * n if self._needs_front else 0
        steps = nested * (mapping + n * n // 2 * min(_MAX_STEP_ROWS, len(self._trial_rows)))
        tries = 2 * mapping + n * n // 2 * min(_MAX_TRIAL_ROWS, len(self._trial_rows))
        judge_runs = n * (len(self.fit_rows) * bool(self.repair) + 2 * len(self.judge_rows))
        runs = steps + rounds * tries + judged * judge_runs
        log_estimate(self.walk, self.judge_rows, what, 1.3 * runs, 0)  # the head takes its share

    @property
    def max_drop(self) -> int:
        """The most layers that may be dropped."""
        longest = max((end - start for start, end in find_blocks(self.free)), default=0)
        return min(longest if self.contiguous else len(self.free), self.walk.num_layers - 1)

    # --- internals ---------------------------------------------------------------------------------------

    def _describable(self, sets: Collection[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The sets without which a config can describe the model; notes why there is none."""
        config, found, refusal = self.walk.model.config, [], None
        for drop in sets:
            try:
                cut_config(config, make_cut(config, drop))
            except CutError as error:
                refusal = error
            else:
                found.append(drop)
        self._refusal = None if found else refusal
        return found

    def _warn_of_few_tokens(self) -> None:
        """A map that is fitted to hardly more tokens than it is wide tells little about a set."""
        tokens = self._map_rows.first(_MAX_MAP_ROWS).tokens
        width = text_config(self.walk.model.config).hidden_size
        if self._needs_front and tokens < _TOKENS_PER_DIMENSION * width:
            rows = math.ceil(len(self.fit_rows) / (1 - HELD_OUT) * _TOKENS_PER_DIMENSION * width / tokens)
            logger.warning(
                "sets of layers are compared by maps of width %d that are fitted to %d tokens, which is few; "
                "about %d calibration rows would choose more reliably", width, tokens, rows,
            )  # fmt: skip

    def _next_layer(self) -> int:
        """The layer to drop next."""
        dropped = set(self.steps)
        left = sorted(self.free - dropped)
        if self.contiguous and dropped:
            left = [i for i in left if i in (min(dropped) - 1, max(dropped) + 1)]
        if not left or len(dropped) + 1 >= self.walk.num_layers:
            raise CutError(
                f"no more than {pluralize(len(dropped), 'layer')} may be dropped from this model; drop fewer, or protect fewer"
            )
        sets = self._describable([tuple(sorted((*dropped, i))) for i in left])
        if self._refusal:
            raise self._refusal
        tried = self._try_sets(sets, _MAX_STEP_ROWS)
        if not tried:
            raise CutError(
                NOT_COMPARABLE
                if self._any_lost
                else f"repair={self.repair!r} works for none of the layers that are left; "
                f"{self._other_repair or 'leave it out'}"
            )
        best = min(tried, key=lambda drop: tried[drop].kl)
        (step,) = set(best) - dropped
        dropped.add(step)
        # Free the maps of blocks that can't be needed again.
        self._fits = {b: fit for b, fit in self._fits.items() if len(b) == 1 or not dropped.isdisjoint(b)}
        return step

    def _try_sets(self, sets: Iterable[tuple[int, ...]], rows: int) -> dict[tuple[int, ...], Outcome]:
        """Outcomes on a few rows, with maps, of the sets that can be repaired."""
        runs = {drop: [tuple(range(*run)) for run in find_blocks(drop)] for drop in sets}
        if self._needs_front:
            self._fit_maps({block for each in runs.values() for block in each})
        trials: dict[tuple[int, ...], Trial] = {}
        for drop, each in runs.items():
            fits = [self._fits[block] for block in each] if self._needs_front else []
            changes = {fit.before: fit.apply for fit in fits if fit is not None}
            if len(changes) == len(fits):
                trials[drop] = Trial(drop, changes)
        self._any_lost = False
        return self._evaluate(self._trial_rows.first(rows), trials) if trials else {}

    def _evaluate(
        self, text: CalibrationSet, trials: Mapping[tuple[int, ...], Trial]
    ) -> dict[tuple[int, ...], Outcome]:
        """The outcome of each set whose KL can be compared."""
        found = dict(zip(trials, evaluate_trials(self.walk, text, list(trials.values())), strict=True))
        kls = drop_non_finite(self.walk, "kl", {drop: one.kl for drop, one in found.items()})
        self._any_lost = len(kls) < len(found)
        return {drop: found[drop] for drop in kls}

    def _fit_maps(self, wanted: Collection[tuple[int, ...]]) -> None:
        """Fit the maps that are missing, all in one pass over the dense model."""
        missing = {block for block in wanted if block not in self._fits}
        if missing:
            mixtures = self.repair is not None and find_repair(self.repair).changes_mixtures
            observer = Repairability({len(block) for block in missing}, only=missing, keep=True, mixtures=mixtures)
            run_pass(self.walk, self._map_rows.first(_MAX_MAP_ROWS), [observer])
            self._fits |= {block: observer.fits.get(block) for block in missing}


def repair_changes(repair: Repair) -> dict[int, Callable[[nn.Module], AbstractContextManager]]:
    """A repair as the `changes` of a [`~trials.Trial`]."""
    return {index: partial(swap_parameters, values=values) for index, values in repair.by_layer().items()}
