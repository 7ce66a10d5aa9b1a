"""Hidden states of training rows on disk: computed once, and read in any order in each epoch.

Each column (`prefix`, `teacher`, ...) is a folder of safetensors shards, and each shard holds the states of some rows,
concatenated without padding. A shard gets its name only once it is complete, so an interrupted run can resume. The
folder's name contains a hash of the rows, the weights and the settings that decide the states, so stale states are
never read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files.copy import check_space, write_failed

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

SHARD_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Column:
    """One kind of states.

    Args:
        name (`str`): Such as `"prefix"`.
        width (`int`): Size of a token's states.
        dtype (`torch.dtype`): Type of the states.
        source (`str`): A hash of everything but the rows that decides their values: weights, layers, kernels.
    """

    name: str
    width: int
    dtype: torch.dtype
    source: str

    def bytes_of(self, tokens: int) -> int:
        """The size in bytes of the states of a number of tokens."""
        return tokens * self.width * self.dtype.itemsize


class StateStore:
    """The states of some rows, in a folder.

    Args:
        folder (`Path`): The folder; it is created if necessary.
        lengths (`Sequence[int]`): Tokens of each row.
        rows (`str`): A hash of the rows, see [`hash_rows`].
        columns (`list[Column]`): The kinds of states to store.
        shard_bytes (`int`, *optional*): Approximate size of a shard.
        main (`bool`, defaults to `True`): Whether this process creates the folders; the others must wait for it.

    Raises:
        CheckpointError: The folder can't be created, or its disk has no room for the states.
    """

    def __init__(
        self,
        folder: Path,
        lengths: Sequence[int],
        rows: str,
        columns: list[Column],
        *,
        shard_bytes: int = SHARD_BYTES,
        main: bool = True,
    ) -> None:
        self.folder = folder
        self.columns: dict[str, Column] = {}
        self._rows = rows
        self._main = main
        self._lengths = np.asarray(lengths, dtype=np.int64)
        # Sort rows by length, so that batches need little padding; the longest come first, so that running out of
        # memory happens at once.
        order = np.argsort(-self._lengths, kind="stable")
        widest = max(column.width * column.dtype.itemsize for column in columns)
        self._shard_tokens = max(1, shard_bytes // widest)
        self.shards = _divided(order, self._lengths, self._shard_tokens)
        self._place = np.zeros((len(lengths), 2), dtype=np.int64)
        for index, shard in enumerate(self.shards):
            ends = np.cumsum(self._lengths[shard])
            self._place[shard, 0] = index
            self._place[shard, 1] = ends - self._lengths[shard]
        self._open: dict[tuple[int, str, int], Any] = {}
        self.add(*columns)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each data loader worker opens its own files

    def add(self, *columns: Column) -> None:
        """Add columns to the store.

        Args:
            columns (`Column`): The columns.

        Raises:
            CheckpointError: See the class.
        """
        self.columns |= {column.name: column for column in columns}
        if not self._main:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._check_room([column.name for column in columns])
            for column in columns:
                self._folder(column.name).mkdir(exist_ok=True)
        except OSError as error:
            raise write_failed(self.folder, error) from error

    @property
    def tokens(self) -> int:
        """The number of tokens in all rows."""
        return int(self._lengths.sum())

    def missing(self, column: str) -> list[int]:
        """Indices of a column's shards that have not been written yet."""
        return [index for index in range(len(self.shards)) if not self._path(column, index).is_file()]

    def rows_of(self, shard: int) -> list[int]:
        """The rows of a shard, in its order."""
        return self.shards[shard].tolist()

    def length_of(self, row: int) -> int:
        """The number of tokens in a row."""
        return int(self._lengths[row])

    def write(self, column: str, shard: int, states: torch.Tensor) -> None:
        """Write a shard atomically.

        Args:
            column (`str`): Name of the column.
            shard (`int`): Index of the shard.
            states (`torch.Tensor`): The concatenated states of its rows, `[tokens, width]`.
        """
        wanted = self.columns[column]
        tokens = self._tokens_of(shard)
        if tuple(states.shape) != (tokens, wanted.width) or states.dtype != wanted.dtype:
            raise ValueError(
                f"{column} {shard} is {states.dtype} {tuple(states.shape)}, not {wanted} of {tokens} tokens"
            )
        path = self._path(column, shard)
        partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        try:
            save_file({"states": states.contiguous().cpu()}, partial)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise write_failed(path, error if isinstance(error, OSError) else OSError(str(error))) from error
        finally:
            partial.unlink(missing_ok=True)

    def read(self, column: str, rows: Iterable[int]) -> list[torch.Tensor]:
        """The states of some rows.

        Args:
            column (`str`): Name of the column.
            rows (`Iterable[int]`): Numbers of the rows.

        Returns:
            `list[torch.Tensor]`: `[tokens, width]` for each row, on the CPU.

        Raises:
            CheckpointError: A shard is missing or damaged.
        """
        states = []
        for row in rows:
            shard, start = map(int, self._place[row])
            path = self._path(column, shard)
            key = (os.getpid(), column, shard)  # worker processes must not share an open file
            try:
                if key not in self._open:
                    self._open[key] = safe_open(path, framework="pt").get_slice("states")
                states.append(self._open[key][start : start + self.length_of(row)])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} can't be read ({error}); delete {self.folder} and run again") from error
        return states

    def forget(self, column: str) -> None:
        """Delete a column, if it is stored."""
        if column not in self.columns:
            return
        self._open = {key: shard for key, shard in self._open.items() if key[1] != column}
        shutil.rmtree(self._folder(column), ignore_errors=True)

    def delete(self) -> None:
        """Delete all columns, and the folder if it is empty then."""
        for column in self.columns:
            self.forget(column)
        with suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Close the files."""
        self._open.clear()

    def _folder(self, column: str) -> Path:
        """A column's folder, named by a hash of everything that decides its contents."""
        known = hash_tensors([], self._rows, self._shard_tokens, self.columns[column])
        return self.folder / f"{column}-{known[:16]}"

    def _path(self, column: str, shard: int) -> Path:
        return self._folder(column) / f"{shard:05d}-of-{len(self.shards):05d}.safetensors"

    def _check_room(self, columns: list[str]) -> None:
        need = {
            name: sum(self.columns[name].bytes_of(self._tokens_of(shard)) for shard in self.missing(name))
            for name in columns
        }
        if not any(need.values()):
            logger.info("%s already has the hidden states of all %d rows", self.folder, len(self._lengths))
            return
        free = shutil.disk_usage(self.folder).free
        logger.info(
            "%s will take up %s for the hidden states of %s tokens (%s); %s is free",
            self.folder,
            _size(sum(need.values())),
            f"{self.tokens:,}",
            ", ".join(f"{name} {_size(count)}" for name, count in need.items() if count),
            _size(free),
        )
        check_space(self.folder, sum(need.values()), free)

    def _tokens_of(self, shard: int) -> int:
        return int(self._lengths[self.shards[shard]].sum())


def hash_rows(dataset: Dataset, columns: Sequence[str] = ("input_ids", "seq_lengths")) -> str:
    """A hash of the tokens of prepared rows, and of how they are packed.

    Args:
        dataset (`Dataset`): With `input_ids`.
        columns (`Sequence[str]`, *optional*): The columns to hash; missing ones are skipped.

    Returns:
        `str`: A sha256.
    """
    digest = hashlib.sha256()
    for name in columns:
        if name in dataset.column_names:
            for row in dataset.with_format(None).select_columns([name]):
                values = np.asarray(row[name], dtype=np.int64)
                digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    return digest.hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]], *settings: Any) -> str:
    """A hash of named tensors and of the settings of a computation with them.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): Names and tensors, on any device.
        settings: Values with a stable `repr`.

    Returns:
        `str`: A sha256.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def fill(
    store: StateStore,
    columns: Sequence[str],
    shards: Sequence[int],
    run: Callable[[list[int]], dict[str, list[torch.Tensor]]],
    max_tokens: int,
    description: str,
    show: bool = True,
) -> None:
    """Compute shards and store them.

    Args:
        store (`StateStore`): The store to write to.
        columns (`Sequence[str]`): The columns that `run` returns.
        shards (`Sequence[int]`): Indices of the shards.
        run (`Callable`): Takes row numbers and returns, for each column, the states of each row, on any device.
        max_tokens (`int`): The most tokens, padding included, that go through the model at a time.
        description (`str`): Label of the progress bar.
        show (`bool`, defaults to `True`): Whether to show a progress bar.
    """
    from tqdm.auto import tqdm

    tokens = sum(store.length_of(row) for shard in shards for row in store.rows_of(shard))
    with tqdm(total=tokens, unit="token", unit_scale=True, desc=description, disable=not show or not tokens) as bar:
        for shard in shards:
            states: dict[str, list[torch.Tensor]] = {name: [] for name in columns}
            for rows in _batches(store.rows_of(shard), store.length_of, max_tokens):
                for name, of_rows in run(rows).items():
                    states[name] += [part.cpu() for part in of_rows]
                bar.update(sum(map(store.length_of, rows)))
            for name, parts in states.items():
                store.write(name, shard, torch.cat(parts))


def _batches(rows: list[int], length_of: Callable[[int], int], max_tokens: int) -> Iterable[list[int]]:
    """Split sorted rows into batches of at most `max_tokens`; the first row of a batch is its longest."""
    batch: list[int] = []
    for row in rows:
        if batch and (len(batch) + 1) * length_of(batch[0]) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _divided(order: np.ndarray, lengths: np.ndarray, max_tokens: int) -> list[np.ndarray]:
    shards, start, tokens = [], 0, 0
    for place, row in enumerate(order):
        if place > start and tokens + lengths[row] > max_tokens:
            shards.append(order[start:place])
            start, tokens = place, 0
        tokens += int(lengths[row])
    return [*shards, order[start:]]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
