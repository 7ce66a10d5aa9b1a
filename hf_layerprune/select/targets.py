"""Drop just enough layers to meet a target: parameters, bytes of the weight files, memory, or speed.

The target decides how many layers are dropped, and the criterion which ones. Layers may differ in size, so what is left
is computed for exactly the set that the criterion chooses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from ..errors import CutError
from ..layer_ranges import describe_layers
from ..options import format_bytes, format_count, pluralize

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..options import SelectionOptions

logger = logging.getLogger(__name__)

_FASTER = " times as fast"
# Tokens in the cache while decoding is timed: a short chat.
_SHORT_CONTEXT = 512


@dataclass(frozen=True)
class Target:
    """What a cut must leave.

    Args:
        option (`str`): The option that asks for it.
        limit (`float`): The most that may be left, in the unit that `left` counts in.
        left (`Callable[[Sequence[int]], float]`): What a cut leaves, by the layers that it drops.
        per_layer (`list[float]`): What each layer takes.
        format_amount (`Callable[[float], str]`): Formats an amount for messages.
        device (`str`, *optional*): Where the model was timed, if it was.
    """

    option: str
    limit: float
    left: Callable[[Sequence[int]], float]
    per_layer: list[float]
    format_amount: Callable[[float], str]
    device: str | None = None

    @classmethod
    def from_options(
        cls,
        choice: SelectionOptions,
        config: PreTrainedConfig,
        base: str | None = None,
        *,
        revision: str | None = None,
        model: PreTrainedModel | None = None,
        device: torch.device | None = None,
    ) -> Target | None:
        """The target among some options, or `None`.

        Only `target_speedup` needs the model itself, which is timed on the device, or where it is.

        Raises:
            CutError: The sizes are not known, or there is no model to time.
        """
        option = choice.target
        if option is None:
            return None
        from ..cut.sizes import Sizes

        untie = bool(getattr(choice, "tune_lm_head", False))
        sizes = Sizes(config, base, revision=revision, dtype=choice.target_dtype, untie=untie)
        how: dict[str, Any] = {"context": choice.context, "batch": choice.batch}
        limit = getattr(choice, option)
        if option == "target_params":
            return cls(option, limit, sizes.parameters, sizes.per_layer("params"), format_count)
        if option == "target_size":
            return cls(option, limit, sizes.file_bytes, sizes.per_layer("size"), format_bytes)
        if option == "target_memory":
            each = sizes.per_layer("memory", **how)
            return cls(option, limit, lambda drop: sizes.memory_bytes(drop, **how), each, format_bytes)
        if model is None:
            raise CutError("target_speedup times the layers of the model, and there is none here; pass the model")
        from .decode_times import time_decoding

        times = time_decoding(model, sizes.resolve_context(choice.context, _SHORT_CONTEXT), choice.batch, device)
        logger.info("%s", times)
        return cls(
            option, times.total / limit, times.without, times.layers,
            lambda t: f"{times.total / t:.3g}{_FASTER}", times.device,
        )  # fmt: skip

    def is_met_by(self, drop: Sequence[int]) -> bool:
        """Whether a cut meets it."""
        return self.left(drop) <= self.limit

    def choose_count(self, num_layers: int, free: Collection[int], pick: Callable[[int], Sequence[int]]) -> int:
        """How many layers to drop: just enough to meet the target.

        `free` are the layers that may be dropped. `pick`, which is called once for each number that is tried, returns
        those that the criterion drops.

        Raises:
            CutError: The model meets it as it is, or no cut does.
        """
        most = min(len(free), num_layers - 1)
        if self.is_met_by(()):
            raise CutError(
                f"{self} is met by the model as it is ({self.format_amount(self.left(()))}), so there is nothing to drop; choose a "
                "stricter target"
            )
        # With fewer than it takes of the largest layers, no set meets it.
        sizes = sorted((self.per_layer[i] for i in free), reverse=True)
        count, picked = 1, cache(pick)
        while count < most and self.left(()) - sum(sizes[:count]) > self.limit:
            count += 1
        while not self.is_met_by(picked(count)):
            if count == most:
                raise self._unreachable_error(picked(count), len(free) < num_layers)
            count += 1
        # What layers share makes that sum inexact.
        while count > 1 and self.left(picked(count)) + sizes[-1] <= self.limit and self.is_met_by(picked(count - 1)):
            count -= 1
        drop = picked(count)
        found, wanted = self.format_amount(self.left(drop)), self.format_amount(self.limit)
        logger.info("without %s: %s; the target is %s", describe_layers(drop), found, wanted)
        return count

    def record(self, drop: Sequence[int]) -> dict[str, Any]:
        """The entry for `lineage.json`: what was asked for, what the dense model has, and what is predicted."""
        timed = {} if self.device is None else {"device": self.device}
        return {"option": self.option, "limit": self.limit, "dense": self.left(()), "left": self.left(drop)} | timed

    def __str__(self) -> str:
        # As it is written on a command line: 12.5GB, 1.3.
        return f"{self.option}={self.format_amount(self.limit).removesuffix(_FASTER).replace(' ', '')}"

    def _unreachable_error(self, drop: Sequence[int], protects: bool) -> CutError:
        """The error that even the deepest cut does not meet it."""
        left = self.left(sorted(drop))
        which = f"all {len(drop)} of the layers that may go" if protects else pluralize(len(drop), "layer")
        way_out = " or protect fewer layers" if protects else ""
        if self.option == "target_speedup":
            return CutError(
                f"{self} can't be met: without {which}, decoding is only {self.format_amount(left)}; ask for at most that"
                + way_out
            )
        return CutError(
            f"{self} can't be met: dropping {which} leaves {self.format_amount(left)}, which is "
            f"{self.format_amount(left - self.limit)} too much; raise the target to {left:.0f} or more" + way_out
        )
