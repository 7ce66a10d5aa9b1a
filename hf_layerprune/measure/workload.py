"""What is timed. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


def threads() -> int:
    """The number of threads that a CPU computes with, the same in every engine: torch's, set by `OMP_NUM_THREADS`."""
    import torch

    return torch.get_num_threads()


@dataclass(frozen=True)
class Workload:
    """One batch of prompts.

    Args:
        batch (`int`): Prompts per batch.
        prompt_tokens (`int`): Tokens per prompt.
        new_tokens (`int`): Tokens to generate after each prompt.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int

    @property
    def settings(self) -> dict[str, Any]:
        """The settings to record with its numbers."""
        return asdict(self)
