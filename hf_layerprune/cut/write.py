"""Carry out a plan: copy bytes into a new folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from ..files.copy import LocalFile, NewFile, check_space
from ..files.shards import INDEX
from ..options import plural, spell_bytes
from ..screen import progress_bar
from .folder import SINGLE, check_index, read_json
from .header import read_header
from .plan import CheckpointPlan, ShardPlan

logger = logging.getLogger(__name__)


def fill(plan: CheckpointPlan, folder: Path, *, link: bool = False, name: str | None = None) -> None:
    """Write a planned checkpoint to an empty folder that does not have its final name yet; `name` is for messages.

    Raises:
        CheckpointError: The disk is too full, or the source changed.
        OSError: Writing failed.
    """
    name = name or folder.name
    linked = _linkable(plan, folder) if link else frozenset()
    total = plan.target_bytes - sum(shard.size for shard in plan.shards if shard.target in linked)
    logger.info(
        "%s: keeping %d of %s and %s of %s of weights%s", plan.name, len(plan.cut.keep), plural(plan.cut.num_layers, "layer"),
        spell_bytes(plan.weight_bytes), spell_bytes(plan.source_bytes),
        f"; linking {plural(len(linked), 'file')}" if linked else "",
    )  # fmt: skip
    check_space(folder.with_name(name), total, shutil.disk_usage(folder).free)
    with progress_bar(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name) as bar:
        for shard in plan.shards:
            for count in _write_shard(plan, shard, folder, shard.target in linked):
                bar.update(count)
        for companion, _ in plan.companions:
            for count in _write_companion(plan.source / companion, folder / companion):
                bar.update(count)
        for file, content in plan.files.items():
            with NewFile(folder / file) as output:
                output.write(content)
            bar.update(len(content))
    _check_written(plan, folder)


def _linkable(plan: CheckpointPlan, folder: Path) -> frozenset[str]:
    """The files that can be linked instead of copied."""
    for shard in plan.shards:
        if (plan.source / shard.source).stat().st_dev != folder.stat().st_dev:
            raise CheckpointError(
                f"{plan.source / shard.source} and {folder.parent} are on different file systems, which hard links can't "
                "span; write to the same file system, or omit --link (link=True)"
            )
    return frozenset(shard.target for shard in plan.shards if shard.whole)


def _write_shard(plan: CheckpointPlan, shard: ShardPlan, folder: Path, linked: bool) -> Iterator[int]:
    path = plan.source / shard.source
    with LocalFile(path) as source:
        source.check_unchanged(shard.version)
        if linked:
            # Link to the file itself: in the Hub client's cache, `path` is a symbolic link.
            os.link(os.path.realpath(path), folder / shard.target)
            return
        with NewFile(folder / shard.target) as output:
            output.write(shard.header)
            yield len(shard.header)
            for offset, length in shard.spans():
                yield from source.copy_into(output, offset, length)
        source.check_unchanged()


def _write_companion(path: Path, target: Path) -> Iterator[int]:
    target.parent.mkdir(exist_ok=True)
    with LocalFile(path) as source, NewFile(target) as output:
        yield from source.copy_into(output, 0, source.size)


def _check_written(plan: CheckpointPlan, folder: Path) -> None:
    """Read the headers and the index back and compare them with the plan."""
    headers = {shard.target: read_header(folder / shard.target) for shard in plan.shards}
    index = folder / INDEX
    if index.exists():
        check_index(
            read_json(index)["weight_map"], {file: header.names for file, header in headers.items()}, str(index)
        )
    names = {tensor.name for header in headers.values() for tensor in header.tensors}
    if names != set(plan.tensor_names.values()) or (not index.exists() and set(headers) != {SINGLE}):
        raise CheckpointError(f"{folder} was not written as planned; check the disk")
