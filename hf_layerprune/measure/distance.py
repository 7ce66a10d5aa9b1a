"""How far a model is from its base: divergence, agreement and perplexity on the same text, token by token.

    result = distance(pruned, base, rows)
    print(result.kl, result.top1_agreement, result.perplexity, result.base.perplexity)

Both models read the same tokens in one pass, and each runs in full: what is measured is the model as it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..families import check_stage
from ..runtime.divergence import Reference, diverge
from ..runtime.head import OutputHead
from ..runtime.memory import in_batches, positions_at_once
from ..runtime.parts import evaluating
from ..screen import progress_bar

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
        window_nll (`tuple[float, ...]`): The mean of each window, for paired comparisons.
    """

    perplexity: float
    nll: float
    nll_stderr: float | None
    tokens: int
    window_nll: tuple[float, ...]

    @property
    def values(self) -> dict[str, tuple[float, float | None]]:
        """Value and standard error (to first order) of its metrics, named as in `metrics.json`."""
        stderr = None if self.nll_stderr is None else self.perplexity * self.nll_stderr
        return {"perplexity": (self.perplexity, stderr), "nll": (self.nll, self.nll_stderr)}


@dataclass(frozen=True)
class Distance(Perplexity):
    """How far a model is from its base on a text, besides how well it predicts the text itself.

    Args:
        base (`Perplexity`): How well the base predicts the text.
        kl (`float`): Mean over tokens of KL(base || model), in nats: the log-likelihood that is lost by predicting with
            the model instead of the base, if the base is right.
        kl_stderr (`float`, *optional*): Its standard error over windows; `None` for a single window.
        top1_agreement (`float`): Share of tokens for which both models have the same most likely next token.
        top1_agreement_stderr (`float`, *optional*): Its standard error.
    """

    base: Perplexity
    kl: float
    kl_stderr: float | None
    top1_agreement: float
    top1_agreement_stderr: float | None

    @property
    def distances(self) -> dict[str, tuple[float, float | None]]:
        """Value and standard error of the metrics that compare it with its base."""
        agreement = (self.top1_agreement, self.top1_agreement_stderr)
        return {"kl": (self.kl, self.kl_stderr), "top1_agreement": agreement}


def perplexity(model: PreTrainedModel, rows: torch.Tensor) -> Perplexity:
    """Perplexity of a model on windows of a text.

    Args:
        model (`PreTrainedModel`): A causal language model; its mode (training or evaluation) is restored.
        rows (`torch.Tensor`): Token ids `[windows, length]`, without padding. Each window is read on its own, and its
            first token is not predicted.

    Returns:
        `Perplexity`: The mean over all predicted tokens.

    Raises:
        LayerPruneError: A window does not fit into memory.
    """
    (nll,) = _means_of_windows(model, None, rows)
    return Perplexity(**_fields(nll, rows))


def distance(model: PreTrainedModel, base: PreTrainedModel, rows: torch.Tensor) -> Distance:
    """Distance of a model from its base on windows of a text.

    Args:
        model (`PreTrainedModel`): The pruned model; its mode (training or evaluation) is restored.
        base (`PreTrainedModel`): The model it was pruned from.
        rows (`torch.Tensor`): Token ids `[windows, length]`, without padding. Each window is read on its own, and its
            first token is not predicted.

    Returns:
        `Distance`: Means over all predicted tokens.

    Raises:
        LayerPruneError: A window does not fit into memory.
    """
    nll, base_nll, agreement, kl = _means_of_windows(model, base, rows)
    return Distance(
        **_fields(nll, rows),
        base=Perplexity(**_fields(base_nll, rows)),
        kl=kl.mean().item(),
        kl_stderr=_stderr(kl),
        top1_agreement=agreement.mean().item(),
        top1_agreement_stderr=_stderr(agreement),
    )


def _means_of_windows(model: PreTrainedModel, base: PreTrainedModel | None, rows: torch.Tensor) -> torch.Tensor:
    """The mean of each window: `nll`, and with a base, also the base's `nll`, agreement and `kl`."""
    check_stage(model.config, "evaluate")
    output, base_output = OutputHead(model), OutputHead(base) if base is not None else None
    head, base_head = output.head(), base_output.head() if base_output else None

    def run(batch: torch.Tensor) -> torch.Tensor:
        ids = batch.to(output.device)
        states = output.states(input_ids=ids, use_cache=False)
        base_states = (
            base_output.states(input_ids=ids.to(base_output.device), use_cache=False) if base_output else None
        )
        sums = torch.zeros(4 if base_output else 1, len(ids), dtype=torch.float64)
        predicted = ids.shape[1] - 1  # the last position of a window predicts nothing
        size = positions_at_once(ids.shape[1], len(ids), output.vocabulary)
        for start in range(0, predicted, size):
            positions = slice(start, min(start + size, predicted))
            targets = ids[:, positions.start + 1 : positions.stop + 1].flatten()
            theirs, reference = None, None
            if base_head is not None and base_states is not None:
                base_logits = base_head.logits(base_states[:, positions]).flatten(0, 1).to(output.device)
                theirs, reference = diverge(base_logits, targets), Reference(base_logits)
            ours = diverge(head.logits(states[:, positions]).flatten(0, 1), targets, reference)
            values = (ours.nll, theirs.nll if theirs else None, ours.agrees, ours.kl)
            for row, value in zip(sums, (one for one in values if one is not None), strict=True):
                row += value.double().view(len(ids), -1).sum(-1).cpu()
        return sums

    models = [model] if base is None else [model, base]
    sums_of_batches: list[torch.Tensor] = []
    with evaluating(*models), progress_bar(total=len(rows), desc="text", unit="window") as bar:
        for sums in in_batches(rows, 1, run, "use shorter windows"):
            sums_of_batches.append(sums)
            bar.update(sums.shape[1])
    return torch.cat(sums_of_batches, dim=1) / (rows.shape[1] - 1)


def _fields(window_nll: torch.Tensor, rows: torch.Tensor) -> dict[str, Any]:
    """The fields of [`Perplexity`]."""
    nll = window_nll.mean().item()
    try:
        perplexity = math.exp(nll)
    except OverflowError:
        perplexity = math.inf
    tokens = rows.numel() - len(rows)
    return {"perplexity": perplexity, "nll": nll, "nll_stderr": _stderr(window_nll), "tokens": tokens,
            "window_nll": tuple(window_nll.tolist())}  # fmt: skip


def _stderr(values: torch.Tensor) -> float | None:
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
