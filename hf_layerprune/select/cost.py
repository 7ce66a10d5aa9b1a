"""An estimate of the cost of scoring: layer runs are counted, and one batch is timed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from ..calibration.rows import CalibrationSet
from ..repair.linear import NormalEquations, solve_ridge
from ..runtime.devices import synchronise
from ..runtime.walk import LayerWalk
from .passes import HEAD_TOKENS, batch_rows
from .registry import find_criterion
from .sets import neighbours
from .trials import Trial, layer_runs, rows_per_pass

logger = logging.getLogger(__name__)

# The backward pass runs a layer again, then computes the gradients of its input and its weights.
_BACKWARD = 3
_FIT_WIDTH = 1024


@dataclass(frozen=True)
class Cost:
    """The estimated cost of a call of `score_layers`.

    Args:
        layers (`int`): Runs of a single layer over all rows.
        heads (`int`): Runs of the head over all rows.
        passes (`int`): How many times all weights are loaded.
        seconds (`float`): Total time, extrapolated from one batch.
    """

    layers: int
    heads: int
    passes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.layers} runs of a layer and {self.heads} of the head over all rows, in {self.passes} "
            f"{'pass' if self.passes == 1 else 'passes'} over the weights: about {_readable(self.seconds)}"
        )


@torch.no_grad()
def estimate(
    walk: LayerWalk,
    samples: int,
    length: int,
    criteria: Sequence[str],
    *,
    count: int,
    lengths: Collection[int] | None = None,
) -> Cost:
    """Estimate the cost of `score_layers`.

    Args:
        walk (`LayerWalk`): The dense model.
        samples (`int`): Rows of the calibration set.
        length (`int`): Tokens per row.
        criteria (`Sequence[str]`): Names of the criteria.
        count (`int`): How many layers to drop.
        lengths (`Collection[int]`, *optional*): Block lengths, see `score_layers`.

    Returns:
        `Cost`: The estimate.
    """
    n, passes, layers, heads, fits = walk.num_layers, 0, 0, 0, 0
    wanted = [find_criterion(name) for name in criteria]
    sizes = sorted(lengths or [count])
    if any(criterion.kind == "states" for criterion in wanted):
        layers, passes = n, 1
    for criterion in wanted:
        if criterion.kind == "passes":
            layers, heads, passes = layers + n * (1 + _BACKWARD), heads + _BACKWARD, passes + 2
        elif criterion.kind == "states":
            fits += getattr(criterion.load(), "fits", lambda *_: 0)(n, sizes)
    text = CalibrationSet.of(torch.arange(samples * length).view(samples, length) % 100 + 3, "an estimate")
    if any(criterion.kind == "trial" for criterion in wanted):
        sets = [*((i,) for i in range(n)), *(b for size in lengths or () for b in neighbours(range(n), size))]
        trials = [Trial(layers) for layers in dict.fromkeys(sets)] + [Trial(())]
        layers, heads = layers + layer_runs(n, trials), heads + len(trials)
        passes += -(-samples // rows_per_pass(walk, text, trials))
    if not layers:
        return Cost(0, 0, 0, 0.0)
    layer, head = _of_a_row(walk, text)
    # Summing the normal equations of a map costs about as much as running a layer.
    seconds = samples * ((layers + fits) * layer + heads * head) + (fits and fits * _of_a_fit(walk))
    return Cost(layers + fits, heads, passes, seconds)


def announce(walk: LayerWalk, text: CalibrationSet, layer_runs: int, fits: int, what: str) -> None:
    """Log how long a search will take, given how often it runs a layer on a row of this text, and fits a map."""
    layer, _ = _of_a_row(walk, text)
    seconds = 1.3 * layer_runs * layer + (fits and fits * _of_a_fit(walk))  # the head takes its share
    logger.info("%s takes about %s", what, _readable(seconds))


@torch.no_grad()
def forward_seconds(walk: LayerWalk, length: int) -> float:
    """Seconds that the whole model takes to read a token, from the fastest of a few runs of a layer and the head."""
    text = CalibrationSet.of(torch.arange(8 * length).view(8, length) % 100 + 3, "an estimate")
    layer, head = map(min, zip(*(_of_a_row(walk, text) for _ in range(3)), strict=True))
    return (walk.num_layers * layer + head) / length


@torch.no_grad()
def _of_a_row(walk: LayerWalk, text: CalibrationSet) -> tuple[float, float]:
    """Seconds for a layer and for the head on one row, by a run of each."""
    rows = batch_rows(text)
    batch = walk.begin(*next(text.batches(rows)))
    length = batch.input_ids.shape[1]
    with walk.layer(0) as run:
        run(batch.hidden, batch)
        layer = _timed(lambda: run(batch.hidden, batch), walk.device)
    piece = batch.hidden[:1, : min(HEAD_TOKENS, length)]
    walk.logits(piece)
    head = _timed(lambda: walk.logits(piece).float().logsumexp(-1), walk.device)
    return layer / rows, head * length / piece.shape[1]


@torch.no_grad()
def _of_a_fit(walk: LayerWalk) -> float:
    """Seconds to solve for a map of the hidden states, from one of at most 1,024 dimensions: they grow with the cube."""
    width = walk.model.config.get_text_config().hidden_size
    part = min(width, _FIT_WIDTH)
    sums = NormalEquations(part, part, walk.device)
    rows = torch.randn(2 * part, part, generator=torch.Generator().manual_seed(0)).to(walk.device)
    sums.add(rows, rows)
    return _timed(lambda: solve_ridge(sums, sums), walk.device) * (width / part) ** 3


def _timed(work: Callable[[], object], device: torch.device) -> float:
    synchronise(device)
    start = perf_counter()
    work()
    synchronise(device)
    return perf_counter() - start


def _readable(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
