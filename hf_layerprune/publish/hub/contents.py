"""Selects the files of a push: those that transformers, PEFT, TRL and this package write, and those the user names.

Everything else is left out, with a reason. Links are never followed: the files of a model folder must be inside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import CheckpointError
from ...files.shards import INDEX
from ...records.declared import CARD
from ...records.fingerprints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, TEMPLATES, holds_weights, is_part
from ...records.licences import is_licence_file
from ...records.lineage import FILE_NAME as LINEAGE
from ...records.lineage import Lineage
from ...records.metrics import FILE_NAME as METRICS
from ..card.writing import ASSETS, EVAL_RESULTS, PICTURES, is_our_result
from ..requests import PushRequest

_RECORDS = {CARD, CONFIG, INDEX, ADAPTER_CONFIG, LINEAGE, METRICS}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_MOST_FILES = 10_000
_PICTURES = {f"{name}.png" for name in PICTURES}


@dataclass(frozen=True)
class Contents:
    """The files of a folder.

    Args:
        folder (`Path`): The folder.
        files (`dict[str, int]`): The size of each file that is published, by its path in the repository.
        left_out (`dict[str, str]`): Why each of the other files is left out.
        named (`frozenset[str]`): Those in `files` that are published because the user named them.
    """

    folder: Path
    files: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)
    named: frozenset[str] = frozenset()

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
        CheckpointError: There is no model, or no adapter.
    """
    folder = request.model.expanduser()
    if not folder.is_dir():
        Lineage.required(folder)  # which says what it is
    if not request.adapter_only:
        return folder
    for place in (folder, folder / "adapter"):
        if (place / ADAPTER_CONFIG).is_file() and (place / ADAPTER_WEIGHTS).is_file():
            return place
    raise CheckpointError(
        f"{folder} holds no adapter, so --adapter-only has nothing to publish; make one with hf-layerprune prune "
        "--adapter, or omit the option"
    )


def list_contents(folder: Path, request: PushRequest) -> Contents:
    """List the files of a model folder: those to publish, and those left out.

    Raises:
        CheckpointError: A file to publish is a link or not a regular file, a name is not UTF-8, or a file of `include`
            does not exist or may not be published.
    """
    named = frozenset(name.replace(os.sep, "/") for name in request.include)
    files: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for name, path in _walk(folder):
        kind = _kind(path)
        if name in (ASSETS, EVAL_RESULTS, TEMPLATES) and kind != "a folder":
            raise CheckpointError(f"{path} must be a folder, not {kind}; remove it")
        reason = _why_not(name, path, request.adapter_only, name in named)
        if kind == "a folder" and reason is not None:
            continue
        if reason is not None:
            left_out[name] = reason
        elif kind == "a file":
            files[name] = path.stat().st_size
        else:
            raise CheckpointError(f"{path} is {kind}, and only files are published; replace it with the file itself")
    for name in sorted(named - files.keys()):
        reason = left_out.get(name, f"there is no such file in {folder}")
        raise CheckpointError(f"--include {name}: {reason}")
    return Contents(folder, files, left_out, named & files.keys())


def _walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """All entries below a folder, with their relative paths. Links to folders are entries, and not followed."""
    count = 0
    for root, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(root, name) for name in sorted([*folders, *names])):
            name, count = path.relative_to(folder).as_posix(), count + 1
            try:
                name.encode()
            except UnicodeEncodeError:
                text = f"the name of the file {os.fsencode(name)!r} in {folder} is not UTF-8; rename it"
                raise CheckpointError(text) from None
            if count > _MOST_FILES:
                raise CheckpointError(f"{folder} has more than {_MOST_FILES:,} files; specify a model folder")
            yield name, path


def _why_not(name: str, path: Path, adapter_only: bool, named: bool) -> str | None:
    """The reason why a file is not published; `None` if it is."""
    top, _, rest = name.partition("/")
    if name.endswith(_PICKLES):
        return "may hold a pickle, which can run code when it is loaded"
    if rest:
        return (
            None
            if named or is_part(name) or _is_picture_or_result(top, rest, path)
            else "in a folder that is not part of the model"
        )
    if adapter_only and (holds_weights(name) or name in (INDEX, CONFIG)) and name != ADAPTER_WEIGHTS:
        return "belongs to the whole model, and only the adapter is published"
    if named or name in _RECORDS or holds_weights(name) or is_part(name):
        return None
    return "not part of the model; publish it with --include"


def _kind(path: Path) -> str:
    if path.is_symlink():
        return "a link"
    return "a folder" if path.is_dir() else "a file" if path.is_file() else "a device or a pipe"


def _is_picture_or_result(top: str, name: str, path: Path) -> bool:
    if top == ASSETS:
        return name in _PICTURES
    if top == EVAL_RESULTS and name.endswith(".yaml") and "/" not in name:
        return _kind(path) != "a file" or is_our_result(path)
    return False


def is_ours(name: str) -> bool:
    """Whether a push writes files of this kind, and so may remove one that no longer belongs to the model.

    Weights, settings, templates and tokenizers of another model would be loaded with this one, and outdated records would
    be believed; other files that people have put there must remain.
    """
    top, _, rest = name.partition("/")
    if not rest:
        return holds_weights(name) or name in _RECORDS or (is_part(name) and not is_licence_file(name))
    if top == EVAL_RESULTS:
        return rest.endswith(".yaml")
    return (top == ASSETS and rest in _PICTURES) or (top == TEMPLATES and rest.endswith(".jinja"))
