"""The settings of a stage in words, and what the card and the Space advise for generation."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

# Small models that lost layers repeat themselves, so no sequence of this many tokens may occur twice. A base that declares
# a setting of its own against repetition keeps that.
NO_REPEAT_NGRAM = 5
# The most important settings of a training run.
_TRAINING = {
    "method": "what is trained", "loss": "loss", "kd_direction": "direction of the KL divergence",
    "learning_rate": "learning rate", "lr_scheduler_type": "schedule", "optim": "optimiser",
    "num_train_epochs": "epochs", "max_steps": "steps", "rows_a_step": "rows per step",
    "max_length": "maximum tokens per row", "seed": "seed",
}  # fmt: skip
_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


def training_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    """The most important settings of a training run, by what they are called; numbers are rounded."""
    each = [number for name in _STEP if isinstance(number := settings.get(name), int)]
    known = {**settings, "rows_a_step": prod(each)} if len(each) == len(_STEP) else dict(settings)
    told = {words: known.get(name) for name, words in _TRAINING.items()}
    return {
        words: f"{value:.3g}" if isinstance(value, float) else str(value)
        for words, value in told.items()
        if value not in (None, "", [], -1)
    }
