"""Hidden states of training rows on disk: computed once, read in any order, each epoch again.

Each column (`prefix`, `teacher`, ...) is a folder of safetensors shards, and each shard holds the states of some rows one
after the other, without padding. A shard appears under its name only once it is whole, so an interrupted run goes on
where it was. The folder's name holds a hash of the rows, the weights and the settings that the states come from, so
states of anything else are never read.
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
        width (`int`): Numbers a token.
        dtype (`torch.dtype`): Of each.
        source (`str`): A hash of all that decides their values but the rows: weights, layers, kernels.
    """

    name: str
    width: int
    dtype: torch.dtype
    source: str

    def bytes_of(self, tokens: int) -> int:
        """Bytes of the states of some number of tokens."""
        return tokens * self.width * self.dtype.itemsize


class StateStore:
    """The states of some rows, in a folder.

    Args:
        folder (`Path`): Where; it is made if needed.
        lengths (`Sequence[int]`): Tokens of each row.
        rows (`str`): A hash of the rows, see [`hash_rows`].
        columns (`list[Column]`): What is stored.
        shard_bytes (`int`, *optional*): About how large a shard is.
        main (`bool`, defaults to `True`): Whether this process makes the folders; others wait for it before they come.

    Raises:
        CheckpointError: The folder can't be made, or its disk has no room for the states.
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
        # Rows of one length beside each other, so that a batch of them needs no padding; the longest first, so that
        # what does not fit in memory shows at once.
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
        return {**self.__dict__, "_open": {}}  # a data loader's worker opens its own

    def add(self, *columns: Column) -> None:
        """Store more columns.

        Args:
            columns (`Column`): Which ones.

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
        """How many tokens all rows have."""
        return int(self._lengths.sum())

    def missing(self, column: str) -> list[int]:
        """Shards of a column that are still to be written."""
        return [index for index in range(len(self.shards)) if not self._path(column, index).is_file()]

    def rows_of(self, shard: int) -> list[int]:
        """The rows of a shard, in its order."""
        return self.shards[shard].tolist()

    def length_of(self, row: int) -> int:
        """Tokens of a row."""
        return int(self._lengths[row])

    def write(self, column: str, shard: int, states: torch.Tensor) -> None:
        """Store a shard, whole or not at all.

        Args:
            column (`str`): Which kind.
            shard (`int`): Which shard.
            states (`torch.Tensor`): Those of its rows, one after the other, `[tokens, width]`.
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
            column (`str`): Which kind.
            rows (`Iterable[int]`): Which rows.

        Returns:
            `list[torch.Tensor]`: For each row `[tokens, width]`, on the CPU.

        Raises:
            CheckpointError: A shard is missing or damaged.
        """
        states = []
        for row in rows:
            shard, start = map(int, self._place[row])
            path = self._path(column, shard)
            key = (os.getpid(), column, shard)  # an open file is not to be shared with a worker's process
            try:
                if key not in self._open:
                    self._open[key] = safe_open(path, framework="pt").get_slice("states")
                states.append(self._open[key][start : start + self.length_of(row)])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} can't be read ({error}); delete {self.folder} and run again") from error
        return states

    def forget(self, column: str) -> None:
        """Delete a column, where it is stored."""
        if column not in self.columns:
            return
        self._open = {key: shard for key, shard in self._open.items() if key[1] != column}
        shutil.rmtree(self._folder(column), ignore_errors=True)

    def delete(self) -> None:
        """Delete all columns, and the folder, if it then is empty."""
        for column in self.columns:
            self.forget(column)
        with suppress(OSError):
            self.folder.rmdir()

    def close(self) -> None:
        """Close the files."""
        self._open.clear()

    def _folder(self, column: str) -> Path:
        """A column's folder, named by everything that decides what is in it."""
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
            logger.info("%s has all hidden states of %d rows", self.folder, len(self._lengths))
            return
        free = shutil.disk_usage(self.folder).free
        logger.info(
            "%s will take %s for the hidden states of %s tokens (%s); %s are free",
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
        columns (`Sequence[str]`, *optional*): What counts, where it is there.

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
    """A hash of named tensors and of everything else that decides what is computed from them.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): On any device.
        settings: Anything that prints the same each time.

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
        store (`StateStore`): Where to.
        columns (`Sequence[str]`): What `run` gives.
        shards (`Sequence[int]`): Which shards.
        run (`Callable`): From some rows to the states of each, by column, on any device.
        max_tokens (`int`): How many tokens, padding included, go through the model at once.
        description (`str`): For the progress bar.
        show (`bool`, defaults to `True`): Whether there is one.
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
    """Neighbours, as many as fit: rows are sorted, so the first of a batch is its longest."""
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
