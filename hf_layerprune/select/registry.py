"""The criteria: what each is called, what it needs, and where it comes from. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ..options import bind, find
from ..repair.registry import REPAIRS

if TYPE_CHECKING:
    from ..options import ChoiceOptions

ORIGINAL, PAPER = "original", "paper"
VARIANTS = (ORIGINAL, PAPER)

# What the module of each kind of criterion defines.
KINDS = {
    "count": "order(num_layers, count, seed, variant): all layers, the first to go first",
    "weights": "observer(criterion, variant, num_layers, lengths): a `passes.Observer` that looks at no states",
    "states": "observer(criterion, variant, num_layers, lengths): a `passes.Observer` of the dense model",
    "trial": "score(outcome): a number for what a `trials.Trial` does to the model",
    "passes": "score(walk, calibration, variant, alive): `Scores`, from passes over the model of its own",
    "choice": "choose(walk, calibration, count, free, choice): a `runner.Choice`, by no score",
}


@dataclass(frozen=True)
class Criterion:
    """One way to choose layers. What it computes is in the module of that name.

    Args:
        name (`str`): What people write.
        module (`str`): The file beside this one.
        kind (`str`): One of `KINDS`: what the module defines, and with it what the criterion needs.
        what (`str`): A few words for tables and plots.
        source (`str`): Where it was published.
        unit (`str`): What its scores are.
        protect (`tuple[int, int]`, defaults to `(0, 0)`): How many layers at the start and at the end its source
            never drops.
        blocks_only (`bool`, defaults to `False`): Whether it scores blocks of neighbouring layers and no single ones.
        has_variant (`bool`, defaults to `False`): Whether arXiv:2411.15558 has computed it.
    """

    name: str
    module: str
    kind: str
    what: str
    source: str
    unit: str
    protect: tuple[int, int] = (0, 0)
    blocks_only: bool = False
    has_variant: bool = False

    @property
    def needs(self) -> str:
        """`"count"`: nothing but the number of layers; `"weights"`; or `"text"`: a calibration set."""
        return self.kind if self.kind in ("count", "weights") else "text"

    def load(self) -> ModuleType:
        """The module that computes it."""
        return import_module(f".{self.module}", __package__)

    def variant(self, asked: str) -> str:
        """The variant that is computed where one is asked for."""
        return asked if self.has_variant else ORIGINAL

    def protection(self, choice: ChoiceOptions) -> tuple[int, int]:
        """How many layers at the start and at the end stay: as asked, or as the source has it."""
        own = self.protect if choice.variant == ORIGINAL else (0, 0)
        first, last = choice.protect_first, choice.protect_last
        return (own[0] if first is None else first, own[1] if last is None else last)


_PAPER = "arXiv:2411.15558"
_SHORTENED = "Shortened LLaMA, arXiv:2402.02834"

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("reverse_order", "reverse_order", "count", "last layers first", _PAPER, "rank", has_variant=True),
        Criterion("random", "random", "count", "a draw", _PAPER, "rank", has_variant=True),
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
            "perplexity", "perplexity", "trial", "perplexity without it", _SHORTENED, "perplexity", has_variant=True
        ),
        Criterion(
            "block_influence", "block_influence", "states", "how far it turns the states",
            "ShortGPT, arXiv:2403.03853", "1 - cosine", has_variant=True,
        ),
        Criterion(
            "angular_distance", "angular_distance", "states", "angle between a block's ends",
            "Gromov et al., arXiv:2403.17887", "angle / pi", blocks_only=True,
        ),
        Criterion("kl", "kl", "trial", "divergence from the dense model without it", "this project", "nats"),
        Criterion(
            "repairability", "repairability", "states", "what a linear map can't make up for",
            "this project, after ReplaceMe, arXiv:2505.02819", "unexplained share", blocks_only=True,
        ),
        Criterion("auto", "auto", "choice", "the best of a short list, tried out", "this project", "nats"),
    )
}  # fmt: skip
# What `--criterion all` stands for: `auto` picks among what the others find.
ALL = tuple(name for name, criterion in CRITERIA.items() if criterion.kind != "choice")


def find_criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises:
        CutError: There is none of that name.
    """
    return CRITERIA[find("criterion", name, CRITERIA)]


bind("criterion", CRITERIA)
bind("variant", VARIANTS)
bind("repair", REPAIRS)
