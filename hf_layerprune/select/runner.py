"""Score layers by one or more criteria, and choose which to drop.

Work is shared between criteria: those that observe the dense model share one pass, and perplexity and KL are computed
from the same trials.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..calibration.rows import CalibrationSet, check_vocabulary
from ..errors import CutError, LayerPruneError, UnsupportedModelError
from ..families.layout import find_decoder_layers
from ..layer_ranges import name_layers
from ..options import CutOptions, find, just, take
from ..runtime.walk import LayerWalk
from . import budget
from .passes import Observer, run_pass
from .registry import ALL, CRITERIA, ORIGINAL, PAPER, VARIANTS, Criterion, find_criterion
from .scores import Choice, Scores
from .sets import drop_count, free_layers, neighbours, rounds
from .targets import Target
from .trials import Trial, try_out

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def score_layers(
    model: PreTrainedModel | LayerWalk,
    calibration: CalibrationSet | None,
    criteria: Sequence[str] = ALL,
    *,
    variant: str = ORIGINAL,
    drop: float | int = 0.25,
    lengths: Collection[int] | None = None,
    gone: Collection[int] = (),
    seed: int = 42,
) -> dict[str, Scores]:
    """Score the layers of a model by several criteria, sharing work between them.

    Args:
        model (`PreTrainedModel` or `LayerWalk`): The dense model; left unchanged.
        calibration (`CalibrationSet`, *optional*): The text; only criteria that run the model on text need it.
        criteria (`Sequence[str]`, defaults to all but `"auto"`): Names of the criteria.
        variant (`str`, defaults to `"original"`): `"original"`: as the criterion's own source defines it; `"paper"`:
            as the code of arXiv:2411.15558 computes it, where it does.
        drop (`float` or `int`, defaults to 0.25): How many layers to drop, which is also the block length.
        lengths (`Collection[int]`, *optional*): Score blocks of these lengths, also by perplexity and KL. By default
            only repairability and angular distance score blocks: repairability those of `drop` layers, angular
            distance those of any length.
        gone (`Collection[int]`): Layers that have already been dropped.
        seed (`int`, defaults to 42): For criteria that draw random numbers.

    Returns:
        `dict[str, Scores]`: The scores, by criterion. Of several criteria, those that the model has no scores for are
            left out, with a warning.

    Raises:
        CutError: A criterion or variant does not exist, or a block length leaves no layer.
        CheckpointError: The calibration set belongs to another model, or a score is not finite.
        UnsupportedModelError: The model's layers can't be run one at a time, or it has no scores at all.
    """
    find("variant", variant, VARIANTS)
    wanted = [find_criterion(name) for name in dict.fromkeys(criteria)]
    if any(criterion.kind == "choice" for criterion in wanted):
        raise CutError("criterion 'auto' gives no scores; use choose_layers")
    num_layers = len(_layers(model))
    alive = [i for i in range(num_layers) if i not in set(gone)]
    for length in lengths or ():
        if not 0 < length < len(alive):
            raise CutError(
                f"blocks of {length} layers don't fit: there are {len(alive)} layers, and at least one must stay"
            )
    count = drop_count(drop, num_layers)
    work = _Work(model, calibration, variant, alive, sorted(lengths or ()))
    scores: dict[str, Scores] = {}
    for criterion in wanted:
        if criterion.kind == "count":
            order = criterion.load().order(num_layers, count, seed, variant)
            order = [i for i in order if i in alive]
            scores[criterion.name] = Scores.of_order(criterion.name, criterion.variant(variant), order, num_layers)
    scores |= work.observed([c for c in wanted if c.kind in ("weights", "states")], count)
    for criterion in wanted:
        if criterion.kind == "passes":
            with work.may_refuse(criterion.name):
                own = criterion.variant(variant)
                scores[criterion.name] = criterion.load().score(work.walk, work.text(criterion), own, alive)
    scores |= work.tried([criterion for criterion in wanted if criterion.kind == "trial"])
    for criterion in wanted:
        if criterion.name not in scores:
            logger.warning("%s is left out: %s", criterion.name, work.without_scores[criterion.name])
    if wanted and not scores:
        raise next(iter(work.without_scores.values()))
    return {criterion.name: scores[criterion.name] for criterion in wanted if criterion.name in scores}


def choose_layers(
    model: PreTrainedModel | LayerWalk,
    calibration: CalibrationSet | None,
    choice: CutOptions,
    *,
    protected: Collection[int] = (),
    target: Target | None = None,
) -> Choice:
    """Choose the layers to drop.

    Args:
        model (`PreTrainedModel` or `LayerWalk`): The dense model; left unchanged.
        calibration (`CalibrationSet`, *optional*): The text; only criteria that run the model on text need it.
        choice (`CutOptions`): How many layers to drop, and by which criterion. `"auto"` takes the repair that will
            follow into account.
        protected (`Collection[int]`): Other layers that the architecture requires to stay.
        target (`Target`, *optional*): What must be left, if that says how many; by default it is worked out from
            the options and the model.

    Returns:
        `Choice`: The layers, and the reason.

    Raises:
        CutError: Options contradict each other, too few layers may be dropped, or the target can't be met.
        CheckpointError: The calibration set belongs to another model, or a score is not finite.
        UnsupportedModelError: The model's layers can't be run one at a time.
    """
    criterion, num_layers = find_criterion(choice.criterion), len(_layers(model))

    def of(count: int, text: CalibrationSet | None = calibration) -> Choice:
        return choose_layers(model, text, take(CutOptions, choice, **just(count)), protected=protected)

    if choice.target is not None:
        dense, device = (model.model, model.device) if isinstance(model, LayerWalk) else (model, None)
        target = target or Target.of(choice, dense.config, dense.name_or_path, model=dense, device=device)
        assert target is not None, "there is one"
        model = _walk(model) if criterion.needs == "text" else model
        made: dict[int, Choice] = {}

        def pick(count: int) -> list[int]:
            made[count] = of(count)
            return made[count].drop_layers

        chosen = made[target.choose(num_layers, criterion, choice, protected, pick)]
        chosen.details["target"] = target.record(chosen.drop_layers)
        return chosen
    if choice.budget is not None:
        free = free_layers(num_layers, 1, *criterion.protection(choice), protected)
        by_criterion = None if criterion.kind == "choice" else lambda text, count: tuple(of(count, text).drop_layers)
        walk = model = _walk(model)
        return budget.choose(walk, _text(calibration, criterion), free, choice, by_criterion)
    count = drop_count(choice.drop, num_layers)
    free = free_layers(num_layers, count, *criterion.protection(choice), protected)
    if criterion.needs == "text":
        model = _walk(model)
    if criterion.kind == "choice":
        return criterion.load().choose(model, _text(calibration, criterion), count, free, choice)
    return _in_rounds(model, calibration, criterion, choice, count, free)


def _in_rounds(
    model: PreTrainedModel | LayerWalk,
    calibration: CalibrationSet | None,
    criterion: Criterion,
    choice: CutOptions,
    count: int,
    free: set[int],
) -> Choice:
    shares, gone, looked_at = rounds(count, choice.steps), list[int](), list[Scores]()
    blocks = criterion.blocks_only or (choice.contiguous and criterion.kind == "trial")
    for share in shares:
        names, lengths = [criterion.name], [share] if blocks else None
        (scores,) = score_layers(
            model, calibration, names, variant=choice.variant, drop=share, lengths=lengths, gone=gone, seed=choice.seed
        ).values()
        looked_at.append(scores)
        gone = sorted([*gone, *scores.pick(share, free - set(gone), choice.contiguous)])
    return Choice(gone, criterion.name, _why(criterion, choice.variant, gone, len(shares)), looked_at)


def _why(criterion: Criterion, variant: str, dropped: Sequence[int], steps: int) -> str:
    how = f", in {steps} rounds" if steps > 1 else ""
    computed = f" as {CRITERIA['random'].source} computed it" if criterion.variant(variant) == PAPER else ""
    kind = "block" if criterion.blocks_only else "layers"
    return f"{name_layers(dropped)}: the {kind} with the lowest {criterion.name}{computed}{how}"


@dataclass
class _Work:
    """The work shared by the criteria of one call."""

    model: PreTrainedModel | LayerWalk
    calibration: CalibrationSet | None
    variant: str
    alive: list[int]
    lengths: list[int]
    without_scores: dict[str, LayerPruneError] = field(default_factory=dict)

    @contextmanager
    def may_refuse(self, name: str) -> Iterator[None]:
        """Note that a criterion has no scores for the model or needs too much memory, and go on with the others."""
        try:
            yield
        except (UnsupportedModelError, CutError) as error:
            self.without_scores[name] = error

    @cached_property
    def walk(self) -> LayerWalk:
        return _walk(self.model)

    def text(self, criterion: Criterion) -> CalibrationSet:
        text = _text(self.calibration, criterion)
        check_vocabulary(text, self.walk.model)
        return text

    def observed(self, criteria: Sequence[Criterion], count: int) -> dict[str, Scores]:
        """Scores by criteria that observe the dense model, all in one pass."""
        layers = _layers(self.model)
        observers: dict[str, Observer] = {
            criterion.name: criterion.load().observer(
                criterion, criterion.variant(self.variant), len(layers), self.lengths or [count]
            )
            for criterion in criteria
        }
        of_states = [criterion for criterion in criteria if criterion.kind == "states"]
        if of_states:
            run_pass(self.walk, self.text(of_states[0]), list(observers.values()), self.alive)
        else:  # weights can also be read from a model whose layers can't be run one at a time
            with torch.no_grad():
                for i in self.alive:
                    for observer in observers.values():
                        observer.weights(i, layers[i])
        scores = {}
        for name, observer in observers.items():
            with self.may_refuse(name):
                scores[name] = observer.scores()
        return scores

    def tried(self, criteria: Sequence[Criterion]) -> dict[str, Scores]:
        """Scores by criteria that run the model without a layer or a block."""
        if not criteria:
            return {}
        text, num_layers = self.text(criteria[0]), self.walk.num_layers
        gone = [i for i in range(num_layers) if i not in set(self.alive)]
        sets: list[tuple[int, ...]] = [(i,) for i in self.alive] if 1 not in self.lengths else []
        for length in self.lengths:
            sets += neighbours(self.alive, length)
        trials = [Trial(tuple(sorted([*gone, *layers]))) for layers in sets]
        outcomes = try_out(self.walk, text, trials)
        scores = {}
        for criterion in criteria:
            score = criterion.load().score
            values = {layers: score(outcome) for layers, outcome in zip(sets, outcomes, strict=True)}
            by_layer = [values.get((i,)) for i in range(num_layers)]
            blocks = {layers: value for layers, value in values.items() if len(layers) in self.lengths}
            variant = criterion.variant(self.variant)
            scores[criterion.name] = Scores(criterion.name, variant, tuple(self.alive), by_layer, blocks)
        return scores


def _text(calibration: CalibrationSet | None, criterion: Criterion) -> CalibrationSet:
    if calibration is None:
        raise CutError(f"criterion {criterion.name!r} needs text; pass a calibration set")
    return calibration


def _walk(model: PreTrainedModel | LayerWalk) -> LayerWalk:
    return model if isinstance(model, LayerWalk) else LayerWalk(model)


def _layers(model: PreTrainedModel | LayerWalk) -> nn.ModuleList:
    return model.layers if isinstance(model, LayerWalk) else find_decoder_layers(model).layers
