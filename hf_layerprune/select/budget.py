"""Drop as many layers as an acceptable loss of quality allows, after the repair that will really follow.

First, nested sets grow by a layer at a time until one is outside the budget. Blocks of layers then try to go deeper, in
steps that double until the budget is passed and are bisected. Each set is judged with its repair, on rows that neither
the search nor the repair has seen; only sets that are far inside by the rows they were found on are not judged. A set
is inside the budget if its loss and one standard error together are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ..calibration.rows import CalibrationSet, held_out_rows
from ..errors import CutError
from ..layer_ranges import format_layers, name_layers
from ..options import plural
from ..runtime.walk import LayerWalk
from .scores import Choice
from .search import BLOCK, GREEDY, HELD_OUT, Candidate, Loss, Search

if TYPE_CHECKING:
    from ..options import ChoiceOptions, CutOptions
    from .trials import Outcome

logger = logging.getLogger(__name__)

Pick = Callable[[CalibrationSet, int], tuple[int, ...]]
Probes = dict[int, tuple[Candidate, Loss]]  # the best cut that was judged, by its number of layers


def check_rows(choice: ChoiceOptions, rows: int) -> None:
    """Refuse a budget for which there are too few calibration rows.

    Raises:
        CutError: Fewer than two of them would be held out.
    """
    if choice.budget is not None and held_out_rows(HELD_OUT, rows) < 2:
        raise CutError(
            f"{_said(choice)} needs a standard error, and so two held-out rows or more; raise calibration_samples to 8"
        )


def limit_of(budget: str, value: float) -> float:
    """A budget as the most that a `Loss` may be."""
    if budget == "max_perplexity_ratio":
        return math.log(value)
    return 1 - value if budget == "min_top1_agreement" else value


def _in_unit_of(budget: str, loss: Loss) -> tuple[float, float]:
    """A loss as its budget counts it, and its standard error."""
    if budget == "max_perplexity_ratio":
        ratio = math.exp(min(loss.mean, 700))
        return ratio, ratio * loss.error
    return (1 - loss.mean if budget == "min_top1_agreement" else loss.mean), loss.error


def spell_loss(budget: str, loss: Loss) -> str:
    """A loss as its budget counts it, with its standard error."""
    value, error = _in_unit_of(budget, loss)
    return f"{value:.3g} ± {error:.2g}"


def choose(
    walk: LayerWalk, calibration: CalibrationSet, free: Collection[int], choice: CutOptions, pick: Pick | None = None
) -> Choice:
    """Choose the layers to drop.

    Args:
        walk (`LayerWalk`): The dense model.
        calibration (`CalibrationSet`): The text; a quarter of its rows is held out.
        free (`Collection[int]`): The layers that may be dropped.
        choice (`CutOptions`): The budget, and which repair will follow.
        pick (`Callable`, *optional*): The layers that a criterion drops, by text and number; by default, the best set
            that a search finds.

    Returns:
        `Choice`: The layers, the reason, and the repair that was judged.

    Raises:
        CutError: Dropping one layer passes the budget, or there are too few rows to tell.
    """
    budget = choice.budget
    assert budget is not None, "there is a budget"
    limit = limit_of(budget, getattr(choice, budget))
    check_rows(choice, len(calibration))
    search = Search(walk, calibration, free, choice)
    most = search.most
    if most < 1:
        raise CutError("no layer of this model may be dropped; protect fewer (protect_first, protect_last)")
    depth = max(1, walk.num_layers // 4)
    rounds = depth.bit_length() if pick else 2
    search.announce("the search within the budget", depth, rounds, depth + rounds)
    probes: Probes = {}

    def inside(count: int, found_by: str) -> bool:
        """Find a set of a size and judge it; the better one of a size is kept."""
        try:
            if pick is not None:
                drop = pick(search.fitting, count)
            else:
                drop = search.nested(count) if found_by == GREEDY else search.best_block(count)
            (candidate,) = search.judge([(drop, found_by)])
        except CutError:
            if pick is not None or count == 1:
                raise
            return False  # no set of that size may be dropped and can be repaired
        loss = Loss.of(budget, candidate.outcome, search.dense)
        logger.info("without %s: %s", name_layers(candidate.drop), spell_loss(budget, loss))
        best = probes.get(count)
        if best is None or loss.mean + loss.error < best[1].mean + best[1].error:
            probes[count] = candidate, loss
        return loss.mean + loss.error <= limit

    if pick is not None:
        low = _deepest(lambda count: inside(count, str(choice.criterion)), 0, most)
    else:
        nested = 0
        while nested < most and (search.seems_inside(budget, limit, nested + 1) or inside(nested + 1, GREEDY)):
            nested += 1
        low = _deepest(lambda count: inside(count, BLOCK), nested, most)
        if low == nested:
            while low and low not in probes and not inside(low, GREEDY):
                low -= 1
            if low > 1:
                inside(low, BLOCK)
    if not low:
        raise _too_strict(choice, limit, *probes[1])
    return _chosen(low, probes, search, choice, limit)


def _said(choice: ChoiceOptions) -> str:
    return f"{choice.budget}={getattr(choice, str(choice.budget)):g}"


def _chosen(low: int, probes: Probes, search: Search, choice: CutOptions, limit: float) -> Choice:
    """The deepest cut that is inside, and what is known of the next number of layers."""
    budget, said, high = str(choice.budget), _said(choice), low + 1
    candidate, loss = probes[low]
    if high in probes and probes[high][1].mean <= limit:
        nearly = probes[high][1]
        logger.warning(
            "%s may be within %s as well (%s); calibration_samples=%d would tell", plural(high, "layer"), said,
            spell_loss(budget, nearly), 4 * nearly.rows_needed(limit - nearly.mean),
        )  # fmt: skip
    why = (
        f"{name_layers(candidate.drop)} ({candidate.found_by}): the deepest cut found within {said}, at "
        f"{spell_loss(budget, loss)} on {loss.rows} held-out rows"
        + (f" after the {choice.repair} repair" if choice.repair else "")
    )
    if high in probes:
        why += f"; {high} layers have {spell_loss(budget, probes[high][1])}"
    details = {
        "budget": {budget: getattr(choice, budget)},
        "curve": [point(*probes[count], search) for count in sorted(probes)],
        "fitted_rows": len(search.fitting),
        "judged_rows": len(search.judging),
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


def point(candidate: Candidate, loss: Loss, search: Search) -> dict[str, Any]:
    """A cut that was judged, as an entry for records."""
    outcome = candidate.outcome
    return {
        "dropped": len(candidate.drop),
        "layers": format_layers(candidate.drop),
        "found_by": candidate.found_by,
        "repaired" if candidate.repair else "cut": quality(outcome, search.dense),
    }


def quality(outcome: Outcome, dense: Outcome) -> dict[str, float]:
    """What a cut does to the model, with standard errors over rows."""
    found: dict[str, float] = {}
    for budget in ("max_kl", "max_perplexity_ratio", "min_top1_agreement"):
        name = budget.partition("_")[2]
        found[name], found[f"{name}_stderr"] = _in_unit_of(budget, Loss.of(budget, outcome, dense))
    return {name: round(value, 6) for name, value in found.items() if math.isfinite(value)}


def _too_strict(choice: ChoiceOptions, limit: float, candidate: Candidate, loss: Loss) -> CutError:
    said, value = _said(choice), spell_loss(str(choice.budget), loss)
    layer = (
        f"without layer {format_layers(candidate.drop)}, the best found, it is {value} on {loss.rows} held-out rows"
    )
    if loss.mean - loss.error <= limit:
        rows = 4 * loss.rows_needed(abs(limit - loss.mean))
        return CutError(
            f"the calibration set is too small to tell whether any layer can go within {said}: {layer}; about "
            f"{rows} rows are needed (calibration_samples={rows})"
        )
    way_out = "" if choice.repair else ", or choose a repair"
    return CutError(f"no layer can go within {said}: {layer}; allow a larger loss{way_out}")
