"""The criteria: name, requirements and source of each. This module does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ..options import check_choice, set_choices
from ..repair.registry import REPAIRS

if TYPE_CHECKING:
    from ..options import SelectionOptions

ORIGINAL, PAPER = "original", "paper"
VARIANTS = (ORIGINAL, PAPER)

# What a criterion's module must define, by kind.
KINDS = {
    "count": "order(num_layers, count, seed, variant): all layers, in the order in which to drop them",
    "weights": "observer(criterion, variant, num_layers, lengths): a `passes.Observer` that needs weights only",
    "states": "observer(criterion, variant, num_layers, lengths): a `passes.Observer` that needs hidden states",
    "trial": "Outcome(...): has the number under the criterion's name, see `trials.Outcome`",
    "passes": "score(walk, calibration, variant, alive): `Scores`, from its own passes over the model",
    "choice": "choose(walk, calibration, count, free, choice): a `scores.Choice`, made without scores",
}


@dataclass(frozen=True)
class Criterion:
    """A way to choose layers.

    Args:
        name (`str`): Its name in options and records.
        module (`str`): The module in this package that computes it.
        kind (`str`): One of `KINDS`: what the module defines, and so what the criterion needs.
        description (`str`): A short description for tables and plots.
        source (`str`): The publication it comes from.
        unit (`str`): The unit of its scores.
        protect (`tuple[int, int]`, defaults to `(0, 0)`): How many layers at the start and at the end its source
            never drops.
        blocks_only (`bool`, defaults to `False`): Whether it scores blocks of contiguous layers only.
        has_variant (`bool`, defaults to `False`): Whether arXiv:2411.15558 computes it, so a `"paper"` variant exists.
    """

    name: str
    module: str
    kind: str
    description: str
    source: str
    unit: str
    protect: tuple[int, int] = (0, 0)
    blocks_only: bool = False
    has_variant: bool = False

    @property
    def needs(self) -> str:
        """`"count"`: only the number of layers; `"weights"`: the weights; `"text"`: a calibration set."""
        return self.kind if self.kind in ("count", "weights") else "text"

    def load(self) -> ModuleType:
        return import_module(f".{self.module}", __package__)

    def variant(self, requested: str) -> str:
        """The variant to compute for `requested`: `"original"` if the criterion has no other."""
        return requested if self.has_variant else ORIGINAL

    def scores_blocks(self, contiguous: bool) -> bool:
        """Whether it scores each block, instead of adding up the ranks or scores of the layers in it."""
        return self.blocks_only or (contiguous and self.kind == "trial")

    def protected_ends(self, choice: SelectionOptions) -> tuple[int, int]:
        """How many layers at the start and at the end must stay: as requested, or as in the source."""
        own = self.protect if choice.variant == ORIGINAL else (0, 0)
        first, last = choice.protect_first, choice.protect_last
        return (own[0] if first is None else first, own[1] if last is None else last)


PAPER_SOURCE = "arXiv:2411.15558"  # its code computes the variant `paper`
_SHORTENED = "Shortened LLaMA, arXiv:2402.02834"

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("reverse_order", "reverse_order", "count", "last layers first", PAPER_SOURCE, "rank", has_variant=True),
        Criterion("random", "random", "count", "random order", PAPER_SOURCE, "rank", has_variant=True),
        Criterion(
            "magnitude_l1", "magnitude", "weights", "size of the weights, l1", _SHORTENED, "sum of norms", (4, 2),
            has_variant=True,
        ),
        Criterion(
            "magnitude_l2", "magnitude", "weights", "size of the weights, l2", _SHORTENED, "sum of norms", (4, 2),
            has_variant=True,
        ),
        Criterion(
            "taylor", "taylor", "passes", "weight times gradient", _SHORTENED, "loss, first order", (4, 2),
            has_variant=True,
        ),
        Criterion(
            "perplexity", "trials", "trial", "perplexity without it", _SHORTENED, "perplexity", has_variant=True
        ),
        Criterion(
            "block_influence", "block_influence", "states", "change of direction of the hidden states",
            "ShortGPT, arXiv:2403.03853", "1 - cosine", has_variant=True,
        ),
        Criterion(
            "angular_distance", "angular_distance", "states", "angle between the states before and after a block",
            "Gromov et al., arXiv:2403.17887", "angle / pi", blocks_only=True,
        ),
        Criterion("kl", "trials", "trial", "KL to the dense model without it", "this project", "nats"),
        Criterion(
            "repairability", "repairability", "states", "error left by a linear map",
            "this project, after ReplaceMe, arXiv:2505.02819", "unexplained share", blocks_only=True,
        ),
        Criterion("auto", "auto", "choice", "the best of an evaluated short list", "this project", "nats"),
    )
}  # fmt: skip
# What `--criterion all` means; `auto` is left out, since it gives no scores.
ALL = tuple(name for name, criterion in CRITERIA.items() if criterion.kind != "choice")


def find_criterion(name: str | None) -> Criterion:
    """Look up a criterion by name.

    Raises:
        CutError: The criterion does not exist.
    """
    return CRITERIA[check_choice("criterion", name, CRITERIA)]


set_choices("criterion", CRITERIA)
set_choices("variant", VARIANTS)
set_choices("repair", REPAIRS)
