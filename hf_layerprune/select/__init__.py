"""Choose which decoder layers to drop.

    from hf_layerprune.options import CutOptions
    from hf_layerprune.select.runner import choose_layers

    choice = choose_layers(model, calibration, CutOptions(drop=0.25, criterion="auto"))
    choice.drop_layers, choice.why

Each criterion has its own file and one entry in `registry.py`. `runner.py` computes all requested criteria in a shared
pass over the model, and `sets.py` turns scores into a set of layers.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from ..errors import CutError
from ..options import CutOptions, copy_fields, drop_exactly
from .registry import ALL, CRITERIA, find_criterion
from .scores import Scores
from .sets import drop_count, free_layers

if TYPE_CHECKING:
    from .targets import Target

__all__ = ["ALL", "CRITERIA", "drop_count", "find_criterion", "needs_model", "select_layers"]


def needs_model(choice: CutOptions) -> bool:
    """Whether choosing the layers takes the model itself, and not just their number and sizes.

    Raises:
        CutError: The criterion does not exist.
    """
    if choice.drop_layers is not None:
        return False
    measured = choice.budget is not None or choice.target == "target_speedup"
    return measured or find_criterion(choice.criterion).needs != "count"


def select_layers(
    num_layers: int, choice: CutOptions, protected: Collection[int] = (), target: Target | None = None
) -> list[int]:
    """Choose the layers to drop with a criterion that needs only the number of layers.

    Args:
        num_layers (`int`): Number of decoder layers.
        choice (`CutOptions`): How many layers to drop, and by which criterion. With `contiguous`, the block with the
            lowest sum of its layers' ranks is chosen.
        protected (`Collection[int]`): Other layers that the architecture requires to stay.
        target (`Target`, *optional*): What must be left, if that says how many.

    Raises:
        CutError: The criterion needs the model, too few layers may be dropped, or the target can't be met.
    """
    criterion = find_criterion(choice.criterion)
    if needs_model(choice):
        raise CutError(f"criterion {choice.criterion!r} needs the model; use choose_layers")
    count = 1 if choice.drop is None else drop_count(choice.drop, num_layers)
    free = free_layers(num_layers, count, *criterion.protected_ends(choice), protected)
    if choice.target is not None:
        assert target is not None, "it is passed"

        def pick(count: int) -> list[int]:
            return select_layers(num_layers, copy_fields(CutOptions, choice, **drop_exactly(count)), protected)

        return pick(target.choose_count(num_layers, free, pick))
    order = criterion.load().order(num_layers, count, choice.seed, choice.variant)
    return Scores.from_order(criterion.name, choice.variant, order, num_layers).pick(count, free, choice.contiguous)
