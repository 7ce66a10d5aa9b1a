"""Score layers by one or more criteria, and choose which to drop.

Work is shared between criteria: those that observe the dense model share one pass, and perplexity and KL are computed
from the same trials.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.rows import CalibrationSet, check_vocabulary
from ..errors import CutError, UnsupportedModelError
from ..families.layout import find_decoder_layers
from ..layer_ranges import describe_layers
from ..options import CutOptions, check_choice, copy_fields, drop_exactly
from ..runtime.walk import LayerWalk
from . import budget
from .passes import Observer, run_pass
from .registry import ALL, ORIGINAL, PAPER, PAPER_SOURCE, VARIANTS, Criterion, find_criterion
from .scores import NOT_COMPARABLE, Choice, Scores, drop_non_finite
from .sets import check_lengths, consecutive_blocks, drop_count, free_layers, split_rounds
from .targets import Target
from .trials import Trial, evaluate_trials

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
    dropped: Collection[int] = (),
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
        dropped (`Collection[int]`): Layers that were dropped before.
        seed (`int`, defaults to 42): For criteria that draw random numbers.

    Returns:
        `dict[str, Scores]`: The scores, by criterion. Of several criteria, those that the model has no scores for are
            left out, with a warning.

    Raises:
        CutError: A criterion or variant does not exist, or a block length leaves no layer.
        CheckpointError: The calibration set belongs to another model, or a score is not finite.
        UnsupportedModelError: The model's layers can't be run one at a time, or it has no scores at all.
    """
    check_choice("variant", variant, VARIANTS)
    wanted = _scoring_criteria(criteria)
    layers = _decoder_layers(model)
    num_layers, count = len(layers), drop_count(drop, len(layers))
    alive = [i for i in range(num_layers) if i not in set(dropped)]
    lengths = sorted(lengths or ())
    check_lengths(lengths, len(alive))
    scores: dict[str, Scores] = {}
    observers: dict[str, Observer] = {}
    trials: list[Criterion] = []
    # These may find that the model has no scores, or that memory is too small.
    deferred: dict[str, Callable[[], Scores]] = {}
    if by_text := [criterion for criterion in wanted if criterion.needs == "text"]:
        walk, text = _as_walk(model), _require_text(calibration, by_text[0])
        check_vocabulary(text, walk.model)
    for criterion in wanted:
        module, name, own = criterion.load(), criterion.name, criterion.variant(variant)
        if criterion.kind == "count":
            order = [i for i in module.order(num_layers, count, seed, variant) if i in alive]
            scores[name] = Scores.from_order(name, own, order, num_layers)
        elif criterion.kind in ("weights", "states"):
            observers[name] = module.observer(criterion, own, num_layers, lengths or [count])
            deferred[name] = observers[name].scores
        elif criterion.kind == "passes":
            deferred[name] = partial(module.score, walk, text, own, alive)
        else:
            trials.append(criterion)
    if any(criterion.kind == "states" for criterion in wanted):
        run_pass(walk, text, list(observers.values()), alive)
    else:  # weights can also be read from a model whose layers can't be run one at a time
        _read_weights(layers, alive, observers.values())
    if trials:
        deferred |= _score_by_trial(walk, text, trials, variant, alive, lengths)
    for name, compute in deferred.items():
        try:
            scores[name] = compute()
        except (UnsupportedModelError, CutError) as error:
            if len(wanted) == 1:
                raise
            wanted = [criterion for criterion in wanted if criterion.name != name]
            logger.warning("%s is left out: %s", name, error)
    return {criterion.name: scores[criterion.name] for criterion in wanted}


def _scoring_criteria(names: Sequence[str]) -> list[Criterion]:
    wanted = [find_criterion(name) for name in dict.fromkeys(names)]
    for criterion in wanted:
        if criterion.kind == "choice":
            raise CutError(f"criterion {criterion.name!r} gives no scores; use choose_layers")
    return wanted


def _read_weights(layers: nn.ModuleList, alive: Collection[int], observers: Collection[Observer]) -> None:
    with torch.no_grad():
        for i in alive:
            for observer in observers:
                observer.on_layer_weights(i, layers[i])


def _score_by_trial(
    walk: LayerWalk,
    text: CalibrationSet,
    criteria: Sequence[Criterion],
    variant: str,
    alive: Sequence[int],
    lengths: Sequence[int],
) -> dict[str, Callable[[], Scores]]:
    """What computes the scores by criteria that run the model without a layer or a block, which it has done here."""
    dropped = set(range(walk.num_layers)).difference(alive)
    sets: list[tuple[int, ...]] = [(i,) for i in alive] if 1 not in lengths else []
    for length in lengths:
        sets += consecutive_blocks(alive, length)
    outcomes = evaluate_trials(walk, text, [Trial(tuple(sorted(dropped.union(layers)))) for layers in sets])

    def scores(criterion: Criterion) -> Scores:
        values = {drop: getattr(outcome, criterion.name) for drop, outcome in zip(sets, outcomes, strict=True)}
        values = drop_non_finite(walk, criterion.name, values)
        if {len(drop) for drop in values} != {len(drop) for drop in sets}:
            raise CutError(NOT_COMPARABLE)
        by_layer = [values.get((i,)) for i in range(walk.num_layers)]
        blocks = {layers: value for layers, value in values.items() if len(layers) in lengths}
        return Scores(criterion.name, criterion.variant(variant), tuple(alive), by_layer, blocks)

    return {criterion.name: partial(scores, criterion) for criterion in criteria}


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
    criterion, num_layers = find_criterion(choice.criterion), len(_decoder_layers(model))
    count = 1 if choice.drop is None else drop_count(choice.drop, num_layers)
    free = free_layers(num_layers, count, *criterion.protected_ends(choice), protected)
    if choice.budget is not None or criterion.needs == "text":
        model = _as_walk(model)

    def choose(count: int, text: CalibrationSet | None = calibration) -> Choice:
        return choose_layers(model, text, copy_fields(CutOptions, choice, **drop_exactly(count)), protected=protected)

    if choice.target is not None:
        return _choose_for_target(model, choice, target, free, choose)
    if choice.budget is not None:
        by_criterion = None if criterion.kind == "choice" else lambda text, n: tuple(choose(n, text).drop_layers)
        return budget.choose(_as_walk(model), _require_text(calibration, criterion), free, choice, by_criterion)
    if criterion.kind == "choice":
        return criterion.load().choose(model, _require_text(calibration, criterion), count, free, choice)
    return _choose_in_rounds(model, calibration, criterion, choice, count, free)


def _choose_for_target(
    model: PreTrainedModel | LayerWalk,
    choice: CutOptions,
    target: Target | None,
    free: set[int],
    choose: Callable[[int], Choice],
) -> Choice:
    dense, device = (model.model, model.device) if isinstance(model, LayerWalk) else (model, None)
    target = target or Target.from_options(choice, dense.config, dense.name_or_path, model=dense, device=device)
    assert target is not None, "there is one"
    choices: dict[int, Choice] = {}

    def pick(count: int) -> list[int]:
        choices[count] = choose(count)
        return choices[count].drop_layers

    chosen = choices[target.choose_count(len(_decoder_layers(model)), free, pick)]
    chosen.details["target"] = target.record(chosen.drop_layers)
    return chosen


def _choose_in_rounds(
    model: PreTrainedModel | LayerWalk,
    calibration: CalibrationSet | None,
    criterion: Criterion,
    choice: CutOptions,
    count: int,
    free: set[int],
) -> Choice:
    shares, dropped, all_scores = split_rounds(count, choice.steps), list[int](), list[Scores]()
    options: dict[str, Any] = {"variant": choice.variant, "seed": choice.seed}
    for share in shares:
        names, lengths = [criterion.name], [share] if criterion.scores_blocks(choice.contiguous) else None
        scored = score_layers(model, calibration, names, drop=share, lengths=lengths, dropped=dropped, **options)
        (scores,) = scored.values()
        all_scores.append(scores)
        dropped = sorted([*dropped, *scores.pick(share, free - set(dropped), choice.contiguous)])
    kind = "layers"
    if criterion.blocks_only or choice.contiguous:
        kind = "block" if len(shares) == 1 else "blocks"
    computed = f" as {PAPER_SOURCE} computed it" if criterion.variant(choice.variant) == PAPER else ""
    how = f", in {len(shares)} rounds" if len(shares) > 1 else ""
    why = f"{describe_layers(dropped)}: the {kind} with the lowest {criterion.name}{computed}{how}"
    return Choice(dropped, criterion.name, why, all_scores)


def _require_text(calibration: CalibrationSet | None, criterion: Criterion) -> CalibrationSet:
    if calibration is None:
        raise CutError(f"criterion {criterion.name!r} needs text; pass a calibration set")
    return calibration


def _as_walk(model: PreTrainedModel | LayerWalk) -> LayerWalk:
    return model if isinstance(model, LayerWalk) else LayerWalk(model)


def _decoder_layers(model: PreTrainedModel | LayerWalk) -> nn.ModuleList:
    return model.layers if isinstance(model, LayerWalk) else find_decoder_layers(model).layers
