"""Evaluate many cuts at once: the loss of the model without some layers, and its KL divergence from the dense model.

Cuts that have dropped the same layers so far share their hidden states, so a cut only costs the layers after the
first one it drops. All cuts advance together, so each layer is loaded once per pass. Small sets take a single pass;
larger ones take as many passes as the memory for hidden states requires. At the end the head runs for each cut, a few
positions at a time; the dense model's distribution is computed once for all cuts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..calibration.rows import CalibrationSet
from ..errors import CheckpointError
from ..options import pluralize
from ..runtime.divergence import Reference, compute_divergence
from ..runtime.memory import free_bytes
from ..runtime.walk import Batch, LayerWalk
from ..screen import progress_bar
from .passes import HEAD_TOKENS, not_finite_error, pick_batch_size
from .scores import WIDER_DTYPES

if TYPE_CHECKING:
    from tqdm import tqdm

Change = Callable[[nn.Module], AbstractContextManager]
Key = frozenset[object]


@dataclass(frozen=True, eq=False)
class Trial:
    """A cut to evaluate.

    Args:
        drop (`tuple[int, ...]`): The layers to leave out, ascending; empty for the dense model.
        changes (`Mapping[int, Callable]`): By the index of a kept layer: a context manager that applies a repair to
            the layer while it runs.
    """

    drop: tuple[int, ...]
    changes: Mapping[int, Change] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Outcome:
    """The effect of a cut on the model.

    Args:
        rows (`torch.Tensor`): For each row, its loss and KL, and the share of positions at which both models have the
            same most likely token, `[rows, 3]`. NaN for a cut whose hidden states are not finite; see
            [`~scores.drop_non_finite`].
    """

    rows: torch.Tensor

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return self.rows[:, 0].mean().item()

    @property
    def kl(self) -> float:
        """Mean KL(dense || cut) of the next-token distribution, over all positions, in nats.

        Unlike perplexity, it is meaningful on any text, including text that the model wrote itself, and it detects changes
        that don't affect the probability of the text's own next tokens.
        """
        return self.rows[:, 1].mean().item()

    @property
    def perplexity(self) -> float:
        """`exp(loss)`, infinite where that overflows (Shortened LLaMA, arXiv:2402.02834, section 3).

        The code of arXiv:2411.15558 computes the same, on the text it also reports results on: the test split of
        WikiText-2 in rows of 128 tokens. With one layer per step, this is the greedy removal of SLEB (arXiv:2402.09025).
        """
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def quality(self, dense: Outcome) -> dict[str, float]:
        """What the cut does to the model, with standard errors over rows; figures that are not finite are left out."""
        nll, kl, agreement = self.rows.unbind(1)
        of_rows = {"kl": kl, "perplexity_ratio": nll - dense.rows[:, 0], "top1_agreement": agreement}
        found: dict[str, float] = {}
        for name, values in of_rows.items():
            mean, error = values.mean().item(), math.nan
            if len(values) > 1:
                error = values.std(correction=1).item() / math.sqrt(len(values))
            if name == "perplexity_ratio":  # so far its logarithm
                mean = math.exp(min(mean, 30))  # lineage.json has no number above 1e20
                error *= mean
            found |= {name: mean, f"{name}_stderr": error}
        return {name: round(value, 6) for name, value in found.items() if math.isfinite(value)}


@torch.no_grad()
def evaluate_trials(walk: LayerWalk, calibration: CalibrationSet, trials: Sequence[Trial]) -> list[Outcome]:
    """Run the dense model on the text with each of some cuts.

    Raises:
        CheckpointError: The dense model's own states or logits are not finite.
    """
    all_trials = [*trials, Trial(())]
    rows = rows_per_pass(walk, calibration, all_trials)
    size = min(rows, pick_batch_size(calibration))
    given, step = list(calibration.batches(size)), -(-rows // size)
    parts = [given[start : start + step] for start in range(0, len(given), step)]
    means: list[torch.Tensor] = []
    runs = walk.num_layers * len(parts)
    with progress_bar(total=runs, desc=f"evaluating {pluralize(len(trials), 'cut')}", unit="layer") as bar:
        for part in parts:
            batches = [walk.begin(*rows_of) for rows_of in part]
            states = _run_trials(walk, batches, all_trials, bar)
            for number, batch in enumerate(batches):
                means.append(_compare(walk, batch, [None if state is None else state[number] for state in states]))
    return [Outcome(rows_of_trial) for rows_of_trial in torch.cat(means, 1)]


def state_memory(walk: LayerWalk) -> int:
    """Bytes for hidden states: a share of the free memory if each pass has to read the weights again."""
    if walk.device.type == "cuda":
        return free_bytes(walk.device) // 3
    # If the weights stay in memory, extra passes cost nothing, and small ones stay in the processor's cache.
    return free_bytes(walk.device) // 8 if walk.reloads_weights else 256 << 20


def rows_per_pass(walk: LayerWalk, calibration: CalibrationSet, trials: Sequence[Trial]) -> int:
    """How many rows to run through the model in one pass."""
    samples, length = calibration.input_ids.shape
    width, size = walk.model.config.get_text_config().hidden_size, walk.model.dtype.itemsize
    # The hidden states kept after a layer, plus one set while it is computed.
    most = max(len({_state_key(trial, i + 1) for trial in trials}) for i in range(walk.num_layers)) + 1
    rows = state_memory(walk) // (most * length * width * size)
    small = pick_batch_size(calibration)
    return max(1, min(samples, rows // small * small if rows >= small else rows))


def layer_runs(num_layers: int, trials: Sequence[Trial]) -> int:
    """How many layer runs each row takes, for a cost estimate."""
    return sum(len({_state_key(trial, i + 1) for trial in trials if i not in trial.drop}) for i in range(num_layers))


def _state_key(trial: Trial, layer: int) -> Key:
    """What the hidden states that enter a layer depend on. Trials with the same key share them."""
    changed = {(i, id(trial)) for i in trial.changes if i < layer}
    return frozenset(changed.union(i for i in trial.drop if i < layer))


def _run_trials(
    walk: LayerWalk, batches: Sequence[Batch], trials: Sequence[Trial], bar: tqdm
) -> list[Sequence[torch.Tensor] | None]:
    """Run all trials through all layers; returns the final hidden states, by trial and batch, if they are finite."""
    states: dict[Key, list[torch.Tensor]] = {frozenset(): [batch.hidden for batch in batches]}
    for batch in batches:
        batch.hidden = batch.hidden.new_empty(0)  # frees the memory
    for i, layer in enumerate(walk.layers):
        going = [trial for trial in trials if _state_key(trial, i) in states]
        new = {_state_key(trial, i + 1): states[_state_key(trial, i)] for trial in going if i in trial.drop}
        todo = {_state_key(trial, i + 1): (_state_key(trial, i), trial) for trial in going if i not in trial.drop}
        left = Counter(before for before, _ in todo.values())
        if todo:
            with walk.layer(i) as run:
                for after, (before, trial) in todo.items():
                    left[before] -= 1
                    source = states[before]
                    with trial.changes[i](layer) if i in trial.changes else nullcontext():
                        new[after] = [run(state, batch) for state, batch in zip(source, batches, strict=True)]
                    if not all(torch.isfinite(state).all() for state in new[after]):
                        if not after:  # not only those of a cut
                            raise not_finite_error(i, layer, new[after][0].dtype)
                        del new[after]
                    if not left[before]:
                        del states[before], source
        states = new
        bar.update()
    return [states.get(_state_key(trial, walk.num_layers)) for trial in trials]


def _compare(walk: LayerWalk, batch: Batch, states: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Mean loss, KL and agreement of each row `[trials, rows, 3]`; the last `states` are the dense model's.

    They are NaN for a trial without states.

    Positions before the placeholder of an image don't count: nobody asks the model for one.
    """
    *cuts, dense = states
    assert dense is not None
    rows, length = batch.input_ids.shape
    sums = torch.zeros(len(cuts), rows, 3, dtype=torch.float32 if walk.device.type == "mps" else torch.float64)
    sums[[state is None for state in cuts]] = math.nan
    sums = sums.to(walk.device)
    mask = batch.text_positions
    for row, ids in enumerate(batch.input_ids):
        for start in range(0, length, HEAD_TOKENS):
            end = min(start + HEAD_TOKENS, length)
            targets, counts = ids[start + 1 : end + 1], mask[row, start:end]
            reference = Reference(walk.logits(dense[row : row + 1, start:end])[0])
            if not torch.isfinite(reference.norms).all():
                raise CheckpointError(
                    "the logits of the dense model are not finite: weights after its layers are damaged, or it overflows its "
                    f"data type; use an intact copy, or {WIDER_DTYPES}"
                )
            for state, sums_of in zip(cuts, sums[:, row], strict=True):
                if state is None:
                    continue
                of_tokens = compute_divergence(walk.logits(state[row : row + 1, start:end])[0], targets, reference)
                assert of_tokens.kl is not None
                assert of_tokens.agrees is not None
                parts = (of_tokens.nll[counts[: len(targets)]], of_tokens.kl[counts], of_tokens.agrees[counts])
                sums_of += torch.stack([part.sum(dtype=sums.dtype) for part in parts])
    each = torch.stack([mask[:, :-1].sum(1), mask.sum(1), mask.sum(1)], -1).clamp(min=1)
    return sums.double().cpu() / each.cpu()
