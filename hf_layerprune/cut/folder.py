"""The weight files of a checkpoint, and the index that lists them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.json_file import read_object
from ..files.shards import INDEX, MAX_INDEX
from ..records.fingerprints import ADAPTER_CONFIG

SINGLE = "model.safetensors"


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is missing, too large, or not a valid JSON object.
    """
    return read_object(path, max_bytes=MAX_INDEX, non_finite=True)


def find_weights(names: Collection[str], where: str, chosen: str | None = None) -> str:
    """Find the weights of a checkpoint in a list of its files.

    Args:
        names (`Collection[str]`): Names of all files.
        where (`str`): The name of the folder, for errors.
        chosen (`str`, *optional*): What the config names as the weights (`transformers_weights`).

    Returns:
        `str`: `SINGLE` or `INDEX`, or the chosen one.

    Raises:
        CheckpointError: There are no safetensors weights, or more than one set.
    """
    if chosen is not None:
        if chosen not in names:
            raise CheckpointError(f"{where} has no {str(chosen)[:100]!r}, which its config names as its weights")
        return chosen
    if INDEX in names:
        if SINGLE in names:
            raise CheckpointError(
                f"{where} holds both {SINGLE} and {INDEX}, and loaders differ in which they read; remove one of them"
            )
        return INDEX
    if SINGLE in names:
        return SINGLE
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if others:
        raise CheckpointError(
            f"{where} holds only pickled weights ({others[0]}), which can run code when loaded and are never "
            "opened here; convert them to safetensors first (load the model and save_pretrained it)"
        )
    if ADAPTER_CONFIG in names:
        raise CheckpointError(f"{where} holds an adapter, not a model; merge it into its base first")
    raise CheckpointError(f"{where} holds neither {SINGLE} nor {INDEX}; is the download complete?")


def check_index(weight_map: Mapping[str, str], files: Mapping[str, Iterable[str]], where: str) -> None:
    """Check that an index, which says in which file each tensor is, fits the names of the tensors in these files.

    Raises:
        CheckpointError: A tensor is in a file other than the index says, in no file, in two files, or not in the
            index.
    """
    seen: dict[str, str] = {}
    for file, names in files.items():
        for name in names:
            if name in seen:
                raise CheckpointError(f"tensor {name!r} is in both {seen[name]} and {file}; save the checkpoint again")
            seen[name] = file
            if (says := weight_map.get(name)) != file:
                raise CheckpointError(
                    f"tensor {name!r} is in {file}, and {where} "
                    + (f"places it in {says}" if says else "does not list it")
                    + "; the index and the files do not belong together, so download them again"
                )
    for name, file in weight_map.items():
        if name not in seen:
            raise CheckpointError(f"{where} places tensor {name!r} in {file}, which lacks it; download both again")
