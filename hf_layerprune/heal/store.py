"""Hidden states of training rows on disk: computed once, and read in any order in each epoch.

A cache is a folder of safetensors shards, each with the states of some rows by row number. A shard gets its name only
once it is complete, so an interrupted run can resume. The folder's name is a hash of the rows, the weights, the
settings and the version of transformers that decide the states, so stale states are never read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files.copy import check_space, new_file, write_error
from ..files.locks import lock_folder, unlock_folder
from ..options import format_bytes
from ..runtime.memory import free_memory, halve_batch
from ..screen import progress_bar

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SHARD_BYTES = 128 * 2**20  # of a shard, about
_KEEP_MARKER = "kept"  # the file by which a run with `keep_cache` tells all others to leave a folder


class StateCache:
    """One kind of states of all rows, in a folder. Processes that share the folder share the work.

    Args:
        folder (`Path`): The folder; [`create_cache_folders`] creates it.
        lengths (`Sequence[int]`): Tokens of each row.
        token_bytes (`int`): Size of a token's states.
        keep (`bool`, defaults to `False`): Whether the folder stays, also after other runs that use it.
    """

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        token_bytes: int,
        *,
        keep: bool = False,
    ) -> None:
        self._lock: int | None = None
        self.folder, self.keep = folder, keep
        self._token_bytes = token_bytes
        self._lengths = np.asarray(lengths, dtype=np.int64)
        # Sort rows by length, so that batches need little padding; the longest come first, so that running out of
        # memory happens at once.
        order = np.argsort(-self._lengths, kind="stable")
        starts = np.cumsum(self._lengths[order]) - self._lengths[order]
        _, firsts = np.unique(starts * token_bytes // SHARD_BYTES, return_index=True)
        self.shards = [rows.tolist() for rows in np.split(order, firsts[1:])]
        self._shard_of = {row: index for index, rows in enumerate(self.shards) for row in rows}
        self._open: dict[tuple[int, int], Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}, "_lock": None}  # each data loader worker opens its own files

    def missing(self) -> list[int]:
        """Indices of the shards that have not been written yet."""
        return [index for index in range(len(self.shards)) if not self._path(index).is_file()]

    def size_of(self, shards: Iterable[int]) -> int:
        """The size of some shards."""
        return sum(int(self._lengths[self.shards[index]].sum()) for index in shards) * self._token_bytes

    def fill(
        self,
        run: Callable[[list[int]], list[torch.Tensor]],
        max_tokens: int,
        description: str,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Compute this process's share of the missing shards.

        Args:
            run (`Callable`): Takes row numbers and returns the states of each row, `[tokens, width]`, on any device.
            max_tokens (`int`): The most tokens, padding included, that go through the model at a time.
            description (`str`): Label of the progress bar.
            share (`tuple[int, int]`, *optional*): Rank of this process, and number of processes.

        Raises:
            CheckpointError: A shard can't be written.
            LayerPruneError: A single row does not fit into memory. Batches that do not fit are halved.
        """
        rank, world = share
        mine = [index for index in self.missing() if index % world == rank]
        tokens = self.size_of(mine) // self._token_bytes
        with progress_bar(
            total=tokens, unit="token", unit_scale=True, desc=description, disable=True if rank or not mine else None
        ) as bar:
            for index in mine:
                states: dict[str, torch.Tensor] = {}
                left = self.shards[index]
                while left:
                    longest = int(self._lengths[left[0]])
                    rows = left[: max(1, max_tokens // longest)]
                    try:
                        parts = [part.to("cpu", copy=True) for part in run(rows)]
                    except (RuntimeError, MemoryError) as error:
                        max_tokens = halve_batch(error, len(rows), "row; use a smaller --max_length") * longest
                    else:
                        states |= {str(row): part for row, part in zip(rows, parts, strict=True)}
                        left = left[len(rows) :]
                        bar.update(int(self._lengths[rows].sum()))
                        continue
                    free_memory()
                self._write(index, states)

    def read(self, rows: Iterable[int]) -> list[torch.Tensor]:
        """The states of some rows, `[tokens, width]` each, on the CPU.

        Raises:
            CheckpointError: A shard is missing or damaged.
        """
        states = []
        for row in rows:
            index = self._shard_of[row]
            path, key = self._path(index), (os.getpid(), index)  # worker processes must not share an open file
            try:
                if key not in self._open:
                    self._open[key] = safe_open(path, framework="pt")
                states.append(self._open[key].get_tensor(str(row)))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} can't be read ({error}); delete {self.folder} and run again") from error
        return states

    def acquire(self) -> None:
        """Keep other runs with the same states from deleting the folder, as long as this object lives, or for ever."""
        if self._lock is None:
            self._lock = lock_folder(self.folder, shared=True)
        if self.keep:
            (self.folder / _KEEP_MARKER).touch()

    def __del__(self) -> None:
        if self._lock is not None:  # a worker that was forked has a descriptor of its own
            os.close(self._lock)

    def delete(self) -> None:
        """Delete the folder, unless a run keeps or uses it, and the folder around it if it is empty then."""
        self._open.clear()
        unlock_folder(self._lock)
        self._lock = None
        try:
            lock = lock_folder(self.folder)
        except BlockingIOError:
            logger.info("%s stays, since another run uses it", self.folder)
            return
        except FileNotFoundError:
            return
        if not (self.folder / _KEEP_MARKER).exists():
            shutil.rmtree(self.folder, ignore_errors=True)
        unlock_folder(lock)
        with suppress(OSError):
            self.folder.parent.rmdir()

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:05d}-of-{len(self.shards):05d}.safetensors"

    def _write(self, index: int, states: dict[str, torch.Tensor]) -> None:
        with new_file(self._path(index), force=True) as partial:
            save_file(states, partial)


def create_cache_folders(caches: Sequence[StateCache]) -> None:
    """Create the folders of caches, all in one folder, if their disk has room for all missing states.

    Raises:
        CheckpointError: A folder can't be created, or its disk has no room for the states.
    """
    parent = caches[0].folder.parent
    needed = sum(cache.size_of(cache.missing()) for cache in caches)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        if needed:
            free = shutil.disk_usage(parent).free
            logger.info(
                "%s will take up %s for hidden states; %s is free", parent, format_bytes(needed), format_bytes(free)
            )
            check_space(parent, needed, free)
        else:
            logger.info("%s already has the hidden states of all rows", parent)
        for cache in caches:
            cache.folder.mkdir(exist_ok=True)
            cache.acquire()
    except OSError as error:
        raise write_error(parent, error) from error


def hash_rows(dataset: Dataset) -> str:
    """A sha256 of the tokens of prepared rows, and of how they are packed."""
    digest = hashlib.sha256()
    for name in ("input_ids", "seq_lengths"):
        if name in dataset.column_names:
            for row in dataset.with_format(None).select_columns([name]):
                values = np.asarray(row[name], dtype=np.int64)
                digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    return digest.hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]], *settings: Any) -> str:
    """A sha256 of named tensors and of a computation's settings, which need a stable `repr`."""
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
