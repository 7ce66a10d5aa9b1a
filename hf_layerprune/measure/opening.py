"""The checks of `eval` and `bench` before a model is loaded."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import LayerPruneError
from ..records.metrics import FILE_NAME
from .paired import require_statistics
from .requests import BenchRequest, EvalRequest
from .store import Store
from .subject import Subject, identify


def open_measurement(request: EvalRequest | BenchRequest) -> tuple[Subject, Subject | None, Store]:
    """Identify the models of a request, and read earlier numbers.

    Args:
        request (`EvalRequest` or `BenchRequest`): What to measure.

    Returns:
        `tuple[Subject, Subject | None, Store]`: The model, its base if one is given, and the store for the numbers.

    Raises:
        CheckpointError: A model can't be read, or existing numbers belong to another one.
        LayerPruneError: Model and base are the same, or the numbers can't be written.
    """
    if request.base is not None:
        require_statistics()
    check_output(request.output, [request.model, request.base])
    model = identify(request.model, request.revision)
    base = identify(request.base, request.base_revision) if request.base is not None else None
    if base is not None and base.weights == model.weights:
        raise LayerPruneError(f"{request.model} and {request.base} have the same weights; name another base")
    store = Store.open(model, base, output=request.output, history=request.history, force=request.force)
    return model, base, store


def check_output(output: Path | None, sources: list[str | None]) -> None:
    """Refuse an output that would overwrite something other than numbers.

    Args:
        output (`Path`, *optional*): The file that the user named.
        sources (`list[str | None]`): The models of the request.

    Raises:
        LayerPruneError: It is a link, a device, a folder, or a file of a model that is not its `metrics.json`.
    """
    if output is None:
        return
    path = output.expanduser()
    if path.is_symlink():
        raise LayerPruneError(f"{output} is a symbolic link, and nothing is written through one; name a file")
    if path.is_dir():
        raise LayerPruneError(f"{output} is a folder; name a file for the numbers")
    if path.exists() and not path.is_file():
        raise LayerPruneError(f"{output} is not a regular file; name a file for the numbers")
    here = Path(os.path.realpath(path))
    for source in sources:
        folder = Path(os.path.realpath(Path(source).expanduser())) if source else None
        if folder is None or not folder.exists():
            continue
        inside = here.parent == folder or folder in here.parents
        if here == folder or (inside and here.name != FILE_NAME):
            raise LayerPruneError(
                f"{output} is part of the model {source}, where only {FILE_NAME} is written; name a file elsewhere"
            )
    if path.exists() and path.suffix != ".json":
        raise LayerPruneError(f"{output} exists and is not a .json file; name another file for the numbers")
