"""Hidden states of training rows on disk: computed once, read in any order, each epoch again.

A store is a folder. Each column (`prefix`, `teacher`, ...) is a series of safetensors shards, and each shard holds the
states of some rows one after the other, without padding. A shard appears under its name only once it is whole, so what
was interrupted goes on where it was. `manifest.json` says of which rows and of which weights the states are; a store of
others is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import CheckpointError
from ..files.copy import check_space, write_failed, write_text

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
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
        """What so many tokens take."""
        return tokens * self.width * self.dtype.itemsize

    def described(self) -> dict[str, Any]:
        """For the manifest."""
        return {"width": self.width, "dtype": str(self.dtype).removeprefix("torch."), "source": self.source}


class StateStore:
    """The states of some rows, in a folder.

    Args:
        folder (`Path`): Where; it is made if needed.
        lengths (`Sequence[int]`): Tokens of each row.
        rows (`str`): A hash of the rows, see [`hash_rows`].
        columns (`list[Column]`): What is stored.
        shard_bytes (`int`, *optional*): About how large a shard is.
        main (`bool`, defaults to `True`): Whether this process makes the folder; others wait for it before they come.

    Raises:
        CheckpointError: The folder holds states of other rows or weights, or its disk has no room for these.
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
        self.columns = {column.name: column for column in columns}
        self._lengths = np.asarray(lengths, dtype=np.int64)
        # Rows of one length beside each other, so that a batch of them needs no padding; the longest first, so that
        # what does not fit in memory shows at once.
        order = np.argsort(-self._lengths, kind="stable")
        widest = max(column.width * column.dtype.itemsize for column in columns)
        self.shards = _divided(order, self._lengths, max(1, shard_bytes // widest))
        self._place = np.zeros((len(lengths), 2), dtype=np.int64)
        for index, shard in enumerate(self.shards):
            ends = np.cumsum(self._lengths[shard])
            self._place[shard, 0] = index
            self._place[shard, 1] = ends - self._lengths[shard]
        self._open: dict[tuple[int, str, int], Any] = {}
        self._rows = rows
        self._main = main
        if main:
            self._claim()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # a data loader's worker opens its own

    def add(self, column: Column) -> None:
        """One more column, where it turns out that it is needed."""
        self.columns[column.name] = column
        if self._main:
            self._claim()

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
        tokens = int(self._lengths[self.shards[shard]].sum())
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
        found = []
        for row in rows:
            shard, start = map(int, self._place[row])
            path = self._path(column, shard)
            key = (os.getpid(), column, shard)  # an open file is not to be shared with a worker's process
            try:
                if key not in self._open:
                    self._open[key] = safe_open(path, framework="pt").get_slice("states")
                found.append(self._open[key][start : start + self.length_of(row)])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} can't be read ({error}); delete {self.folder} and run again") from error
        return found

    def forget(self, column: str) -> None:
        """Delete a column that has served."""
        self._open = {key: shard for key, shard in self._open.items() if key[1] != column}
        for path in self.folder.glob(f"{column}-*.safetensors"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files."""
        self._open.clear()

    def _path(self, column: str, shard: int) -> Path:
        return self.folder / f"{column}-{shard:05d}-of-{len(self.shards):05d}.safetensors"

    def _claim(self) -> None:
        """Make the folder ours, or check that it is."""
        path = self.folder / MANIFEST
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "rows": self._rows,
            "shards": len(self.shards),
            "columns": {name: column.described() for name, column in self.columns.items()},
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            found = json.loads(path.read_text()) if path.is_file() else None
        except OSError as error:
            raise write_failed(self.folder, error) from error
        except ValueError as error:
            raise CheckpointError(f"{path} is damaged ({error}); delete {self.folder} and run again") from error
        if found is not None:
            self._compare(found, manifest)
            manifest["columns"] = found["columns"] | manifest["columns"]
        elif strangers := [entry.name for entry in self.folder.iterdir() if not entry.name.startswith(".")]:
            raise CheckpointError(
                f"{self.folder} is to hold hidden states, and has other things in it ({strangers[0]}, ...); name an "
                "empty folder"
            )
        self._announce()
        write_text(path, json.dumps(manifest, indent=2) + "\n")

    def _compare(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        way_out = "delete it, or name another folder with --cache_dir"
        if found.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(f"{self.folder} was written by another version of hf-layerprune; {way_out}")
        if (found.get("rows"), found.get("shards")) != (wanted["rows"], wanted["shards"]):
            raise CheckpointError(f"{self.folder} holds the hidden states of other training rows; {way_out}")
        for name, column in wanted["columns"].items():
            other = found["columns"].get(name)
            if other is not None and other != column:
                what = "another model" if other["source"] != column["source"] else "another form"
                raise CheckpointError(f"{self.folder} holds the {name} states of {what}; {way_out}")

    def _announce(self) -> None:
        need = {
            name: sum(column.bytes_of(int(self._lengths[self.shards[i]].sum())) for i in self.missing(name))
            for name, column in self.columns.items()
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
    """A hash of named tensors and of whatever else decides what comes out of them.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): On any device.
        settings: Anything that prints the same each time.

    Returns:
        `str`: A sha256.
    """
    digest = hashlib.sha256(repr(settings).encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
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
                for name, found in run(rows).items():
                    states[name] += [part.cpu() for part in found]
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
