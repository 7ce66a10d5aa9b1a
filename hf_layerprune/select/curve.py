"""Quality against the number of layers that are dropped: for each number, the best set found, with and without repair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..layer_ranges import format_layers
from ..records.curve import quality_of
from .budget import quality
from .search import Search, changes_of
from .trials import Trial, try_out


def curve_points(search: Search, up_to: int, done: int = 0) -> Iterator[dict[str, Any]]:
    """Find and judge the best set of each size.

    Args:
        search (`Search`): The search.
        up_to (`int`): The most layers to drop.
        done (`int`, defaults to 0): Sizes that have been judged before.

    Yields:
        `dict[str, Any]`: For each size: how many layers, which, what found them, and the quality of the `cut` and of
            what is `repaired`.
    """
    for count in range(done + 1, up_to + 1):
        drop, found_by = search.best(count)
        repair = search.fit(drop)
        trials = [Trial(drop), *([Trial(drop, changes_of(repair))] if repair else [])]
        outcomes = try_out(search.walk, search.judging, trials)
        measured = zip(("cut", "repaired"), outcomes, strict=False)
        yield {
            "dropped": count,
            "layers": format_layers(drop),
            "found_by": found_by,
            **{name: quality(outcome, search.dense) for name, outcome in measured},
        }


def knee(points: list[dict[str, Any]]) -> int | None:
    """The number of layers behind which quality falls off: the point that is farthest below the chord of the curve."""
    kls = [0.0, *(quality_of(point)["kl"] for point in points)]
    if len(kls) < 4 or kls[-1] <= 0:
        return None
    last = len(kls) - 1
    below = [i / last - kl / kls[-1] for i, kl in enumerate(kls)]
    best = max(range(len(kls)), key=below.__getitem__)
    return best if 0 < best < last and below[best] > 0.05 else None
