"""Drop as many layers as an acceptable loss of quality allows, after the repair that will really follow.

The number of layers doubles until the budget is passed, and is then bisected. At each number, the best set is found on
some rows, its repair is fitted, and its loss is measured on rows that neither has seen. A set is inside the budget if
its loss and one standard error together are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from ..calibration.rows import CalibrationSet
from ..errors import CutError
from ..layer_ranges import format_layers
from ..runtime.walk import LayerWalk
from .choice import Choice
from .cost import announce
from .search import Candidate, Loss, Search

if TYPE_CHECKING:
    from ..options import CutOptions

logger = logging.getLogger(__name__)

Pick = Callable[[CalibrationSet, int], tuple[int, ...]]


def limit_of(budget: str, value: float) -> float:
    """A budget as the most that a `Loss` may be."""
    if budget == "max_perplexity_ratio":
        return math.log(value)
    return 1 - value if budget == "min_top1_agreement" else value


def spell_loss(budget: str, loss: Loss) -> str:
    """A loss as its budget counts it, with its standard error."""
    value, error = loss.mean, loss.error
    if budget == "max_perplexity_ratio":
        value, error = math.exp(min(value, 700)), math.exp(min(value, 700)) * error
    elif budget == "min_top1_agreement":
        value = 1 - value
    return f"{value:.3g} ± {error:.2g}"


def choose(
    walk: LayerWalk,
    calibration: CalibrationSet,
    free: Collection[int],
    choice: CutOptions,
    pick: Pick | None = None,
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
    said = f"{budget}={getattr(choice, budget):g}"
    search = Search(walk, calibration, free, choice)
    if len(search.judging) < 2:
        raise CutError(
            f"{said} needs a standard error, and so two held-out rows or more; raise calibration_samples to 8"
        )
    most = search.most
    depth = max(1, walk.num_layers // 4)
    announce(walk, search.judging, search.layer_runs(depth, 2 + most.bit_length()), "the search within the budget")
    probes: dict[int, tuple[Candidate, Loss]] = {}

    def inside(count: int) -> bool:
        if count not in probes:
            best = search.best(count) if pick is None else (pick(search.fitting, count), str(choice.criterion))
            (candidate,) = search.judge([best])
            loss = Loss.of(budget, candidate.outcome, search.dense)
            probes[count] = candidate, loss
            logger.info("without layers %s: %s", format_layers(candidate.drop), spell_loss(budget, loss))
        loss = probes[count][1]
        return loss.mean + loss.error <= limit

    if most < 1:
        raise CutError("no layer may be dropped from this model; protect fewer")
    if not inside(1):
        raise _too_strict(budget, said, limit, *probes[1])
    low, high = 1, 2
    while high <= most and inside(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if inside(middle) else (low, middle)
    candidate, loss = probes[low]
    if high in probes and probes[high][1].mean <= limit:
        nearly = probes[high][1]
        logger.warning(
            "%d layers may be within %s as well (%s); calibration_samples=%d would tell", high, said,
            spell_loss(budget, nearly), 4 * nearly.rows_needed(limit - nearly.mean),
        )  # fmt: skip
    why = (
        f"layers {format_layers(candidate.drop)} ({candidate.found_by}): the deepest cut found within {said}, at "
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


def point(candidate: Candidate, loss: Loss, search: Search) -> dict[str, Any]:
    """A cut that was judged, as an entry for records."""
    outcome = candidate.outcome
    return {
        "dropped": len(candidate.drop),
        "layers": format_layers(candidate.drop),
        "found_by": candidate.found_by,
        "repaired" if candidate.repair else "cut": quality(outcome, search.dense),
    }


def quality(outcome: Any, dense: Any) -> dict[str, float]:
    """What a cut does to the model, with standard errors over rows."""
    kl, ratio, agreement = (
        Loss.of(name, outcome, dense) for name in ("max_kl", "max_perplexity_ratio", "min_top1_agreement")
    )
    found = {
        "kl": kl.mean,
        "kl_stderr": kl.error,
        "perplexity_ratio": math.exp(min(ratio.mean, 700)),
        "perplexity_ratio_stderr": math.exp(min(ratio.mean, 700)) * ratio.error,
        "top1_agreement": 1 - agreement.mean,
        "top1_agreement_stderr": agreement.error,
    }
    return {name: round(value, 6) for name, value in found.items() if math.isfinite(value)}


def _too_strict(budget: str, said: str, limit: float, candidate: Candidate, loss: Loss) -> CutError:
    layer = f"layer {format_layers(candidate.drop)}, the best found, costs {spell_loss(budget, loss)} on {loss.rows} held-out rows"
    if loss.mean - loss.error <= limit:
        rows = 4 * loss.rows_needed(abs(limit - loss.mean))
        return CutError(
            f"the calibration set is too small to tell whether any layer can go within {said}: {layer}; about "
            f"{rows} rows are needed (calibration_samples={rows})"
        )
    return CutError(f"{said} is stricter than what dropping one layer costs: {layer}; allow more, or choose a repair")
