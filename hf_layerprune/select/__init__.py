"""Choose which decoder layers to drop.

    from hf_layerprune.options import CutOptions
    from hf_layerprune.select import choose_layers, score_layers

    choice = choose_layers(model, calibration, CutOptions(drop=0.25, criterion="auto"))
    choice.drop_layers, choice.why

A criterion is a file of its own, and a line in `registry.py`. `runner.py` walks the model once for all that are asked
for, `sets.py` turns scores into layers.
"""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import CutError
from .registry import ALL, CRITERIA, Criterion, find_criterion
from .sets import drop_count, free_layers, lowest_block, neighbours

if TYPE_CHECKING:
    from ..options import CutOptions
    from .runner import Choice, choose_layers, score_layers
    from .scores import Scores

__all__ = [
    "ALL",
    "CRITERIA",
    "Choice",
    "Criterion",
    "Scores",
    "choose_layers",
    "drop_count",
    "find_criterion",
    "needs_model",
    "score_layers",
    "select_layers",
]

# Loaded on first use: each of them imports torch.
_LAZY = {"Choice": ".runner", "choose_layers": ".runner", "score_layers": ".runner", "Scores": ".scores"}


def needs_model(criterion: str) -> bool:
    """Whether a criterion has to look at the model, and not only at how many layers it has.

    Raises:
        CutError: There is no such criterion.
    """
    return find_criterion(criterion).needs != "count"


def select_layers(num_layers: int, choice: CutOptions, protected: Collection[int] = ()) -> list[int]:
    """Choose the layers to drop by a criterion that looks at nothing but their number.

    Args:
        num_layers (`int`): Number of decoder layers.
        choice (`CutOptions`): How many go, by which criterion. A contiguous choice is the block that goes first by the
            sum of its layers' ranks.
        protected (`Collection[int]`): Further layers that must stay, as the architecture demands.

    Returns:
        `list[int]`: Base indices, ascending.

    Raises:
        CutError: The criterion looks at the model, or more layers would go than may.
    """
    count = drop_count(choice.drop, num_layers)
    criterion = find_criterion(choice.criterion)
    if needs_model(choice.criterion):
        raise CutError(f"criterion {choice.criterion!r} looks at the model; use choose_layers")
    free = free_layers(num_layers, count, *criterion.protection(choice), protected)
    order = criterion.load().order(num_layers, count, choice.seed, choice.variant)
    if not choice.contiguous:
        return sorted([i for i in order if i in free][:count])
    rank = {layer: position for position, layer in enumerate(order)}
    blocks = neighbours(range(num_layers), count)
    return lowest_block({block: sum(rank[i] for i in block) for block in blocks}, count, free)


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
