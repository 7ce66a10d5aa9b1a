"""Work that fits into memory: logits a few positions at a time, and batches that are halved where memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from accelerate.utils.memory import should_reduce_batch_size

from ..errors import LayerPruneError

logger = logging.getLogger(__name__)

# The most float32 logits of one model that are in memory at once, in bytes: those of 2,048 tokens and a vocabulary of
# 256,000 would take 2 GB.
LOGITS_BYTES = 64 << 20


def positions_at_once(length: int, batch: int, vocabulary: int, budget: int = LOGITS_BYTES) -> int:
    """How many positions of a text go through the head at once.

    Args:
        length (`int`): Tokens in a text.
        batch (`int`): Texts at once.
        vocabulary (`int`): Logits at a position.
        budget (`int`, defaults to `LOGITS_BYTES`): Bytes of float32 logits.

    Returns:
        `int`: Chunks of this size are as even as can be; where there are several, it is a multiple of 32 (also where
            fewer would fit), since processors multiply those faster.
    """
    most = max(1, budget // (4 * batch * vocabulary))
    chunks = -(-length // most)
    even = -(-length // chunks)
    return even if chunks == 1 else min(-(-even // 32) * 32, length)


def in_batches(
    rows: torch.Tensor, size: int, run: Callable[[torch.Tensor], None], advice: str = "use shorter texts"
) -> Iterator[int]:
    """Run something on a few rows at a time; where memory runs out, on half as many from then on.

    Args:
        rows (`torch.Tensor`): All rows.
        size (`int`): How many at a time, at first.
        run (`Callable`): What to run on some of them. It may be run again on rows on which it failed.
        advice (`str`): The way out where not even one fits.

    Yields:
        `int`: How many rows were done.

    Raises:
        LayerPruneError: Not even one row fits into memory.
    """
    start, size = 0, max(1, size)
    while start < len(rows):
        batch = rows[start : start + size]
        try:
            run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if len(batch) == 1:
                raise LayerPruneError(
                    f"out of memory with a single text of {batch.shape[-1]} tokens; {advice}"
                ) from error
            size = len(batch) // 2
        else:
            start += len(batch)
            yield len(batch)
            continue
        free_memory()
        logger.warning("out of memory; going on with batches of %d", size)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the machine or of its GPU is used up."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and (
        should_reduce_batch_size(error) or "not enough memory" in str(error) or "out of memory" in str(error)
    )


def free_memory() -> None:
    """Give back what the GPU's allocator holds and no tensor uses."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
