"""Auto: build a short list cheaply, evaluate the best few candidates, and explain the choice.

Candidates are judged by the KL divergence of the cut model's next-token distribution from the dense model's, after the
repair if one will follow (or the one that its registry entry names for this, if it is slow), on held-out text. The
short list, of the best blocks and a set of layers that go one after the other, uses the same measure on fewer rows, see
`search.py`.

Neither the KL of the unrepaired cut nor the share that a map leaves unexplained is enough to find the best repaired
block; docs/experiments.md has the comparison.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from ..calibration.rows import CalibrationSet
from ..layer_ranges import describe_layers, format_layers
from ..repair.registry import find_repair
from ..runtime.walk import LayerWalk
from .scores import Choice
from .search import BLOCK, GREEDY, Search

if TYPE_CHECKING:
    from ..options import SelectionOptions

logger = logging.getLogger(__name__)

_SHORT_LIST = 3


def choose(
    walk: LayerWalk, calibration: CalibrationSet, count: int, free: Collection[int], choice: SelectionOptions
) -> Choice:
    """Choose `count` of the `free` layers; a quarter of the calibration rows is held out to evaluate the short list.

    Raises:
        CutError: No set of `count` layers may be dropped, or there are too few rows.
    """
    if choice.repair:
        choice = replace(choice, repair=find_repair(choice.repair).judged_by or choice.repair)
    search = Search(walk, calibration, free, choice)
    blocks, nested = search.find_sets(count)
    sets = dict.fromkeys(islice(blocks, _SHORT_LIST), BLOCK)
    if nested is not None:
        sets.setdefault(nested, GREEDY)
    logger.info("short list: %s", "; ".join(map(format_layers, sets)))
    judged, rows = search.judge(sets.items()), len(search.judge_rows)
    details = {
        "short_list": [
            {
                "layers": format_layers(one.drop),
                "found_by": one.found_by,
                "kl": round(one.outcome.kl, 5),
                "perplexity": round(one.outcome.perplexity, 4),
            }
            for one in judged
        ],
        "fitted_rows": len(search.fit_rows),
        "judged_rows": rows,
        "repair": choice.repair,
    }
    best, *others = judged
    state = f"cut and {choice.repair} repair" if choice.repair else "cut"
    why = (
        f"{describe_layers(best.drop)} ({best.found_by}): after the {state}, KL to the dense model is {best.outcome.kl:.3g} nats on "
        f"{rows} held-out rows"
    ) + "".join(f"; {format_layers(one.drop)} ({one.found_by}) has {one.outcome.kl:.3g}" for one in others)
    return Choice(list(best.drop), "auto", why, details=details)
