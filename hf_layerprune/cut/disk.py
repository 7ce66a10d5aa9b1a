"""Drop decoder layers of a safetensors checkpoint on disk by renaming tensors and copying bytes.

The cut is first planned from headers, index and configs alone (`base.py`, `header.py`, `settings.py`, `plan.py`), and
every check is made at this point; then the bytes are copied. For a base on the Hub, only weight files with
tensors to keep are downloaded, into the Hub client's cache. Tensors are copied byte for byte whatever their type, so
quantised checkpoints are cut in the same way.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import families
from ..errors import CheckpointError
from ..files.copy import FileState, LocalFile, check_space, copy_model_file
from ..files.shards import INDEX
from ..options import format_bytes, pluralize
from ..records.fingerprints import CONFIG
from ..runtime.loading import load_config
from ..screen import progress_bar
from .base import Base, read_json, read_weights
from .complete import check_tensors
from .plan import CheckpointPlan, ShardPlan, new_names, plan_weights
from .settings import config_fields, encode_json, rewrite_quantiser_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


def plan_cut(source: Path | Base, drop_layers: Sequence[int]) -> CheckpointPlan:
    """Plan a cut from headers, index and config, and refuse it if it can't be exact. Nothing is written.

    The weights are in safetensors files. From the Hub, those with tensors to keep are downloaded into the client's
    cache.

    Raises:
        CheckpointError: The base is damaged, incomplete or inconsistent, or can't be reached.
        CutError: These layers can't be dropped from this model.
        UnsupportedModelError: The architecture is not proven to survive a cut.
    """
    base = source if isinstance(source, Base) else Base.open(source)
    folder = base.folder
    try:
        base.weights_file()  # refused before anything else is downloaded
        config = load_config(folder)
        cut = families.make_cut(config, drop_layers)
        new_config, content = cut_config_file(folder, config, cut)
        files = {CONFIG: content}
        companions = base.companions()
        files |= rewrite_quantiser_files(folder, cut, families.text_config(config) is not config)
        # Of a folder, all files are checked: a loader may find a tensor in a file that the index does not name for it.
        weights = read_weights(base, (lambda names: new_names(names, config, cut)[0]) if base.repo else None)
        planned = plan_weights(weights, config, cut)
        shapes = {name: tensor.shape for name, tensor in planned.tensors.items()}
        check_tensors(base.name, new_config, shapes, planned.layer_prefix)
        if planned.index is not None:
            files[INDEX] = encode_json(planned.index)
    except OSError as error:
        raise CheckpointError(f"could not read {folder}: {error.strerror or error}") from error
    return CheckpointPlan(
        **vars(planned),
        name=base.name,
        source=folder,
        cut=cut,
        config=new_config,
        files=files,
        companions=tuple((name, size) for name, size in companions if name not in files),
    )


def cut_config_file(folder: Path, config: PreTrainedConfig, cut: families.Cut) -> tuple[PreTrainedConfig, bytes]:
    """The config that a cut leaves of a folder's, which is `config` as loaded, and the content of its file."""
    new = families.cut_config(config, cut)
    return new, encode_json(config_fields(read_json(folder / CONFIG), new, cut.num_layers))


def execute_plan(plan: CheckpointPlan, folder: Path, *, link: bool = False, name: str | None = None) -> None:
    """Write a planned checkpoint to an empty folder that does not have its final name yet; `name` is for messages.

    Raises:
        CheckpointError: The disk is too full, or the source changed.
        OSError: Writing failed.
    """
    name = name or folder.name
    linked = {shard.target for shard in plan.shards if link and shard.whole}
    total = plan.target_bytes - sum(shard.size for shard in plan.shards if shard.target in linked)
    logger.info(
        "%s: keeping %d of %s and %s of weights%s", plan.name, len(plan.cut.keep), pluralize(plan.cut.num_layers, "layer"),
        format_bytes(plan.weight_bytes), f"; linking {pluralize(len(linked), 'file')}" if linked else ""
    )  # fmt: skip
    check_space(folder.with_name(name), total, shutil.disk_usage(folder).free)
    with progress_bar(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name) as bar:
        for shard in plan.shards:
            for count in _write_shard(plan, shard, folder, shard.target in linked):
                bar.update(count)
        copy_companions(plan.source, folder, [name for name, _ in plan.companions])
        bar.update(sum(size for _, size in plan.companions))
        for file, content in plan.files.items():
            with (folder / file).open("xb") as output:
                output.write(content)
            bar.update(len(content))
    if {*read_weights(Base.open(folder)).tensor_names} != {*plan.tensor_names.values()}:
        raise CheckpointError(f"{folder} was not written as planned; check the disk")


def copy_companions(source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy files of a model, such as those of its tokenizer and its processor, byte for byte, in place of any there.

    Raises:
        CheckpointError: One can't be read, or it is a link out of the folder.
    """
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        copy_model_file(source / name, source, folder / name)


def _write_shard(plan: CheckpointPlan, shard: ShardPlan, folder: Path, linked: bool) -> Iterator[int]:
    path = plan.source / shard.source
    with LocalFile(path) as source:
        source.check_unchanged(shard.version)
        if linked:
            # Link to the file itself: in the Hub client's cache, `path` is a symbolic link.
            os.link(os.path.realpath(path), folder / shard.target)
            source.check_unchanged(FileState.of_file(folder / shard.target))
            return
        with (folder / shard.target).open("xb") as output:
            output.write(shard.header)
            yield len(shard.header)
            for offset, length in shard.spans():
                yield from source.copy_into(output, offset, length)
        source.check_unchanged()
