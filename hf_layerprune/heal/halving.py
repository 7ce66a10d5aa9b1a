"""When memory runs out in a training step, its batches are halved, and the step is repeated with the same result.

The loss of a batch is a sum over its tokens, divided by the number of tokens of the whole step. So the gradients of the
parts of a batch add up to those of the batch, and a step still has as many rows as the settings say. (transformers'
`auto_find_batch_size` starts over instead, with weights that have been trained already and fewer rows per step.)
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DistributedType

from ..errors import LayerPruneError
from ..runtime.memory import free_memory, is_out_of_memory

if TYPE_CHECKING:
    from .trainer import HealTrainer

logger = logging.getLogger(__name__)

Batch = dict[str, Any]


class BatchHalving:
    """The batches of one optimizer step, each run whole or, once memory has run out, in parts."""

    def __init__(self, trainer: HealTrainer) -> None:
        self._trainer = trainer
        self._max_rows: int | None = None
        self._step = -1
        self._seen: list[Batch] = []
        self._step_state: tuple[int, Any] = (0, {})

    def run(self, one: Callable[[Batch], torch.Tensor], batch: Batch) -> torch.Tensor:
        """Run forward and backward for the next batch of a step, and return the loss.

        `one` does so for a batch or a part of it.

        Raises:
            LayerPruneError: A single row does not fit into memory, or the batch can't be divided.
        """
        trainer = self._trainer
        if trainer.state.global_step != self._step:
            self._step, self._seen = trainer.state.global_step, []
            self._step_state = copy.deepcopy((trainer._total_train_tokens, trainer._metrics["train"]))
        self._seen.append(batch)
        pending = [batch]
        while True:
            try:
                losses = [torch.stack([one(part) for part in self._parts(each)]).sum() for each in pending]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                self._halve(error, pending)
            else:
                return losses[-1]
            # The gradients of this step are incomplete, so all of its batches run again.
            trainer.model.zero_grad()
            trainer._total_train_tokens, trainer._metrics["train"] = copy.deepcopy(self._step_state)
            free_memory()
            pending = self._seen

    def _parts(self, batch: Batch) -> list[Batch]:
        rows = len(batch["input_ids"])
        if self._max_rows is None or rows <= self._max_rows:
            return [batch]
        starts = range(0, rows, self._max_rows)
        return [{name: value[start : start + self._max_rows] for name, value in batch.items()} for start in starts]

    def _halve(self, error: BaseException, batches: list[Batch]) -> None:
        """Halve the batches; raises if that is not possible."""
        trainer, args = self._trainer, self._trainer.args
        if args.auto_find_batch_size and not self._is_divisible(batches[0]):
            raise error
        size = max(len(part["input_ids"]) for batch in batches for part in self._parts(batch))
        if size == 1:
            raise LayerPruneError(
                f"out of memory with a single row of {batches[-1]['input_ids'].shape[1]} tokens; use a smaller "
                "--max_length, a --method that trains less, or --gradient_checkpointing true"
            ) from error
        if not self._is_divisible(batches[0]):
            raise LayerPruneError(
                f"out of memory with {args.per_device_train_batch_size} rows per device; --per_device_train_batch_size "
                f"{max(1, args.per_device_train_batch_size // 2)} --gradient_accumulation_steps "
                f"{2 * args.gradient_accumulation_steps} gives the same result with less memory"
            ) from error
        self._max_rows = size // 2
        logger.warning(
            "out of memory at step %d; continuing with batches of %d, and the same rows in each step",
            trainer.state.global_step + 1,
            self._max_rows,
        )

    def _is_divisible(self, batch: Batch) -> bool:
        """Whether a batch can be divided: one process, the loss as a sum over tokens, and one entry for each row."""
        trainer, rows = self._trainer, len(batch["input_ids"])
        alone = trainer.accelerator.distributed_type == DistributedType.NO
        of_rows = all(torch.is_tensor(value) and value.shape[:1] == (rows,) for value in batch.values())
        return alone and of_rows and not trainer.padding_free and not trainer.leaves_loss_to_trl
