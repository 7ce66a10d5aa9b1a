"""What the arms have in common, and the time of each."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class Setting:
    """What all arms have in common.

    Args:
        data: The folder of texts.
        work: Where cuts are kept; they are made once, and charged to each arm that uses them.
        base: The dense model's folder.
        dense: The dense model.
        tokenizer: Its tokenizer.
        drop: Layers by the words `middle` and `last`.
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
    """Core-seconds of an arm: the process's own, and those that an earlier arm spent on the same thing.

    Args:
        minutes: The budget.
        charged: Seconds that are spent already.
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
