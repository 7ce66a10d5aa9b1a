"""How far a model is from its base: divergence, agreement and perplexity on the same text, token by token.

    found = window_means(pruned, rows, base)
    print(mean(found["kl"]), mean(found["top1_agreement"]), text_metrics(found["nll"]), text_metrics(found["base_nll"]))

Both models read the same tokens in one pass, and each runs in full: what is measured is the model as it is.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from ..families import check_stage
from ..runtime.divergence import Reference, compute_divergence
from ..runtime.head import OutputHead
from ..runtime.memory import in_batches, positions_per_chunk
from ..runtime.parts import evaluation_mode
from ..screen import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def window_means(
    model: PreTrainedModel, rows: torch.Tensor, base: PreTrainedModel | None = None
) -> dict[str, torch.Tensor]:
    """How well a model predicts windows of a text, and how far it is from its base on them.

    Args:
        model (`PreTrainedModel`): A causal language model; its mode (training or evaluation) is restored.
        rows (`torch.Tensor`): Token ids `[windows, length]`, without padding. Each window is read on its own, and its
            first token is not predicted.
        base (`PreTrainedModel`, *optional*): The model it was pruned from.

    Returns:
        `dict[str, torch.Tensor]`: Means over the predicted tokens of each window, `[windows]`: `nll`, the negative
            log-likelihood in nats; and with a base, `base_nll`, `kl`, which is KL(base || model) in nats, and
            `top1_agreement`, the share of tokens for which both models have the same most likely next token.

    Raises:
        LayerPruneError: A window does not fit into memory.
    """
    check_stage(model.config, "evaluate")
    output, base_output = OutputHead(model), OutputHead(base) if base is not None else None
    head, base_head = output.head(), base_output.head() if base_output else None
    predicted = rows.shape[1] - 1  # the last position of a window predicts nothing

    def run(batch: torch.Tensor) -> dict[str, torch.Tensor]:
        ids = batch.to(output.device)
        states = output.states(input_ids=ids, use_cache=False)
        if base_output:
            base_states = base_output.states(input_ids=ids.to(base_output.device), use_cache=False)
        sums: dict[str, torch.Tensor] = {}
        size = positions_per_chunk(ids.shape[1], len(ids), output.vocabulary)
        for start in range(0, predicted, size):
            positions = slice(start, min(start + size, predicted))
            targets = ids[:, positions.start + 1 : positions.stop + 1].flatten()
            reference, values = None, {}
            if base_head is not None:
                base_logits = base_head.logits(base_states[:, positions]).flatten(0, 1).to(output.device)
                reference = Reference(base_logits)
                values["base_nll"] = compute_divergence(base_logits, targets).nll
            ours = compute_divergence(head.logits(states[:, positions]).flatten(0, 1), targets, reference)
            values["nll"] = ours.nll
            if ours.kl is not None and ours.agrees is not None:
                values |= {"kl": ours.kl, "top1_agreement": ours.agrees}
            for name, value in values.items():
                sums[name] = sums.get(name, 0) + value.double().view(len(ids), -1).sum(-1).cpu()
        return sums

    models = [model] if base is None else [model, base]
    batches: list[dict[str, torch.Tensor]] = []
    with evaluation_mode(*models), progress_bar(total=len(rows), desc="text", unit="window") as bar:
        for sums in in_batches(rows, 1, run, "use shorter windows"):
            batches.append(sums)
            bar.update(len(sums["nll"]))
    return {name: torch.cat([sums[name] for sums in batches]) / predicted for name in batches[0]}


def mean(values: torch.Tensor) -> tuple[float, float | None]:
    """The mean over windows, and its standard error; `None` for a single window.

    The error is over windows, since the tokens of one are not independent.
    """
    error = (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None
    return values.mean().item(), error


def text_metrics(window_nll: torch.Tensor) -> dict[str, tuple[float, float | None]]:
    """Perplexity (infinite if it is too large for `metrics.json`) and `nll`, each with its standard error, to first order."""
    nll, error = mean(window_nll)
    perplexity = math.inf if nll > 60 else math.exp(nll)  # 1e26, and its error is larger
    return {"perplexity": (perplexity, None if error is None else perplexity * error), "nll": (nll, error)}
