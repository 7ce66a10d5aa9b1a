"""Stay within memory: compute logits a few positions at a time, and halve batches when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import TypeVar

import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

from ..errors import LayerPruneError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

# The most bytes of float32 logits that one model holds at a time; 2,048 tokens and a vocabulary of 256,000 would take
# 2 GB.
LOGITS_BYTES = 64 << 20
# What errors say, in addition to those that accelerate knows.
_OUT_OF_MEMORY_MESSAGES = ("not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
# Linux's control groups, which limit the memory of containers and of jobs on a cluster, and those of this process.
_GROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def positions_per_chunk(length: int, batch: int, vocabulary: int, budget: int = LOGITS_BYTES) -> int:
    """How many positions of a text go through the head at a time, so that these chunks are of even size.

    Several chunks are rounded up to a multiple of 32, which processors multiply faster, even beyond the budget.
    """
    limit = max(1, budget // (4 * batch * vocabulary))
    chunks = -(-length // limit)
    even = -(-length // chunks)
    return even if chunks == 1 else min(-(-even // 32) * 32, length)


def in_batches(
    rows: torch.Tensor, size: int, run: Callable[[torch.Tensor], Result], advice: str = "use shorter texts"
) -> Iterator[Result]:
    """Run a function on batches of rows, halving the batch size each time memory runs out.

    Args:
        rows (`torch.Tensor`): All rows.
        size (`int`): Rows in a batch, at first.
        run (`Callable`): Called with each batch. It may be called again with rows on which it failed.
        advice (`str`): What the error suggests when a single row does not fit.

    Yields:
        What the function returns for each batch.

    Raises:
        LayerPruneError: A single row does not fit into memory.
    """
    start, size = 0, max(1, size)
    while start < len(rows):
        batch = rows[start : start + size]
        try:
            result = run(batch)
        except (RuntimeError, MemoryError) as error:
            size = halve_batch(error, len(batch), f"text of {batch.shape[-1]} tokens; {advice}")
        else:
            start += len(batch)
            yield result
            continue
        free_memory()


def halve_batch(error: BaseException, size: int, single: str) -> int:
    """The batch size to continue with after an error, once [`free_memory`] has run.

    The error is raised again if memory did not run out. `single` says what a batch of one is, and what to do if even
    that does not fit.

    Raises:
        LayerPruneError: A batch of one does not fit into memory.
    """
    if not is_out_of_memory(error):
        raise error
    if size <= 1:
        raise LayerPruneError(f"out of memory with a single {single}") from error
    logger.warning("out of memory; continuing with batches of %d", size // 2)
    return size // 2


def free_bytes(device: torch.device) -> int:
    """The free memory of a device, including what torch has reserved for new tensors; 8 GiB if unknown."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type not in ("cpu", "mps"):
        return 8 << 30
    return min((psutil.virtual_memory().available, *_left_in_control_groups()))


def _left_in_control_groups() -> Iterator[int]:
    """The bytes that each control group of this process may still take. Cached files don't count, nor do mapped ones."""
    try:
        groups = _OWN_GROUPS.read_text(errors="surrogateescape").splitlines()
    except OSError:  # not Linux
        return
    for line in groups:
        controllers, _, path = line.partition(":")[2].partition(":")
        if not controllers:  # version 2
            root, limit, usage, total = _GROUPS, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            root, limit, usage, total = _GROUPS / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for folder in (root / group, *(root / parent for parent in group.parents)):
            try:
                most = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
                figures = dict(row.split() for row in (folder / "memory.stat").read_text().splitlines())
                files = int(figures[f"{total}active_file"]) + int(figures[f"{total}inactive_file"])
            except (OSError, ValueError, KeyError):  # no limit, or in a container, a group outside it
                continue
            yield max(0, most - used + files)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the machine or its GPU is out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, Exception) and (
        should_reduce_batch_size(error) or any(words in str(error) for words in _OUT_OF_MEMORY_MESSAGES)
    )


def free_memory() -> None:
    """Return memory that nothing uses: models in reference cycles, and what the GPU's allocator holds."""
    clear_device_cache(garbage_collection=True)
