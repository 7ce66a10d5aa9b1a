"""Generate tokens without the settings that a model's `generation_config` has, and time each token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import torch

from ..errors import UnsupportedModelError
from .parts import TrialError, refuse_quantised, trial


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Let a model generate without its own settings inside a `with` block: no beams, no penalties, no end-of-text token."""
    from transformers import GenerationConfig

    own = model.generation_config
    model.generation_config = GenerationConfig(pad_token_id=0)
    try:
        yield
    finally:
        model.generation_config = own


class _Clock:
    """A streamer that records the time of each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Called with the prompt, then with each token once it is in host memory."""
        self.times.append(perf_counter())

    def end(self) -> None:
        """Called at the end."""


def token_times(model: Any, ids: torch.Tensor, count: int) -> list[float]:
    """The times at which `count` tokens were generated, as the model continues prompts `[batch, length]` greedily.

    Raises:
        UnsupportedModelError: The model can't generate.
    """
    clock = _Clock()
    try:
        with trial(), plain_generation(model):
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, streamer=clock
            )
    except TrialError as error:
        why = f"{type(model).__name__} can't generate text, so its speed can't be measured: {error}"
        raise refuse_quantised(model, model.device, error) or UnsupportedModelError(why) from error
    return clock.times[1:]  # the first call has the prompt
