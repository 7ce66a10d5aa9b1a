"""How far a model is from its base: divergence, agreement and perplexity on the same text, token by token.

    result = distance(pruned, base, rows)
    print(result.kl, result.top1_agreement, result.perplexity, result.base_perplexity)

Both models read the same tokens in one pass. The layers before the first one that was dropped or changed are the same
in both, so they run only once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ..errors import LayerPruneError
from ..families import check_stage
from ..runtime.divergence import Reference, diverge
from ..runtime.head import Head, OutputHead
from ..runtime.memory import in_batches, positions_at_once
from ..runtime.parts import evaluating
from ..runtime.prefix import SharedPrefix

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Standard errors are over windows, since the tokens of one are not independent.

    Args:
        perplexity (`float`): `exp(nll)`; infinite if that is too large for a float.
        nll (`float`): Mean negative log-likelihood of a token, in nats.
        nll_stderr (`float`, *optional*): Its standard error; `None` for a single window.
        tokens (`int`): Number of predicted tokens: all but the first of each window.
        windows (`int`): Number of windows.
        window_nll (`tuple[float, ...]`): The mean of each window, for paired comparisons.
    """

    perplexity: float
    nll: float
    nll_stderr: float | None
    tokens: int
    windows: int
    window_nll: tuple[float, ...]

    @property
    def perplexity_stderr(self) -> float | None:
        """Standard error of the perplexity, to first order."""
        return None if self.nll_stderr is None else self.perplexity * self.nll_stderr


@dataclass(frozen=True)
class Distance:
    """How far a model is from its base on a text.

    Standard errors are over windows, since the tokens of one are not independent.

    Args:
        kl (`float`): Mean over tokens of KL(base || model), in nats: the log-likelihood that is lost by predicting with
            the model instead of the base, if the base is right.
        kl_stderr (`float`, *optional*): Its standard error; `None` for a single window.
        top1_agreement (`float`): Share of tokens for which both models have the same most likely next token.
        top1_agreement_stderr (`float`, *optional*): Its standard error.
        perplexity (`float`): Perplexity of the model on the text, see [`Perplexity`].
        base_perplexity (`float`): Perplexity of the base.
        nll (`float`): Mean negative log-likelihood of a token under the model, in nats.
        base_nll (`float`): The same under the base.
        nll_stderr (`float`, *optional*): Standard error of `nll`.
        base_nll_stderr (`float`, *optional*): Standard error of `base_nll`.
        tokens (`int`): Number of predicted tokens: all but the first of each window.
        windows (`int`): Number of windows.
        window_nll (`tuple[float, ...]`): The model's mean `nll` of each window.
        base_window_nll (`tuple[float, ...]`): The base's mean `nll` of each window.
        shared_layers (`int`): Number of leading layers that ran once for both.
    """

    kl: float
    kl_stderr: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None
    perplexity: float
    base_perplexity: float
    nll: float
    base_nll: float
    nll_stderr: float | None
    base_nll_stderr: float | None
    tokens: int
    windows: int
    window_nll: tuple[float, ...]
    base_window_nll: tuple[float, ...]
    shared_layers: int

    @property
    def of_model(self) -> Perplexity:
        """The model's perplexity."""
        return Perplexity(self.perplexity, self.nll, self.nll_stderr, self.tokens, self.windows, self.window_nll)

    @property
    def of_base(self) -> Perplexity:
        """The base's perplexity."""
        return Perplexity(
            self.base_perplexity, self.base_nll, self.base_nll_stderr, self.tokens, self.windows, self.base_window_nll
        )


def perplexity(
    model: PreTrainedModel, rows: torch.Tensor, *, batch_size: int = 1, progress: bool = False
) -> Perplexity:
    """Perplexity of a model on windows of a text.

    Args:
        model (`PreTrainedModel`): A causal language model; its mode (training or evaluation) is restored.
        rows (`torch.Tensor`): Token ids `[windows, length]`, without padding. Each window is read on its own, and its
            first token is not predicted.
        batch_size (`int`, defaults to 1): Windows per batch, halved when memory runs out.
        progress (`bool`, defaults to `False`): Show a progress bar.

    Returns:
        `Perplexity`: The mean over all predicted tokens.

    Raises:
        LayerPruneError: `rows` has another shape, or a window does not fit into memory.
    """
    check_stage(model.config, "evaluate")
    _check_rows(rows)
    output = OutputHead(model)
    head = output.head()
    nll: list[torch.Tensor] = []

    def run(batch: torch.Tensor) -> None:
        ids = batch.to(output.device)
        states, sums = output.states(input_ids=ids, use_cache=False), torch.zeros(len(ids), dtype=torch.float64)
        for positions in _chunks(ids, output.vocabulary):
            sums += _of_windows(diverge(_logits(head, states, positions), _targets(ids, positions)).nll, ids)
        nll.append(sums)

    with evaluating(model):
        _run(rows, batch_size, run, progress, "perplexity")
    return _perplexity(torch.cat(nll) / (rows.shape[1] - 1), rows)


def distance(
    model: PreTrainedModel,
    base: PreTrainedModel,
    rows: torch.Tensor,
    *,
    batch_size: int = 1,
    progress: bool = False,
) -> Distance:
    """Distance of a model from its base on windows of a text.

    Args:
        model (`PreTrainedModel`): The pruned model; its mode (training or evaluation) is restored.
        base (`PreTrainedModel`): The model it was pruned from. The embeddings and leading layers that both have in
            common run once for both.
        rows (`torch.Tensor`): Token ids `[windows, length]`, without padding. Each window is read on its own, and its
            first token is not predicted.
        batch_size (`int`, defaults to 1): Windows per batch, halved when memory runs out.
        progress (`bool`, defaults to `False`): Show a progress bar.

    Returns:
        `Distance`: Means over all predicted tokens.

    Raises:
        LayerPruneError: `rows` has another shape, the vocabularies differ, or a window does not fit into memory.
    """
    check_stage(model.config, "evaluate")
    _check_rows(rows)
    check_vocabularies(model, base)
    output, base_output = OutputHead(model), OutputHead(base)
    head, base_head = output.head(), base_output.head()
    prefix = SharedPrefix(base_output, output)
    sums_of_batches: list[torch.Tensor] = []

    def run(batch: torch.Tensor) -> None:
        ids = batch.to(output.device)
        base_states, states = prefix.states(batch)
        sums = torch.zeros(4, len(ids), dtype=torch.float64)
        for positions in _chunks(ids, output.vocabulary):
            targets = _targets(ids, positions)
            base_logits = _logits(base_head, base_states, positions).to(output.device)
            theirs = diverge(base_logits, targets)
            ours = diverge(_logits(head, states, positions), targets, Reference(base_logits))
            for row, values in zip(sums, (ours.nll, theirs.nll, ours.agrees, ours.kl), strict=True):
                if values is not None:
                    row += _of_windows(values, ids)
        sums_of_batches.append(sums)

    with evaluating(model, base):
        prefix.check(rows[0])
        _run(rows, batch_size, run, progress, "distance")
    nll, base_nll, agreement, kl = torch.cat(sums_of_batches, dim=1) / (rows.shape[1] - 1)
    mine, dense = _perplexity(nll, rows), _perplexity(base_nll, rows)
    return Distance(
        kl=kl.mean().item(),
        kl_stderr=_stderr(kl),
        top1_agreement=agreement.mean().item(),
        top1_agreement_stderr=_stderr(agreement),
        perplexity=mine.perplexity,
        base_perplexity=dense.perplexity,
        nll=mine.nll,
        base_nll=dense.nll,
        nll_stderr=mine.nll_stderr,
        base_nll_stderr=dense.nll_stderr,
        tokens=mine.tokens,
        windows=mine.windows,
        window_nll=mine.window_nll,
        base_window_nll=dense.window_nll,
        shared_layers=prefix.depth,
    )


def check_vocabularies(model: PreTrainedModel, base: PreTrainedModel) -> None:
    """Refuse to compare models with different vocabularies.

    Raises:
        LayerPruneError: The vocabularies differ in size.
    """
    ours, theirs = _vocabulary(model), _vocabulary(base)
    if ours != theirs:
        raise LayerPruneError(
            f"the model has a vocabulary of {ours} tokens and its base one of {theirs}, so they can't be compared token "
            "by token; name the base that the model was made from"
        )


def _vocabulary(model: PreTrainedModel) -> int:
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    embeddings: Any = model.get_input_embeddings()
    return (embeddings.weight if weight is None else weight).shape[0]


def _check_rows(rows: torch.Tensor) -> None:
    if rows.ndim != 2 or not len(rows) or rows.shape[1] < 2:
        raise LayerPruneError(
            f"rows of tokens must be [windows, length] with at least 2 tokens per window, not {list(rows.shape)}; "
            "the text may be too short for one window"
        )


def _run(rows: torch.Tensor, batch_size: int, run: Callable[[torch.Tensor], None], progress: bool, name: str) -> None:
    with tqdm(total=len(rows), desc=name, unit="window", disable=not progress) as bar:
        for done in in_batches(rows, batch_size, run, "use shorter windows"):
            bar.update(done)


def _chunks(ids: torch.Tensor, vocabulary: int) -> list[slice]:
    """Ranges of positions that go through the head together; the last position of a window predicts nothing."""
    predicted = ids.shape[1] - 1
    size = positions_at_once(ids.shape[1], len(ids), vocabulary)
    return [slice(start, min(start + size, predicted)) for start in range(0, predicted, size)]


def _logits(head: Head, states: torch.Tensor, positions: slice) -> torch.Tensor:
    return head.logits(states[:, positions]).flatten(0, 1)


def _targets(ids: torch.Tensor, positions: slice) -> torch.Tensor:
    return ids[:, positions.start + 1 : positions.stop + 1].flatten()


def _of_windows(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sums over the tokens of each window, `[windows]`."""
    return values.double().view(len(ids), -1).sum(-1).cpu()


def _perplexity(window_nll: torch.Tensor, rows: torch.Tensor) -> Perplexity:
    nll = window_nll.mean().item()
    try:
        value = math.exp(nll)
    except OverflowError:
        value = math.inf
    tokens = len(rows) * (rows.shape[1] - 1)
    return Perplexity(value, nll, _stderr(window_nll), tokens, len(rows), tuple(window_nll.tolist()))


def _stderr(values: torch.Tensor) -> float | None:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
