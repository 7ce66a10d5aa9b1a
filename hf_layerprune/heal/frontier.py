"""What tokens of healing buy, as `benchmarks/heal_frontier.py` measured it on one model.

The points are in `frontier.json`, for each of the repairs that healing was started from. Between them, losses are
interpolated linearly: over the logarithm of tokens, and over the share of the layers that are dropped, from none at 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..files.json_file import read_object

_FILE = Path(__file__).with_name("frontier.json")
_FEW = 10_000  # tokens; below that, the logarithm is left for a straight line


@dataclass(frozen=True)
class ExpectedLoss:
    """A loss that was measured or lies between measured ones, as a mean over domains.

    Args:
        ln_ratio (`float`): Logarithm of the ratio of perplexities, pruned to dense.
        kl (`float`): KL divergence from the dense model, in nats per token.
        is_extrapolated (`bool`): Whether this is beyond the tokens or the layers that were measured; the loss is then that of the
            nearest measured point.
        is_lower_bound (`bool`): Whether more layers are dropped than were measured, so that the real loss is larger.
    """

    ln_ratio: float
    kl: float
    is_extrapolated: bool
    is_lower_bound: bool

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the pruned model, relative to the dense model's."""
        return math.exp(self.ln_ratio)


@dataclass(frozen=True)
class Frontier:
    """Losses by share of dropped layers and tokens of healing.

    Args:
        points (`Sequence[dict[str, Any]]`): Each with `dropped`, `layers`, `tokens` (of the rows, each counted once),
            `ln_ratio`, `kl` and `seconds`.
        source (`dict[str, Any]`): The model and the settings they were measured with.
    """

    points: Sequence[dict[str, Any]]
    source: dict[str, Any]

    @classmethod
    @cache
    def load_all(cls) -> tuple[Frontier, ...]:
        """The frontiers that come with the package, one for each repair."""
        return tuple(cls(one["points"], one["source"]) for one in read_object(_FILE)["frontiers"])

    @property
    def shares(self) -> list[float]:
        """The shares of the layers that were dropped, ascending."""
        return sorted({point["dropped"] / point["layers"] for point in self.points})

    @property
    def cost_per_token(self) -> float:
        """The cost of healing on a token, everything included: how many tokens the dense model reads in that time."""
        costs = []
        for share in self.shares:
            repaired, *trained = self._points_at(share)
            last = trained[-1]
            costs.append((last["seconds"] - repaired["seconds"]) / last["tokens"])
        return max(costs) / self.source["forward_seconds_per_token"]

    @property
    def repair_cost(self) -> float:
        """The cost of the closed-form repair: how many tokens the dense model reads in that time."""
        seconds = max(self._points_at(share)[0]["seconds"] for share in self.shares)
        return seconds / self.source["forward_seconds_per_token"]

    def expected_loss(self, share: float, tokens: float) -> ExpectedLoss:
        """The loss without a share of the layers, after healing on so many tokens (0: after the repair alone)."""
        shares = self.shares
        losses = [{"ln_ratio": 0.0, "kl": 0.0}, *(self._interpolate(each, tokens) for each in shares)]
        nearest = min(shares, key=lambda each: abs(each - share))
        is_lower_bound = share > shares[-1] * 1.01
        is_extrapolated = is_lower_bound or tokens > self._points_at(nearest)[-1]["tokens"]
        values = {
            name: float(np.interp(share, [0.0, *shares], [loss[name] for loss in losses]))
            for name in ("ln_ratio", "kl")
        }
        return ExpectedLoss(**values, is_extrapolated=is_extrapolated, is_lower_bound=is_lower_bound)

    def affordable_tokens(self, seconds: float, forward_seconds: float) -> int:
        """How many tokens can be trained on in the given time; negative if there is not even time for the repair.

        `forward_seconds` is how long the dense model takes to read a token.
        """
        return math.floor((seconds / forward_seconds - self.repair_cost) / self.cost_per_token)

    def _points_at(self, share: float) -> list[dict[str, Any]]:
        points = [point for point in self.points if point["dropped"] / point["layers"] == share]
        return sorted(points, key=lambda point: point["tokens"])

    def _interpolate(self, share: float, tokens: float) -> dict[str, float]:
        points = self._points_at(share)
        x = [math.log1p(point["tokens"] / _FEW) for point in points]
        at = math.log1p(tokens / _FEW)
        return {name: float(np.interp(at, x, [point[name] for point in points])) for name in ("ln_ratio", "kl")}
