"""Carry out a plan: copy bytes into a new folder."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import CheckpointError
from ..files.copy import LocalFile, check_space
from ..options import plural, spell_bytes
from ..screen import progress_bar
from .base import Base, read_weights
from .plan import CheckpointPlan, ShardPlan

logger = logging.getLogger(__name__)


def fill(plan: CheckpointPlan, folder: Path, *, link: bool = False, name: str | None = None) -> None:
    """Write a planned checkpoint to an empty folder that does not have its final name yet; `name` is for messages.

    Raises:
        CheckpointError: The disk is too full, or the source changed.
        OSError: Writing failed.
    """
    name = name or folder.name
    linked = {shard.target for shard in plan.shards if link and shard.whole}
    total = plan.target_bytes - sum(shard.size for shard in plan.shards if shard.target in linked)
    logger.info(
        "%s: keeping %d of %s and %s of weights%s", plan.name, len(plan.cut.keep), plural(plan.cut.num_layers, "layer"),
        spell_bytes(plan.weight_bytes), f"; linking {plural(len(linked), 'file')}" if linked else "",
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
            with (folder / file).open("xb") as output:
                output.write(content)
            bar.update(len(content))
    if {*read_weights(Base.open(folder)).tensor_names} != {*plan.tensor_names.values()}:
        raise CheckpointError(f"{folder} was not written as planned; check the disk")


def _write_shard(plan: CheckpointPlan, shard: ShardPlan, folder: Path, linked: bool) -> Iterator[int]:
    path = plan.source / shard.source
    with LocalFile(path) as source:
        source.check_unchanged(shard.version)
        if linked:
            # Link to the file itself: in the Hub client's cache, `path` is a symbolic link.
            os.link(os.path.realpath(path), folder / shard.target)
            return
        with (folder / shard.target).open("xb") as output:
            output.write(shard.header)
            yield len(shard.header)
            for offset, length in shard.spans():
                yield from source.copy_into(output, offset, length)
        source.check_unchanged()


def _write_companion(path: Path, target: Path) -> Iterator[int]:
    target.parent.mkdir(exist_ok=True)
    with LocalFile(path) as source, target.open("xb") as output:
        yield from source.copy_into(output, 0, source.size)
