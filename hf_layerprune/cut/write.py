"""Carrying out a plan: a plain copy loop into a new folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..errors import CheckpointError
from ..files.copy import LocalFile, Source, Writeback, check_space, write_all
from ..files.folders import new_folder
from .folder import INDEX, SINGLE, check_index, read_json
from .header import read_header
from .plan import CheckpointPlan, Rows, ShardPlan

if TYPE_CHECKING:
    from .download import Download

logger = logging.getLogger(__name__)

# What is read at once where a tensor is copied in slices of its rows.
_ROWS_CHUNK = 8 << 20


def write_checkpoint(
    plan: CheckpointPlan, target: Path, *, force: bool = False, link: bool = False, progress: bool = True
) -> None:
    """Follow a plan.

    Args:
        plan (`CheckpointPlan`): What to write.
        target (`Path`): The folder to make.
        force (`bool`, *optional*, defaults to `False`): Replace the target if it is a model folder already.
        link (`bool`, *optional*, defaults to `False`): Hard-link weight files that stay as they are.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Raises:
        CheckpointError: The target is in the way, the disk is too full, the source changed, or writing failed.
    """
    with new_folder(target, force=force, apart_from=plan.source) as folder:
        fill(plan, folder, link=link, progress=progress, name=target.name)


def fill(
    plan: CheckpointPlan, folder: Path, *, link: bool = False, progress: bool = True, name: str | None = None
) -> None:
    """Follow a plan into a folder that is there, empty, and not yet under its final name.

    Args:
        plan (`CheckpointPlan`): What to write.
        folder (`Path`): Where to.
        link (`bool`, *optional*, defaults to `False`): Hard-link weight files that stay as they are.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.
        name (`str`, *optional*): What the progress bar calls it.

    Raises:
        CheckpointError: The disk is too full, or the source changed.
        OSError: Writing failed.
    """
    if plan.remote:
        from .download import Download

        with Download(plan, folder.parent, name or folder.name) as download:
            _fill(plan, folder, link, progress, name or folder.name, download)
    else:
        _fill(plan, folder, link, progress, name or folder.name, None)


def _fill(
    plan: CheckpointPlan, folder: Path, link: bool, progress: bool, name: str, download: Download | None
) -> None:
    linked = _linkable(plan, folder) if link else frozenset()
    total = plan.target_bytes - sum(shard.size for shard in plan.shards if shard.target in linked)
    free = shutil.disk_usage(folder).free
    logger.info(
        "%s: keeping %d of %d layers; %d bytes to read and write, of %d, %d files to link; %d bytes free",
        plan.source,
        len(plan.cut.keep),
        plan.cut.num_layers,
        total,
        plan.source_bytes,
        len(linked),
        free,
    )
    check_space(folder.with_name(name), total - (download.done if download else 0), free)
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name, disable=not progress) as bar:
        if download is not None:
            download.fetch(bar.update)
        for shard in plan.shards:
            if shard.source in plan.remote:
                continue
            for count in _write_shard(plan, shard, folder, shard.target in linked):
                bar.update(count)
        for companion, _ in plan.companions:
            for count in _write_companion(plan.source / companion, folder / companion):
                bar.update(count)
        for file, content in plan.files.items():
            with _NewFile(folder / file) as output:
                write_all(output.descriptor, content)
            bar.update(len(content))
        if download is not None:
            # Last: a run that is killed before has its downloads kept for the next one.
            download.move_into(folder)
    _check_written(plan, folder)


def _linkable(plan: CheckpointPlan, folder: Path) -> frozenset[str]:
    """The files that can be linked instead of copied."""
    shards = [shard for shard in plan.shards if shard.source not in plan.remote]
    for shard in shards:
        if (plan.source / shard.source).stat().st_dev != folder.stat().st_dev:
            raise CheckpointError(
                f"{plan.source / shard.source} and {folder.parent} are on different file systems, and a hard link can't reach "
                "from one to the other; write to the same file system, or do without --link (link=True)"
            )
    return frozenset(shard.target for shard in shards if shard.whole)


class _NewFile:
    """A new file, brought to disk when it is complete. It is never made through a link that somebody left there."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)


def _write_shard(plan: CheckpointPlan, shard: ShardPlan, folder: Path, linked: bool) -> Iterator[int]:
    path = plan.source / shard.source
    with LocalFile(path) as source:
        _check_same(source, shard)
        if linked:
            # The file itself, not a link to it, as in the cache of the Hub client.
            os.link(os.path.realpath(path), folder / shard.target)
        else:
            with _NewFile(folder / shard.target) as output:
                write_all(output.descriptor, shard.header)
                yield len(shard.header)
                writeback = Writeback(output.descriptor)
                for piece in shard.pieces:
                    if isinstance(piece, Rows):
                        counts = copy_rows(source, output.descriptor, piece)
                    else:
                        counts = source.copy_into(output.descriptor, piece.offset, piece.length)
                    for count in counts:
                        writeback.add(count)
                        yield count
            _check_same(source, shard)


def _check_same(source: Source, shard: ShardPlan) -> None:
    if source.version != shard.version:
        raise CheckpointError(f"{source.name} changed while it was read; make sure that nothing else writes it")


def copy_rows(source: Source, output: int, piece: Rows) -> Iterator[int]:
    """Append some columns of a matrix to a file, yielding the size of each chunk once it is written.

    Args:
        source (`Source`): The file that holds the matrix.
        output (`int`): Descriptor of a file that is open for writing.
        piece (`Rows`): The matrix and its columns.

    Yields:
        `int`: The size of each chunk.
    """
    at_once = _ROWS_CHUNK // piece.row_bytes
    if not at_once:
        for row in range(piece.rows):
            for span in piece.columns:
                yield from source.copy_into(output, piece.offset + row * piece.row_bytes + span.offset, span.length)
        return
    for row in range(0, piece.rows, at_once):
        count = min(at_once, piece.rows - row)
        data = source.read(piece.offset + row * piece.row_bytes, count * piece.row_bytes)
        kept = take_columns(data, piece)
        write_all(output, kept)
        yield len(kept)


def take_columns(data: bytes, piece: Rows) -> memoryview:
    """Keep some columns of a stretch of rows.

    Args:
        data (`bytes`): Whole rows.
        piece (`Rows`): The matrix and its columns.

    Returns:
        `memoryview`: What stays, row after row.
    """
    import numpy as np

    block = np.frombuffer(data, np.uint8).reshape(-1, piece.row_bytes)
    kept = np.concatenate([block[:, start : start + length] for start, length in piece.columns], axis=1)
    return memoryview(kept).cast("B")


def _write_companion(path: Path, target: Path) -> Iterator[int]:
    target.parent.mkdir(exist_ok=True)
    with LocalFile(path) as source, _NewFile(target) as output:
        yield from source.copy_into(output.descriptor, 0, source.size)


def _check_written(plan: CheckpointPlan, folder: Path) -> None:
    """Read back what says where the tensors are."""
    headers = {}
    for shard in plan.shards:
        with LocalFile(folder / shard.target) as file:
            headers[shard.target] = read_header(file)
    index = folder / INDEX
    if index.exists():
        check_index(read_json(index), headers, str(index))
    names = {tensor.name for header in headers.values() for tensor in header.tensors}
    if names != set(plan.tensor_names.values()) or (not index.exists() and set(headers) != {SINGLE}):
        raise CheckpointError(f"{folder} did not come out as planned; check the disk")
