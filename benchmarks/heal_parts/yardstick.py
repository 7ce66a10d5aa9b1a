"""The distance of a model from the dense one on each domain: logarithm of the perplexity ratio, and KL, by window."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

METRICS = ("ln_ratio", "kl")
Windows = dict[str, dict[str, list[float]]]


class Yardstick:
    """Windows of text, and the dense model's states on them, which are computed once.

    Args:
        dense: The dense model.
        domains: Windows of tokens `[windows, length]` by domain.
    """

    def __init__(self, dense: Any, domains: dict[str, torch.Tensor]) -> None:
        import torch

        from hf_layerprune.runtime.head import OutputHead

        output = OutputHead(dense)
        self.head = output.head()
        self.domains = domains
        with torch.inference_mode():
            self.states = {
                name: [output.states(input_ids=row[None], use_cache=False)[0, :-1] for row in rows]
                for name, rows in domains.items()
            }

    def measure(self, model: Any) -> Windows:
        """Means over the tokens of each window, by domain and metric."""
        import torch

        from hf_layerprune.runtime.divergence import Reference, compute_divergence
        from hf_layerprune.runtime.head import OutputHead
        from hf_layerprune.runtime.parts import evaluation_mode

        output = OutputHead(model)
        head, found = output.head(), Windows()
        with evaluation_mode(model), torch.inference_mode():
            for name, rows in self.domains.items():
                found[name] = {metric: [] for metric in METRICS}
                for row, dense_states in zip(rows, self.states[name], strict=True):
                    states = output.states(input_ids=row[None], use_cache=False)[0, :-1]
                    taught = self.head.logits(dense_states)
                    theirs = compute_divergence(taught, row[1:])
                    ours = compute_divergence(head.logits(states), row[1:], Reference(taught))
                    found[name]["ln_ratio"].append((ours.nll - theirs.nll).mean().item())
                    found[name]["kl"].append(ours.kl.mean().item())
        return found


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean, and its standard error; `nan` for a single value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def summary(runs: list[Windows]) -> dict[str, dict[str, tuple[float, float]]]:
    """Mean and standard error by metric and domain, and of the domains' mean as `mean`.

    Windows are averaged over the runs (one a seed) first. The error is that over windows, and over runs where there
    are several, taken as independent.
    """
    table: dict[str, dict[str, tuple[float, float]]] = {}
    for metric in METRICS:
        row: dict[str, tuple[float, float]] = {}
        for domain in runs[0]:
            of_runs = [run[domain][metric] for run in runs]
            windows = [sum(column) / len(column) for column in zip(*of_runs, strict=True)]
            mean, error = mean_and_error(windows)
            if len(runs) > 1:
                error = math.hypot(error, mean_and_error([sum(one) / len(one) for one in of_runs])[1])
            row[domain] = mean, error
        row["mean"] = (
            sum(mean for mean, _ in row.values()) / len(row),
            math.hypot(*(error for _, error in row.values())) / len(row),
        )
        table[metric] = row
    return table
