"""Drop as many layers as an acceptable loss of quality allows, after the repair that will really follow.

First, nested sets grow by a layer at a time until one is outside the budget. Blocks of layers then try to go deeper, in
steps that double until the budget is passed and are bisected. Each set is judged with its repair, on rows that neither
the search nor the repair has seen. It is inside the budget if its loss and one standard error together are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from ..calibration.rows import CalibrationSet, held_out_rows
from ..errors import CutError
from ..layer_ranges import describe_layers, format_layers
from ..options import pluralize
from ..runtime.walk import LayerWalk
from .scores import Choice
from .search import BLOCK, GREEDY, HELD_OUT, Candidate, Search

if TYPE_CHECKING:
    from ..options import CutOptions, SelectionOptions

logger = logging.getLogger(__name__)

Pick = Callable[[CalibrationSet, int], tuple[int, ...]]
Quality = Mapping[str, float]  # see `Outcome.quality`


def check_budget_rows(choice: SelectionOptions, rows: int) -> None:
    """Refuse a budget for which there are too few calibration rows.

    Raises:
        CutError: Fewer than two of them would be held out.
    """
    if choice.budget is not None and held_out_rows(HELD_OUT, rows) < 2:
        raise CutError(
            f"{_format_budget(choice)} needs a standard error, and so two held-out rows or more; raise calibration_samples to 8"
        )


def budget_margin(quality: Quality, budget: str, limit: float) -> float:
    """How far inside a budget a cut is, with its loss and one standard error; negative if it is outside."""
    value, error = _budgeted_metric(quality, budget)
    return (value - limit if budget == "min_top1_agreement" else limit - value) - error


def _budgeted_metric(quality: Quality, budget: str) -> tuple[float, float]:
    """The figure that a budget limits, and its standard error."""
    name = budget.partition("_")[2]
    return quality.get(name, math.inf), quality.get(f"{name}_stderr", math.inf)


def _format_quality(quality: Quality, budget: str) -> str:
    value, error = _budgeted_metric(quality, budget)
    return f"{value:.3g} ± {error:.2g}"


def _format_budget(choice: SelectionOptions) -> str:
    return f"{choice.budget}={getattr(choice, str(choice.budget))}"


def choose(
    walk: LayerWalk, calibration: CalibrationSet, free: Collection[int], choice: CutOptions, pick: Pick | None = None
) -> Choice:
    """Choose the layers to drop within a budget; a quarter of the calibration rows is held out to judge.

    `free` are the layers that may be dropped. `pick` returns those that a criterion drops, by text and number; by
    default, the best set that a search finds is taken. The repair that was judged comes with the choice.

    Raises:
        CutError: Dropping one layer passes the budget, or there are too few rows to tell.
    """
    check_budget_rows(choice, len(calibration))
    within = _BudgetSearch(Search(walk, calibration, free, choice), choice, pick)
    deepest, judged, rows = within.run(), within.judged, len(within.search.judge_rows)
    if not deepest:
        raise _too_strict_error(choice, *judged[1], rows)
    candidate, quality = judged[deepest]
    why = (
        f"{describe_layers(candidate.drop)} ({candidate.found_by}): the deepest cut found within {_format_budget(choice)}, at "
        f"{_format_quality(quality, within.budget)} on {rows} held-out rows"
        + (f" after the {choice.repair} repair" if choice.repair else "")
    )
    if deepest + 1 in judged:
        why += f"; {deepest + 1} layers have {_format_quality(judged[deepest + 1][1], within.budget)}"
    details = {
        "budget": {within.budget: within.limit},
        "curve": [_curve_point(*judged[count]) for count in sorted(judged)],
        "fitted_rows": len(within.search.fit_rows),
        "judged_rows": rows,
        "repair": choice.repair,
    }
    return Choice(list(candidate.drop), str(choice.criterion), why, [], details, candidate.repair)


class _BudgetSearch:
    """A search for the deepest cut within a budget; `judged` holds the best cut of each number of layers."""

    def __init__(self, search: Search, choice: CutOptions, pick: Pick | None) -> None:
        self.search, self.choice, self.pick = search, choice, pick
        self.budget = str(choice.budget)
        self.limit: float = getattr(choice, self.budget)
        self.judged: dict[int, tuple[Candidate, Quality]] = {}

    def run(self) -> int:
        """Search, and return the number of layers of the deepest cut, or 0 if dropping one is outside the budget."""
        most = self.search.max_drop
        if most < 1:
            raise CutError("no layer of this model may be dropped; protect fewer (protect_first, protect_last)")
        depth = max(1, self.search.walk.num_layers // 4)
        rounds = depth.bit_length() if self.pick else 2
        self.search.log_estimate("the search within the budget", depth, rounds, depth + rounds)
        if self.pick is not None:
            return _search_deepest(lambda count: self._fits(count, str(self.choice.criterion)), 0, most)
        nested = 0
        while nested < most and self._fits(nested + 1, GREEDY):
            nested += 1
        deepest = _search_deepest(lambda count: self._fits(count, BLOCK), nested, most)
        if deepest == nested > 1:
            self._fits(deepest, BLOCK)
        return deepest

    def _fits(self, count: int, found_by: str) -> bool:
        """Find a set of a size and judge it; the better one of a size is kept."""
        try:
            drop = self._find(count, found_by)
            if count in self.judged and self.judged[count][0].drop == drop:
                return self._margin(self.judged[count][1]) >= 0
            (candidate,) = self.search.judge([(drop, found_by)])
        except CutError as error:
            if count == 1:
                raise
            # No set of that size may be dropped, can be repaired, and has a KL.
            logger.info("%s: %s", pluralize(count, "layer"), error)
            return False
        quality = candidate.outcome.quality(self.search.dense)
        logger.info("without %s: %s", describe_layers(candidate.drop), _format_quality(quality, self.budget))
        if count not in self.judged or self._margin(quality) > self._margin(self.judged[count][1]):
            self.judged[count] = candidate, quality
        return self._margin(quality) >= 0

    def _find(self, count: int, found_by: str) -> tuple[int, ...]:
        if self.pick is not None:
            return self.pick(self.search.fit_rows, count)
        if found_by == GREEDY:
            return self.search.nested(count)
        return self.search.best_block(self.search.score_blocks(count), count)

    def _margin(self, quality: Quality) -> float:
        return budget_margin(quality, self.budget, self.limit)


def _search_deepest(fits_budget: Callable[[int], bool], low: int, most: int) -> int:
    """The largest number that is inside, where the smaller ones are; `low` is."""
    step = 1
    while low + step <= most and fits_budget(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits_budget(middle) else (low, middle)
    return low


def _curve_point(candidate: Candidate, quality: Quality) -> dict[str, Any]:
    """A cut that was judged, as a point of a curve in records."""
    return {
        "dropped": len(candidate.drop),
        "layers": format_layers(candidate.drop),
        "found_by": candidate.found_by,
        "repaired" if candidate.repair else "cut": quality,
    }


def _too_strict_error(choice: SelectionOptions, candidate: Candidate, quality: Quality, rows: int) -> CutError:
    limit_text, budget = _format_budget(choice), str(choice.budget)
    limit: float = getattr(choice, budget)
    value, error = _budgeted_metric(quality, budget)
    layer = (
        f"without layer {format_layers(candidate.drop)}, the best found, it is {_format_quality(quality, budget)} on {rows} held-out "
        "rows"
    )
    if budget_margin(quality, budget, limit) + 2 * error >= 0:
        # The standard error should be less than the gap, and a quarter of the rows is held out.
        needed = 4 * (math.ceil(rows * (error / max(abs(limit - value), 1e-12)) ** 2) + 1)
        return CutError(
            f"the calibration set is too small to tell whether any layer can go within {limit_text}: {layer}; about "
            f"{needed} rows are needed (calibration_samples={needed})"
        )
    way_out = "" if choice.repair else ", or choose a repair"
    return CutError(f"no layer can go within {limit_text}: {layer}; allow a larger loss{way_out}")
