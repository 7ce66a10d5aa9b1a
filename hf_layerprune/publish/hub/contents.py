"""Selects the files of a push: those that transformers, PEFT, TRL and this package write, and those the user names.

Everything else is left out, with a reason. Links are never followed: the files of a model folder must be inside it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import CheckpointError
from ...files.shards import INDEX
from ...records.declared import CARD
from ...records.fingerprints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, TEMPLATES, holds_weights, is_part
from ...records.lineage import FILE_NAME as LINEAGE, Lineage
from ...records.metrics import FILE_NAME as METRICS
from ..card.writing import ASSETS, EVAL_RESULTS, PICTURES, is_our_result
from ..requests import PushRequest

_RECORDS = {CARD, CONFIG, INDEX, ADAPTER_CONFIG, LINEAGE, METRICS}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_PICTURES = {f"{ASSETS}/{name}.png" for name in PICTURES}


@dataclass(frozen=True)
class Contents:
    """The files of a folder.

    Args:
        folder (`Path`): The folder.
        files (`dict[str, int]`): The size of each file that is published, by its path in the repository.
        left_out (`dict[str, str]`): Why each of the other files is left out.
        sha256 (`dict[str, str]`): The hashes of the weight files, once they are checked.
    """

    folder: Path
    files: dict[str, int]
    left_out: dict[str, str]
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> list[str]:
        """The paths of the weight files."""
        return [name for name in self.files if holds_weights(name)]

    @property
    def is_adapter(self) -> bool:
        """Whether the folder is an adapter rather than a model."""
        return ADAPTER_CONFIG in self.files and CONFIG not in self.files


def find_model(request: PushRequest) -> Path:
    """Find the folder to publish: with `adapter_only`, `model` if that is an adapter, or else its subfolder `adapter`.

    Raises:
        CheckpointError: The folder has no lineage, or no adapter to publish.
    """
    folder = request.model
    if request.adapter_only:
        places = (folder, folder / "adapter")
        found = [p for p in places if (p / ADAPTER_CONFIG).is_file() and (p / ADAPTER_WEIGHTS).is_file()]
        if not found:
            raise CheckpointError(
                f"{folder} holds no adapter, so --adapter-only has nothing to publish; make one with hf-layerprune prune "
                "--adapter, or omit the option"
            )
        folder = found[0]
    Lineage.load_required(folder)
    return folder


def list_contents(folder: Path, request: PushRequest) -> Contents:
    """List the files of a model folder: those to publish, and those left out.

    Raises:
        CheckpointError: A file to publish is a link or not a regular file, or a file of `include` does not exist or may
            not be published.
    """
    files: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):  # which follows no links
        name = os.fsencode(path.relative_to(folder).as_posix()).decode(errors="replace")
        kind = _file_kind(path)
        if name in (ASSETS, EVAL_RESULTS, TEMPLATES) and kind != "a folder":
            raise CheckpointError(f"{path} must be a folder, not {kind}; remove it")
        reason = _exclusion_reason(name, path, request.adapter_only, name in request.include)
        if kind == "a folder" and reason is not None:
            continue
        if reason is not None:
            left_out[name] = reason
        elif kind == "a file":
            files[name] = path.stat().st_size
        else:
            raise CheckpointError(f"{path} is {kind}, and only files are published; replace it with the file itself")
    for name in sorted({*request.include} - files.keys()):
        reason = left_out.get(name, f"there is no such file in {folder}")
        raise CheckpointError(f"--include {name}: {reason}")
    return Contents(folder, files, left_out)


def _exclusion_reason(name: str, path: Path, adapter_only: bool, named: bool) -> str | None:
    """The reason why a file is not published; `None` if it is."""
    if name.endswith(_PICKLES):
        return "may hold a pickle, which can run code when it is loaded"
    if adapter_only and (holds_weights(name) or name in (INDEX, CONFIG)) and name != ADAPTER_WEIGHTS:
        return "belongs to the whole model, and only the adapter is published"
    theirs = name.startswith(f"{EVAL_RESULTS}/") and _file_kind(path) == "a file" and not is_our_result(path)
    if named or (is_managed(name) and not theirs):
        return None
    if "/" in name:
        return "in a folder that is not part of the model"
    return "not part of the model; publish it with --include"


def _file_kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"


def is_managed(name: str) -> bool:
    """Whether a push writes files of this kind, and so may remove one that no longer belongs to the model.

    Weights, settings, templates and tokenizers of another model would be loaded with this one, and outdated records would
    be believed; other files that people have put there must remain.
    """
    folder, _, base = name.rpartition("/")
    if folder == EVAL_RESULTS:
        return base.endswith(".yaml")
    return name in _RECORDS or name in _PICTURES or is_part(name) or (not folder and holds_weights(name))
