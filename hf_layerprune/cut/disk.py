"""Drop decoder layers of a safetensors checkpoint on disk by renaming tensors and copying bytes.

    from hf_layerprune.cut.disk import cut_checkpoint

    cut_checkpoint("Llama-3.1-8B", "Llama-3.1-6B", drop_layers=range(21, 29))
    cut_checkpoint("meta-llama/Llama-3.1-8B", "Llama-3.1-6B", drop_layers=range(21, 29))

The cut is first planned from headers, index and configs alone (`base.py`, `header.py`, `settings.py`, `plan.py`), and
every check is made at this point; then the bytes are copied (`write.py`). For a base on the Hub, only weight files with
tensors to keep are downloaded, into the Hub client's cache. Tensors are copied byte for byte whatever their type, so
quantised checkpoints are cut in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import families
from ..errors import CheckpointError
from ..files.folders import check_target
from ..runtime.loading import load_config
from .base import Base, read_weights
from .complete import check_tensors
from .folder import CONFIG, INDEX, find_weights, read_json
from .plan import CheckpointPlan, new_names, plan_weights
from .settings import config_fields, quantiser_files, to_bytes
from .write import write_checkpoint

__all__ = ["CheckpointPlan", "cut_checkpoint", "plan_cut", "write_checkpoint"]


def plan_cut(source: str | os.PathLike[str] | Base, drop_layers: Sequence[int], **hub: Any) -> CheckpointPlan:
    """Plan a cut from headers, index and config, and refuse it if it can't be exact. Nothing is written.

    Args:
        source (`str`, `os.PathLike` or `Base`): The base's folder, with safetensors weights, or its Hub id. From the
            Hub, weight files with tensors to keep are downloaded into the Hub client's cache.
        drop_layers (`Sequence[int]`): Base indices of the layers to drop.
        hub: For a base on the Hub: `revision`, `token`, `cache_dir`, ...; see [`Repo.open`].

    Returns:
        `CheckpointPlan`: The tensors to keep, their new names, and the sizes to write.

    Raises:
        CheckpointError: The base is damaged, incomplete or inconsistent, or can't be reached.
        CutError: These layers can't be dropped from this model.
        UnsupportedModelError: The architecture is not proven to survive a cut.
    """
    base = source if isinstance(source, Base) else Base.open(source, **hub)
    folder = base.folder
    try:
        find_weights(base.names, base.name)  # before anything else is downloaded
        config_file = read_json(folder / CONFIG)
        config = load_config(folder)
        cut = families.make_cut(config, drop_layers)
        new_config = families.cut_config(config, cut)
        files = {CONFIG: to_bytes(config_fields(config_file, new_config, cut.num_layers))}
        companions = base.companions()
        files |= quantiser_files(folder, cut, families.text_config(config) is not config)
        weights = read_weights(base, lambda names: new_names(names, config, cut)[0])
        planned = plan_weights(weights, config, cut)
        check_tensors(base.name, new_config, planned.shapes, planned.layer_prefix)
        if planned.index is not None:
            files[INDEX] = to_bytes(planned.index)
    except OSError as error:
        raise CheckpointError(f"could not read {folder}: {error.strerror or error}") from error
    return CheckpointPlan(
        **vars(planned),
        source=folder,
        cut=cut,
        config=new_config,
        files=files,
        companions=tuple((name, size) for name, size in companions if name not in files),
        source_bytes=weights.size,
    )


def cut_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    drop_layers: Sequence[int],
    *,
    force: bool = False,
    link: bool = False,
    **hub: Any,
) -> CheckpointPlan:
    """Write a copy of a safetensors checkpoint without some of its layers.

    The copy is written to a temporary folder next to the target, flushed to disk and renamed. Whenever the process
    dies, the target is therefore absent, unchanged or complete. The source is only read. For a base on the Hub, weight
    files with tensors to keep are downloaded into the Hub client's cache and stay there.

    Args:
        source (`str` or `os.PathLike`): The base's folder, with safetensors weights, or its Hub id.
        target (`str` or `os.PathLike`): The folder to create.
        drop_layers (`Sequence[int]`): Base indices of the layers to drop.
        force (`bool`, *optional*, defaults to `False`): Replace the target if it is already a model folder.
        link (`bool`, *optional*, defaults to `False`): Hard-link unchanged weight files instead of copying them.
            They then share their content with the base's files: writing to one changes both.
        hub: See [`plan_cut`].

    Returns:
        `CheckpointPlan`: The plan that was carried out.

    Raises:
        CheckpointError: The source is damaged, the target exists, the disk is too full, or writing failed.
        CutError: These layers can't be dropped from this model.
        UnsupportedModelError: The architecture is not proven to survive a cut.
    """
    from .check import tell_if_presumed

    target = Path(target)
    base = Base.open(source, **hub)
    check_target(target.expanduser(), base.folder, force)  # before gigabytes are downloaded
    plan = plan_cut(base, drop_layers)
    tell_if_presumed(plan.config)
    write_checkpoint(plan, target, force=force, link=link)
    return plan
