"""How long each layer takes to decode a token on this machine, and how long everything else does.

The model generates a few tokens after a full cache, and hooks note when each layer starts and ends. Layers of the same
kind are the same work, so each gets the mean of its kind. Means, because they add up to the whole also on a machine that
does other work, which interrupts long spans more often than short ones.
"""

from __future__ import annotations

import logging
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ..families import text_config
from ..families.layout import count_parameters, find_decoder_layers
from ..runtime.devices import moved_to, synchronise
from ..runtime.generation import token_times
from ..runtime.memory import free_memory, is_out_of_memory
from ..runtime.parts import evaluation_mode, hook_scope

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_TOKENS, _WARM_UP = 24, 4


@dataclass(frozen=True)
class DecodeTimes:
    """Seconds per token on a device, of each layer and of everything else: embeddings, head, choosing the token."""

    layers: list[float]
    rest: float
    device: str = "cpu"

    @property
    def total(self) -> float:
        """The dense model's seconds per token."""
        return sum(self.layers) + self.rest

    def without(self, drop: Sequence[int]) -> float:
        """Seconds per token without some layers."""
        return self.total - sum(self.layers[i] for i in set(drop))

    def speedup(self, drop: Sequence[int]) -> float:
        """How many times as fast decoding is without some layers."""
        return self.total / self.without(drop)

    def __str__(self) -> str:
        each = sum(self.layers) / len(self.layers)
        return (
            f"on {self.device}, decoding takes {1000 * self.total:.3g} ms per token: {1000 * each:.3g} for each of {len(self.layers)} "
            f"layers, {1000 * self.rest:.3g} for the rest"
        )


def time_decoding(
    model: PreTrainedModel, context: int, batch: int = 1, device: torch.device | None = None
) -> DecodeTimes:
    """Time the layers of a model while it decodes after a cache of `context` tokens in each of `batch` sequences.

    It is moved to the device for that, if one is specified and it fits there; otherwise it is timed where it is.
    """
    try:
        with moved_to(device, model):
            return _time_layers(model, context, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or device in (None, model.device):
            raise
    free_memory()
    logger.warning("%s is too small for the whole model, so decoding is timed on %s", device, model.device)
    return _time_layers(model, context, batch)


@torch.no_grad()
def _time_layers(model: PreTrainedModel, context: int, batch: int) -> DecodeTimes:
    layers = find_decoder_layers(model).layers
    device = model.device
    starts: list[float] = []
    spans: list[list[float]] = [[] for _ in layers]

    def now() -> float:
        synchronise(device)
        return perf_counter()

    def start(*_: Any) -> None:
        starts.append(now())

    def stop(index: int) -> Any:
        return lambda *_: spans[index].append(now() - starts[-1])

    hooks = [
        handle
        for index, layer in enumerate(layers)
        for handle in (layer.register_forward_pre_hook(start), layer.register_forward_hook(stop(index)))
    ]
    prompt = max(1, context - _TOKENS)
    vocabulary = text_config(model.config).vocab_size
    ids = torch.randint(vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    with hook_scope(*hooks), evaluation_mode(model):
        steps = token_times(model, ids, _TOKENS)
    by_kind: dict[Any, list[float]] = defaultdict(list)
    kinds = [_layer_kind(model, index, layer) for index, layer in enumerate(layers)]
    for kind, span in zip(kinds, spans, strict=True):
        by_kind[kind] += span[1 + _WARM_UP :]  # the first one is the prompt
    # Layers that only run if there is an image take no time here.
    means = {kind: statistics.fmean(times) if times else 0.0 for kind, times in by_kind.items()}
    each = [means[kind] for kind in kinds]
    gaps = [after - before for before, after in pairwise(steps)][_WARM_UP:]
    return DecodeTimes(each, max(0.0, statistics.fmean(gaps) - sum(each)), device.type)


def _layer_kind(model: PreTrainedModel, index: int, layer: torch.nn.Module) -> tuple[Any, ...]:
    """What layers that do the same work have in common."""
    types = getattr(text_config(model.config), "layer_types", None)
    return type(layer), count_parameters(layer), types[index] if types else None
