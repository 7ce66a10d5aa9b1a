"""The settings that the arms share, and the clock of each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Setting:
    """The settings that all arms share.

    Args:
        data: The folder of texts.
        work: The folder for cuts; each is made once, and its time is charged to every arm that uses it.
        base: The dense model's folder.
        dense: The dense model.
        tokenizer: Its tokenizer.
        drop: The layers for `middle` and for `last`.
        length: Tokens per row.
        batch: Rows per step.
        calibration: Rows for the repair.
        bf16: Whether to multiply in bfloat16.
    """

    data: Path
    work: Path
    base: Path
    dense: Any
    tokenizer: Any
    drop: dict[str, list[int]]
    length: int
    batch: int
    calibration: int
    bf16: bool


class Clock:
    """CPU seconds of an arm: its own, and those that an earlier arm spent on the same cut.

    Args:
        minutes: The budget.
        charged: Seconds already spent.
    """

    def __init__(self, minutes: float, charged: float) -> None:
        self.start = time.process_time() - charged
        self.end = self.start + 60 * minutes

    @property
    def spent(self) -> float:
        """Seconds so far."""
        return time.process_time() - self.start

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return self.end - time.process_time()
