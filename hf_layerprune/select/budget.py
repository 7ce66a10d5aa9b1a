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
Figures = Mapping[str, float]  # see `Outcome.quality`


def check_rows(choice: SelectionOptions, rows: int) -> None:
    """Refuse a budget for which there are too few calibration rows.

    Raises:
        CutError: Fewer than two of them would be held out.
    """
    if choice.budget is not None and held_out_rows(HELD_OUT, rows) < 2:
        raise CutError(
            f"{_said(choice)} needs a standard error, and so two held-out rows or more; raise calibration_samples to 8"
        )


def room(figures: Figures, budget: str, limit: float) -> float:
    """How far inside a budget a cut is, with its loss and one standard error; negative if it is outside."""
    figure, error = _limited(figures, budget)
    return (figure - limit if budget == "min_top1_agreement" else limit - figure) - error


def _limited(figures: Figures, budget: str) -> tuple[float, float]:
    """The figure that a budget limits, and its standard error."""
    name = budget.partition("_")[2]
    return figures.get(name, math.inf), figures.get(f"{name}_stderr", math.inf)


def _spelled(figures: Figures, budget: str) -> str:
    figure, error = _limited(figures, budget)
    return f"{figure:.3g} ± {error:.2g}"


def _said(choice: SelectionOptions) -> str:
    return f"{choice.budget}={getattr(choice, str(choice.budget)):g}"


def choose(
    walk: LayerWalk, calibration: CalibrationSet, free: Collection[int], choice: CutOptions, pick: Pick | None = None
) -> Choice:
    """Choose the layers to drop within a budget; a quarter of the calibration rows is held out to judge.

    `free` are the layers that may be dropped. `pick` returns those that a criterion drops, by text and number; by
    default, the best set that a search finds is taken. The repair that was judged comes with the choice.

    Raises:
        CutError: Dropping one layer passes the budget, or there are too few rows to tell.
    """
    budget = str(choice.budget)
    limit: float = getattr(choice, budget)
    check_rows(choice, len(calibration))
    search = Search(walk, calibration, free, choice)
    most = search.most
    if most < 1:
        raise CutError("no layer of this model may be dropped; protect fewer (protect_first, protect_last)")
    depth = max(1, walk.num_layers // 4)
    rounds = depth.bit_length() if pick else 2
    search.announce("the search within the budget", depth, rounds, depth + rounds)
    judged: dict[int, tuple[Candidate, Figures]] = {}  # the best cut of each number of layers

    def inside(count: int, found_by: str) -> bool:
        """Find a set of a size and judge it; the better one of a size is kept."""
        try:
            if pick is not None:
                drop = pick(search.fitting, count)
            elif found_by == GREEDY:
                drop = search.nested(count)
            else:
                drop = search.lowest(search.blocks(count), count)
            if count in judged and judged[count][0].drop == drop:
                return room(judged[count][1], budget, limit) >= 0
            (candidate,) = search.judge([(drop, found_by)])
        except CutError as error:
            if count == 1:
                raise
            # No set of that size may be dropped, can be repaired, and has a KL.
            logger.info("%s: %s", pluralize(count, "layer"), error)
            return False
        figures = candidate.outcome.quality(search.dense)
        logger.info("without %s: %s", describe_layers(candidate.drop), _spelled(figures, budget))
        left = room(figures, budget, limit)
        if count not in judged or left > room(judged[count][1], budget, limit):
            judged[count] = candidate, figures
        return left >= 0

    if pick is not None:
        low = _deepest(lambda count: inside(count, str(choice.criterion)), 0, most)
    else:
        nested = 0
        while nested < most and inside(nested + 1, GREEDY):
            nested += 1
        low = _deepest(lambda count: inside(count, BLOCK), nested, most)
        if low == nested > 1:
            inside(low, BLOCK)
    rows = len(search.judging)
    if not low:
        raise _too_strict(choice, *judged[1], rows)
    candidate, figures = judged[low]
    why = (
        f"{describe_layers(candidate.drop)} ({candidate.found_by}): the deepest cut found within {_said(choice)}, at "
        f"{_spelled(figures, budget)} on {rows} held-out rows"
        + (f" after the {choice.repair} repair" if choice.repair else "")
    )
    if low + 1 in judged:
        why += f"; {low + 1} layers have {_spelled(judged[low + 1][1], budget)}"
    details = {
        "budget": {budget: limit},
        "curve": [_point(*judged[count]) for count in sorted(judged)],
        "fitted_rows": len(search.fitting),
        "judged_rows": rows,
        "repair": choice.repair,
    }
    return Choice(list(candidate.drop), str(choice.criterion), why, [], details, candidate.repair)


def _deepest(inside: Callable[[int], bool], low: int, most: int) -> int:
    """The largest number that is inside, where the smaller ones are; `low` is."""
    step = 1
    while low + step <= most and inside(low + step):
        low, step = low + step, 2 * step
    high = min(low + step, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    return low


def _point(candidate: Candidate, figures: Figures) -> dict[str, Any]:
    """A cut that was judged, as a point of a curve in records."""
    return {
        "dropped": len(candidate.drop),
        "layers": format_layers(candidate.drop),
        "found_by": candidate.found_by,
        "repaired" if candidate.repair else "cut": figures,
    }


def _too_strict(choice: SelectionOptions, candidate: Candidate, figures: Figures, rows: int) -> CutError:
    said, budget = _said(choice), str(choice.budget)
    limit: float = getattr(choice, budget)
    figure, error = _limited(figures, budget)
    layer = (
        f"without layer {format_layers(candidate.drop)}, the best found, it is {_spelled(figures, budget)} on {rows} held-out "
        "rows"
    )
    if room(figures, budget, limit) + 2 * error >= 0:
        # The standard error should be less than the gap, and a quarter of the rows is held out.
        needed = 4 * (math.ceil(rows * (error / max(abs(limit - figure), 1e-12)) ** 2) + 1)
        return CutError(
            f"the calibration set is too small to tell whether any layer can go within {said}: {layer}; about "
            f"{needed} rows are needed (calibration_samples={needed})"
        )
    way_out = "" if choice.repair else ", or choose a repair"
    return CutError(f"no layer can go within {said}: {layer}; allow a larger loss{way_out}")
