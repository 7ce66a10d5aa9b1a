"""Find the files of a base model, in a folder or on the Hub, and read the headers of its weight files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, boundary
from ..files.copy import FileState, check_inside
from ..files.hub import Repo, hub_errors
from ..files.json_file import read_object
from ..files.shards import INDEX, MAX_INDEX, shard_names
from ..options import format_bytes, pluralize
from ..records.fingerprints import ADAPTER_CONFIG, CONFIG, TEMPLATES, is_part
from ..runtime.loading import adapter_error, is_hub_id
from .header import Header, Tensor, read_header

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Base:
    """The files of a checkpoint: in a folder, or in a Hub repository from which they are downloaded on demand.

    Args:
        name (`str`): The name to use in messages.
        folder (`Path`): The folder. For a repository, its folder in the Hub client's cache.
        sizes (`Mapping[str, int]`): The size of each file in bytes, by its path in the folder or repository.
        repo (`Repo`, *optional*): The repository.
    """

    name: str
    folder: Path
    sizes: Mapping[str, int]
    repo: Repo | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str], revision: str | None = None, **hub: Any) -> Base:
        """Locate a checkpoint, in a folder or on the Hub, and check that it has a config.

        `hub` is passed on to `Repo.open`.

        Raises:
            CheckpointError: The model does not exist or can't be reached.
        """
        if isinstance(source, str) and is_hub_id(source):
            repo = Repo.open(source, revision, **hub)
            sizes = {name: file.size for name, file in repo.files.items()}
            _check_no_adapter(sizes, source)
            if CONFIG not in sizes:
                raise CheckpointError(f"{source} has no {CONFIG}, so it is not a model; choose another repository")
            return cls(source, repo.get(CONFIG).parent, sizes, repo)
        folder = Path(source).expanduser()
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder; specify a model folder with a {CONFIG} and safetensors weights"
            )
        # Below the top level, only the folder that may hold companion files is listed.
        paths = [path for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]) if not path.is_dir()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size if path.is_file() else 0 for path in paths}
        _check_no_adapter(sizes, str(folder))
        return cls(str(folder), folder, sizes)

    def get(self, name: str) -> Path:
        """The path of a file, downloaded first if necessary."""
        return self.repo.get(name) if self.repo else self.folder / name

    def fetch(self, names: Collection[str]) -> None:
        """Download files into the folder, if the checkpoint is on the Hub."""
        if self.repo:
            self.repo.fetch(names)

    def companions(self) -> list[tuple[str, int]]:
        """The files to copy along with the weights, with their sizes: tokenizer, chat templates, settings, licence.

        From the Hub they are downloaded, together with the index of the weights.

        Raises:
            CheckpointError: One of them is a broken link, or one out of the folder.
        """
        found = [(name, size) for name, size in sorted(self.sizes.items()) if is_part(name)]
        for name, _ in found if self.repo is None else ():
            check_inside(self.folder / name, self.folder)
            if not (self.folder / name).is_file():
                raise CheckpointError(
                    f"{self.folder / name} is a broken link or not a file; is the download complete?"
                )
        self.fetch([name for name, _ in found] + [name for name in (INDEX,) if name in self.sizes])
        return found

    def weights_file(self) -> str:
        """The name of the weight file, or of the index that lists several; raises as `find_weights` does."""
        chosen = read_json(self.folder / CONFIG).get("transformers_weights")
        return find_weights([name for name in self.sizes if "/" not in name], self.name, chosen)


def _check_no_adapter(names: Collection[str], where: str) -> None:
    if ADAPTER_CONFIG in names and CONFIG not in names:
        raise adapter_error(where)
    if ADAPTER_CONFIG in names:
        raise CheckpointError(
            f"{where} holds {ADAPTER_CONFIG} beside {CONFIG}, and loaders would apply the adapter to the base that it names; "
            "merge the adapter, or move it to a folder of its own"
        )


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a checkpoint: the header of each by its name, and the index if there is one."""

    headers: dict[str, Header]
    index: dict[str, Any] | None

    @property
    def tensor_names(self) -> list[str]:
        """Names of all tensors, including those in files that were not opened."""
        if self.index is not None:
            return [*self.index["weight_map"]]
        return [name for header in self.headers.values() for name in header.names]


def read_weights(base: Base, kept: Callable[[Collection[str]], Collection[str]] | None = None) -> Weights:
    """Read the headers of a checkpoint's weight files; from the Hub, they are downloaded.

    `kept` selects the tensors to keep from the names of all. A file that, according to the index, holds none of them
    is neither opened nor downloaded.

    Raises:
        CheckpointError: There are no safetensors weights, more than one set, or they are damaged or incomplete.
    """
    names, index = _list_weight_files(base)
    if index is not None and kept:
        names = sorted({index["weight_map"][name] for name in kept(index["weight_map"])})
    if base.repo:
        if missing := [base.sizes.get(name, 0) for name in names if not (base.folder / name).exists()]:
            files, size = pluralize(len(missing), "weight file"), format_bytes(sum(missing))
            logger.info("%s: downloading %s with tensors to keep (%s)", base.name, files, size)
        base.fetch(names)
    return _checked_weights(base, {name: read_header(base.folder / name) for name in names}, index)


def read_headers(base: Base) -> Weights:
    """Read the headers of all weight files; of a base on the Hub, nothing but the headers is fetched.

    Raises:
        CheckpointError: There are no safetensors weights, or they can't be read.
    """
    if base.repo is None or base.repo.offline:
        return read_weights(base)
    names, index = _list_weight_files(base)
    return _checked_weights(base, {name: _remote_header(base, base.repo, name) for name in names}, index)


def _checked_weights(base: Base, headers: dict[str, Header], index: dict[str, Any] | None) -> Weights:
    """Check that the index fits the files that were opened."""
    if index is not None:
        mapped = {name: file for name, file in index["weight_map"].items() if file in headers}
        check_index(mapped, {name: header.names for name, header in headers.items()}, f"the index of {base.name}")
    return Weights(headers, index)


def _list_weight_files(base: Base) -> tuple[list[str], dict[str, Any] | None]:
    """The names of the weight files, and the index that lists them if there is one."""
    name = base.weights_file()
    if not name.endswith(".json"):
        return [name], None
    index = read_json(base.get(name))
    return shard_names(index, f"{base.name}/{name}"), index


def _remote_header(base: Base, repo: Repo, name: str) -> Header:
    from huggingface_hub import HfApi

    with boundary(f"{repo.name}/{name} is not a valid safetensors file"):
        with hub_errors(repo.name):
            found = HfApi().parse_safetensors_file_metadata(repo.name, name, revision=repo.commit, token=repo.token)
        tensors = tuple(
            Tensor(key, one.dtype, tuple(one.shape), *one.data_offsets)
            for key, one in sorted(found.tensors.items(), key=lambda item: item[1].data_offsets)
        )
        data = max((tensor.end for tensor in tensors), default=0)
    size = base.sizes[name]
    return Header(base.folder / name, FileState(0, 0, size, 0), size - data, tensors, found.metadata or None)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is missing, too large, or not a valid JSON object.
    """
    return read_object(path, max_bytes=MAX_INDEX, non_finite=True)


def find_weights(names: Collection[str], where: str, chosen: str | None = None) -> str:
    """Choose the file with a checkpoint's weights, or their index, from the names of all its files.

    It is the one that the config chose, `SINGLE` or `INDEX`. `where` names the checkpoint in errors.

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
