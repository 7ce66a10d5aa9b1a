"""Drop decoder layers of a safetensors checkpoint on disk by renaming tensors and copying bytes.

The cut is first planned from headers, index and configs alone (`base.py`, `header.py`, `settings.py`, `plan.py`), and
every check is made at this point; then the bytes are copied (`write.py`). For a base on the Hub, only weight files with
tensors to keep are downloaded, into the Hub client's cache. Tensors are copied byte for byte whatever their type, so
quantised checkpoints are cut in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import families
from ..errors import CheckpointError
from ..files.shards import INDEX
from ..records.fingerprints import CONFIG
from ..runtime.loading import load_config
from .base import Base, read_weights
from .complete import check_tensors
from .folder import read_json
from .plan import CheckpointPlan, new_names, plan_weights
from .settings import config_fields, quantiser_files, to_bytes


def plan_cut(source: Path | Base, drop_layers: Sequence[int]) -> CheckpointPlan:
    """Plan a cut from headers, index and config, and refuse it if it can't be exact. Nothing is written.

    Args:
        source (`Path` or `Base`): The base's folder, with safetensors weights, or the base itself. From the Hub, weight
            files with tensors to keep are downloaded into the Hub client's cache.
        drop_layers (`Sequence[int]`): Base indices of the layers to drop.

    Returns:
        `CheckpointPlan`: The tensors to keep, their new names, and the sizes to write.

    Raises:
        CheckpointError: The base is damaged, incomplete or inconsistent, or can't be reached.
        CutError: These layers can't be dropped from this model.
        UnsupportedModelError: The architecture is not proven to survive a cut.
    """
    base = source if isinstance(source, Base) else Base.open(source)
    folder = base.folder
    try:
        base.weights()  # refused before anything else is downloaded
        config_file = read_json(folder / CONFIG)
        config = load_config(folder)
        cut = families.make_cut(config, drop_layers)
        new_config = families.cut_config(config, cut)
        files = {CONFIG: to_bytes(config_fields(config_file, new_config, cut.num_layers))}
        companions = base.companions()
        files |= quantiser_files(folder, cut, families.text_config(config) is not config)
        # Of a folder, all files are checked: a loader may find a tensor in a file that the index does not name for it.
        weights = read_weights(base, (lambda names: new_names(names, config, cut)[0]) if base.repo else None)
        planned = plan_weights(weights, config, cut)
        check_tensors(base.name, new_config, planned.shapes, planned.layer_prefix)
        if planned.index is not None:
            files[INDEX] = to_bytes(planned.index)
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
