"""The criteria: what each is called, what it needs, and where it comes from. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from ..options import bind, find

if TYPE_CHECKING:
    from ..options import ChoiceOptions

VARIANTS = ("published", "paper")


@dataclass(frozen=True)
class Criterion:
    """One way to choose layers. What it computes is in the module of that name.

    Args:
        name (`str`): What people write.
        module (`str`): The file beside this one.
        what (`str`): A few words for tables and plots.
        source (`str`): Where it was published.
        needs (`str`): `"count"`: nothing but the number of layers; `"weights"`; or `"text"`: a calibration set.
        unit (`str`): What its scores are.
        protect (`tuple[int, int]`, defaults to `(0, 0)`): How many layers at the start and at the end its source
            never drops.
        blocks_only (`bool`, defaults to `False`): Whether it scores blocks of neighbouring layers and no single ones.
        has_variant (`bool`, defaults to `True`): Whether arXiv:2411.15558 has computed it.
    """

    name: str
    module: str
    what: str
    source: str
    needs: str
    unit: str
    protect: tuple[int, int] = (0, 0)
    blocks_only: bool = False
    has_variant: bool = True

    def load(self) -> ModuleType:
        """The module that computes it."""
        return import_module(f".{self.module}", __package__)

    def protection(self, choice: ChoiceOptions) -> tuple[int, int]:
        """How many layers at the start and at the end stay: as asked, or as the source has it."""
        own = self.protect if choice.variant == "published" else (0, 0)
        first, last = choice.protect_first, choice.protect_last
        return (own[0] if first is None else first, own[1] if last is None else last)


_PAPER = "arXiv:2411.15558"
_SHORTENED = "Shortened LLaMA, arXiv:2402.02834"

CRITERIA: dict[str, Criterion] = {
    criterion.name: criterion
    for criterion in (
        Criterion("reverse_order", "reverse_order", "last layers first", _PAPER, "count", "rank"),
        Criterion("random", "random", "a draw", _PAPER, "count", "rank"),
        Criterion("magnitude_l1", "magnitude", "size of the weights, l1", _SHORTENED, "weights", "sum of norms", (4, 2)),
        Criterion("magnitude_l2", "magnitude", "size of the weights, l2", _SHORTENED, "weights", "sum of norms", (4, 2)),
        Criterion("taylor", "taylor", "weight times gradient", _SHORTENED, "text", "loss, first order", (4, 2)),
        Criterion("perplexity", "perplexity", "perplexity without it", _SHORTENED, "text", "perplexity"),
        Criterion(
            "block_influence", "block_influence", "how far it turns the states", "ShortGPT, arXiv:2403.03853", "text",
            "1 - cosine",
        ),
        Criterion(
            "angular_distance", "angular_distance", "angle between a block's ends", "Gromov et al., arXiv:2403.17887",
            "text", "angle / pi", blocks_only=True, has_variant=False,
        ),
        Criterion(
            "kl", "kl", "divergence from the dense model without it", "this project", "text", "nats", has_variant=False
        ),
        Criterion(
            "repairability", "repairability", "what a linear map can't make up for",
            "this project, after ReplaceMe, arXiv:2505.02819", "text", "unexplained share", blocks_only=True,
            has_variant=False,
        ),
        Criterion(
            "auto", "auto", "the best of a short list, tried out", "this project", "text", "nats", has_variant=False
        ),
    )
}  # fmt: skip
# What `--criterion all` stands for: `auto` picks among what the others find.
ALL = tuple(name for name in CRITERIA if name != "auto")


def find_criterion(name: str) -> Criterion:
    """Look a criterion up.

    Raises:
        CutError: There is none of that name.
    """
    return CRITERIA[find("criterion", name, CRITERIA)]


bind("criterion", CRITERIA)
bind("variant", VARIANTS)
bind("repair", ("linear", "refit", "magnitude"))
