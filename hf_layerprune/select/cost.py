"""How long scores and searches take: runs of a layer are counted, and one batch is timed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from time import perf_counter

import torch

from ..calibration.rows import CalibrationSet
from ..runtime.devices import synchronise
from ..runtime.walk import LayerWalk
from .passes import HEAD_TOKENS, pick_batch_size
from .registry import find_criterion
from .sets import consecutive_blocks
from .trials import Trial, layer_runs

logger = logging.getLogger(__name__)


def count_runs(
    num_layers: int, criteria: Sequence[str], count: int, lengths: Collection[int] | None = None
) -> tuple[int, int]:
    """How often `score_layers` runs a layer and the head over all rows, to drop `count` layers."""
    n, kinds = num_layers, {find_criterion(name).kind for name in criteria}
    layers, heads = n * ("states" in kinds), 0
    if "passes" in kinds:
        # The backward pass runs a layer again, then computes the gradients of its input and its weights.
        layers, heads = layers + 4 * n, 3
    if "repairability" in criteria:  # to fit a map costs about as much as to run a layer
        layers += sum(n - length for length in lengths or [count])
    if "trial" in kinds:
        sets = [*((i,) for i in range(n)), *(b for size in lengths or () for b in consecutive_blocks(range(n), size))]
        trials = [Trial(drop) for drop in dict.fromkeys(sets)] + [Trial(())]
        layers, heads = layers + layer_runs(n, trials), heads + len(trials)
    return layers, heads


def log_estimate(walk: LayerWalk, text: CalibrationSet, what: str, layers: float, heads: float) -> None:
    """Log how long work takes that runs a layer and the head so many times on a row of this text."""
    if not layers:
        return
    layer, head = _time_row(walk, text)
    seconds = layers * layer + heads * head
    if seconds < 90:
        time = f"{max(1, round(seconds))} s"
    else:
        time = f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
    logger.info("%s takes about %s", what, time)


@torch.no_grad()
def forward_seconds(walk: LayerWalk, length: int) -> float:
    """Seconds that the whole model takes to read a token, from the fastest of a few runs of a layer and the head."""
    text = CalibrationSet.from_ids(torch.arange(8 * length).view(8, length) % 100 + 3, "an estimate")
    layer, head = map(min, zip(*(_time_row(walk, text) for _ in range(3)), strict=True))
    return (walk.num_layers * layer + head) / length


@torch.no_grad()
def _time_row(walk: LayerWalk, text: CalibrationSet) -> tuple[float, float]:
    """Seconds for a layer and for the head on one row, by a run of each."""
    rows = pick_batch_size(text)
    batch = walk.begin(*next(text.batches(rows)))
    length = batch.input_ids.shape[1]
    with walk.layer(0) as run:
        run(batch.hidden, batch)
        layer = _time_call(lambda: run(batch.hidden, batch), walk.device)
    piece = batch.hidden[:1, : min(HEAD_TOKENS, length)]
    walk.logits(piece)
    head = _time_call(lambda: walk.logits(piece).float().logsumexp(-1), walk.device)
    return layer / rows, head * length / piece.shape[1]


def _time_call(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = perf_counter()
    work()
    synchronise(device)
    return perf_counter() - start
