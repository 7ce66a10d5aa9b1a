"""Score layers by any number of criteria, and choose which to drop.

What several criteria need is done once: all that look at the dense model look at the same pass, and perplexity and KL
are read off the same trials.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..calibration.rows import CalibrationSet, check_vocabulary
from ..errors import CutError
from ..layer_ranges import format_layers
from ..runtime.walk import LayerWalk
from . import ALL, CRITERIA, drop_count, find_criterion
from .passes import Observer, read_weights, run_pass
from .registry import VARIANTS, Criterion
from .repairability import Repairability
from .scores import Scores
from .sets import free_layers, neighbours, rounds
from .trials import Cut, try_cuts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..options import CutOptions

logger = logging.getLogger(__name__)

_TRIED = ("perplexity", "kl")


@dataclass
class Choice:
    """Which layers to drop, and why.

    Args:
        drop_layers (`list[int]`): Base indices, ascending.
        criterion (`str`): What chose them.
        why (`str`): One sentence.
        scores (`list[Scores]`): What it looked at, one for each round and criterion.
        details (`dict[str, Any]`): What else belongs in a record, such as the short list of `auto`.
    """

    drop_layers: list[int]
    criterion: str
    why: str
    scores: list[Scores] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """For the lineage."""
        found = {"criterion": self.criterion, "why": self.why} | self.details
        if len(self.scores) == 1 and self.scores[0].layers is not None:  # in one round: what the choice was made by
            found["scores"] = self.scores[0].record()
        return found


def score_layers(
    model: PreTrainedModel | LayerWalk,
    calibration: CalibrationSet | None,
    criteria: Sequence[str] = ALL,
    *,
    variant: str = "published",
    drop: float | int = 0.25,
    lengths: Collection[int] | None = None,
    gone: Collection[int] = (),
    seed: int = 42,
) -> dict[str, Scores]:
    """Score the layers of a model by several criteria, with the work shared.

    Args:
        model (`PreTrainedModel` or `LayerWalk`): The dense model. It is left as it is.
        calibration (`CalibrationSet`, *optional*): The text; not needed by criteria that look at no text.
        criteria (`Sequence[str]`, defaults to all but `"auto"`): Names.
        variant (`str`, defaults to `"published"`): `"published"`, or `"paper"`: as arXiv:2411.15558 computed it, for
            the criteria that it did.
        drop (`float` or `int`, defaults to 0.25): How many layers should go: the length of the blocks.
        lengths (`Collection[int]`, *optional*): Score blocks of these lengths, also by perplexity and KL. By default
            only repairability and the angular distance score blocks, the first of `drop` layers, the second of any
            length.
        gone (`Collection[int]`): Layers that were dropped before.
        seed (`int`, defaults to 42): For criteria that draw.

    Returns:
        `dict[str, Scores]`: By name.

    Raises:
        CutError: A criterion does not exist, or a setting makes no sense.
        CheckpointError: The calibration set is of another model, or a score is no number.
        UnsupportedModelError: The model's layers can't be run one at a time.
    """
    if variant not in VARIANTS:
        raise CutError(f"variant={variant!r} is unknown; it may be {' or '.join(VARIANTS)}")
    found = [find_criterion(name) for name in dict.fromkeys(criteria)]
    if any(criterion.name == "auto" for criterion in found):
        raise CutError("auto is no score of its own; use choose_layers")
    num_layers = len(_layers(model))
    alive = [i for i in range(num_layers) if i not in set(gone)]
    count = drop_count(drop, num_layers)
    work = _Work(model, calibration, variant, alive, count, lengths)
    names = {criterion.name for criterion in found}
    scores: dict[str, Scores] = {}
    for criterion in found:
        if criterion.needs == "count":
            scores[criterion.name] = _ranks(criterion, variant, num_layers, alive, count, seed)
    scores |= work.observed([criterion for criterion in found if criterion.name not in (*_TRIED, "taylor", *scores)])
    if "taylor" in names:
        from . import taylor

        scores["taylor"] = taylor.score(work.walk, work.text("taylor"), _variant(CRITERIA["taylor"], variant), alive)
    scores |= work.tried([criterion for criterion in found if criterion.name in _TRIED])
    return {criterion.name: scores[criterion.name] for criterion in found}


def choose_layers(
    model: PreTrainedModel | LayerWalk,
    calibration: CalibrationSet | None,
    choice: CutOptions,
    *,
    protected: Collection[int] = (),
) -> Choice:
    """Choose the layers to drop.

    Args:
        model (`PreTrainedModel` or `LayerWalk`): The dense model. It is left as it is.
        calibration (`CalibrationSet`, *optional*): The text; not needed by criteria that look at no text.
        choice (`CutOptions`): How many go, and by which criterion. `"auto"` takes the repair that will follow into
            account.
        protected (`Collection[int]`): Further layers that must stay, as the architecture demands.

    Returns:
        `Choice`: The layers, and why.

    Raises:
        CutError: Options that contradict each other, or more layers would go than may.
        CheckpointError: The calibration set is of another model, or a score is no number.
        UnsupportedModelError: The model's layers can't be run one at a time.
    """
    criterion = find_criterion(choice.criterion)
    num_layers = len(_layers(model))
    count = drop_count(choice.drop, num_layers)
    free = free_layers(num_layers, count, *criterion.protection(choice), protected)
    if criterion.name == "auto":
        from . import auto

        if calibration is None:
            raise CutError("criterion 'auto' looks at text; pass a calibration set")
        return auto.choose(_walk(model), calibration, count, free, contiguous=choice.contiguous, repair=choice.repair)
    shares = rounds(count, choice.steps)
    if choice.contiguous and len(shares) > 1:
        raise CutError("steps and contiguous don't go together: one block is chosen at once; leave one of them out")
    if criterion.needs == "text":
        model = _walk(model)
    gone: list[int] = []
    looked_at: list[Scores] = []
    for share in shares:
        blocks = criterion.blocks_only or (choice.contiguous and criterion.name in _TRIED)
        scores = score_layers(
            model,
            calibration,
            [criterion.name],
            variant=choice.variant,
            drop=share,
            lengths=[share] if blocks else None,
            gone=gone,
            seed=choice.seed,
        )[criterion.name]
        looked_at.append(scores)
        gone = sorted([*gone, *scores.pick(share, free - set(gone), choice.contiguous)])
    return Choice(gone, criterion.name, _why(criterion, choice.variant, gone, len(shares)), looked_at)


def _why(criterion: Criterion, variant: str, dropped: Sequence[int], steps: int) -> str:
    how = f", in {steps} rounds" if steps > 1 else ""
    computed = f" as {CRITERIA['random'].source} computed it" if variant == "paper" and criterion.has_variant else ""
    kind = "block" if criterion.blocks_only else "layers"
    return f"layers {format_layers(dropped)}: the {kind} with the lowest {criterion.name}{computed}{how}"


class _Work:
    """What the criteria of one call share."""

    def __init__(
        self,
        model: PreTrainedModel | LayerWalk,
        calibration: CalibrationSet | None,
        variant: str,
        alive: list[int],
        count: int,
        lengths: Collection[int] | None,
    ) -> None:
        self.model, self.calibration, self.variant = model, calibration, variant
        self.alive, self.count, self.lengths = alive, count, lengths
        self._walk: LayerWalk | None = None
        self._checked = False
        for length in lengths or ():
            if not 0 < length < len(alive):
                raise CutError(f"blocks of {length} layers: there are {len(alive)} layers, and one must stay")

    @property
    def walk(self) -> LayerWalk:
        if self._walk is None:
            self._walk = _walk(self.model)
        return self._walk

    def text(self, name: str) -> CalibrationSet:
        if self.calibration is None:
            raise CutError(f"criterion {name!r} looks at text; pass a calibration set")
        if not self._checked:
            check_vocabulary(self.calibration, self.walk.model)
            self._checked = True
        return self.calibration

    def observed(self, criteria: Sequence[Criterion]) -> dict[str, Scores]:
        """Those that look on while the dense model runs once."""
        observers = {criterion.name: self._observer(criterion) for criterion in criteria}
        if any(observer.needs_states for observer in observers.values()):
            run_pass(self.walk, self.text(criteria[0].name), list(observers.values()), self.alive)
        elif observers:
            let_go = isinstance(self.model, LayerWalk) and self.model.reads_weights_anew
            read_weights(_layers(self.model), list(observers.values()), self.alive, let_go=let_go)
        return {name: observer.scores() for name, observer in observers.items()}

    def _observer(self, criterion: Criterion) -> Observer:
        if criterion.name == "repairability":
            return Repairability("published", self.lengths or [self.count])
        variant = _variant(criterion, self.variant)
        module, num_layers = criterion.load(), len(_layers(self.model))
        return module.observer(criterion.name, variant, num_layers)

    def tried(self, criteria: Sequence[Criterion]) -> dict[str, Scores]:
        """Those that try the model without a layer, or without a block."""
        if not criteria:
            return {}
        gone = [i for i in range(self.walk.num_layers) if i not in set(self.alive)]
        sets = [(i,) for i in self.alive] if 1 not in (self.lengths or ()) else []
        for length in sorted(self.lengths or ()):
            sets += neighbours(self.alive, length)
        cuts = [Cut(tuple(sorted([*gone, *layers]))) for layers in sets]
        needs_kl = any(criterion.name == "kl" for criterion in criteria)
        outcomes = try_cuts(self.walk, self.text(criteria[0].name), cuts, kl=needs_kl)
        found = {}
        for criterion in criteria:
            score = criterion.load().score
            values = {layers: score(outcome) for layers, outcome in zip(sets, outcomes, strict=True)}
            by_layer = [values.get((i,)) for i in range(self.walk.num_layers)]
            blocks = {layers: value for layers, value in values.items() if len(layers) in (self.lengths or ())}
            found[criterion.name] = Scores(
                criterion.name, _variant(criterion, self.variant), tuple(self.alive), layers=by_layer, blocks=blocks
            )
        return found


def _ranks(criterion: Criterion, variant: str, num_layers: int, alive: Sequence[int], count: int, seed: int) -> Scores:
    order = [i for i in criterion.load().order(num_layers, count, seed, variant) if i in set(alive)]
    ranks: list[float | None] = [None] * num_layers
    for rank, layer in enumerate(order):
        ranks[layer] = float(rank)
    return Scores(criterion.name, _variant(criterion, variant), tuple(alive), layers=ranks)


def _variant(criterion: Criterion, variant: str) -> str:
    return variant if criterion.has_variant else "published"


def _walk(model: PreTrainedModel | LayerWalk) -> LayerWalk:
    return model if isinstance(model, LayerWalk) else LayerWalk(model)


def _layers(model: PreTrainedModel | LayerWalk) -> Any:
    from ..families.layout import find_decoder_layers

    return model.layers if isinstance(model, LayerWalk) else find_decoder_layers(model).layers
