"""The trainer's progress bar, in the style of all others."""

from __future__ import annotations

from typing import Any

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..screen import progress_bar


class TrainingBar(ProgressCallback):
    """Shows the steps on a terminal; what is logged is printed above the bar, a line each time."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar = progress_bar(total=state.max_steps, desc="training", unit="step")


def show_progress(trainer: Trainer) -> None:
    """Give a trainer this bar in place of its own."""
    for own in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(own)
    trainer.add_callback(TrainingBar())
