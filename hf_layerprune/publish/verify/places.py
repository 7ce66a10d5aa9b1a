"""A published model where it is: a folder, or a repository of which no more is fetched than is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...cut.folder import INDEX, SINGLE, check_index, find_weights, read_json, shard_names
from ...cut.header import Header, read_header
from ...errors import CheckpointError
from ...files.hub import Repo
from ...records.fingerprints import fingerprint
from ..hub.contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_WEIGHTS = (".safetensors", ".gguf")


@dataclass(frozen=True)
class Place:
    """A model in a folder.

    Args:
        name (`str`): What to call it.
        folder (`Path`): Where its small files are.
        names (`frozenset[str]`): The files at its top.
    """

    name: str
    folder: Path
    names: frozenset[str]

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter and no model."""
        return ADAPTER_CONFIG in self.names and "config.json" not in self.names

    @property
    def local(self) -> bool:
        """Whether reading costs no network."""
        return True

    def small(self, name: str) -> Path | None:
        """A small file, or `None` where there is none of that name."""
        return self.folder / name if name in self.names else None

    def weights(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of the weight files."""
        return {name: one for name, one in fingerprint(self.folder).items() if name.endswith(_WEIGHTS)}

    def headers(self) -> dict[str, Header]:
        """Read the headers of the weight files that loaders read.

        Returns:
            `dict[str, Header]`: By file name.

        Raises:
            CheckpointError: They are damaged, incomplete, or do not belong together.
        """
        index = None
        if self.is_adapter:
            names = [ADAPTER_WEIGHTS]
        elif find_weights(self.names, self.name) == SINGLE:
            names = [SINGLE]
        else:
            index = read_json(self._path(INDEX))
            names = shard_names(index, f"{self.name}/{INDEX}")
        missing = sorted(set(names) - self.names)
        if missing:
            raise CheckpointError(f"{self.name} lacks {missing[0]}, so it is not complete")
        headers = {name: read_header(self._path(name)) for name in names}
        if index is not None:
            check_index(index["weight_map"], headers, f"{self.name}/{INDEX}")
        return headers

    def _path(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True)
class HubPlace(Place):
    """A model in a repository at one commit.

    Args:
        repo (`Repo`): The repository.
    """

    repo: Repo

    @classmethod
    def open(cls, name: str, revision: str | None, token: str | bool | None = None) -> HubPlace:
        """List a repository.

        Raises:
            CheckpointError: There is none, or it can't be read.
        """
        repo = Repo.open(name, revision, token=token)
        return cls(name, Path(), frozenset(file for file in repo.files if "/" not in file), repo)

    @property
    def local(self) -> bool:
        """Whether reading costs no network."""
        return False

    def small(self, name: str) -> Path | None:
        """Download a small file through the client's cache, or `None` where there is none of that name."""
        return self.repo.get(name) if name in self.names else None

    def weights(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of the weight files, as the Hub lists them."""
        listed = {
            name: file for name, file in self.repo.files.items() if name in self.names and name.endswith(_WEIGHTS)
        }
        unhashed = sorted(name for name, file in listed.items() if file.sha256 is None)
        if unhashed:
            raise CheckpointError(f"the Hub has no sha256 of {self.name}/{unhashed[0]}; download the repository")
        return {name: {"size": file.size, "sha256": file.sha256} for name, file in listed.items()}

    def _path(self, name: str) -> Path:
        return self.repo.get(name)


def open_place(model: str | Path, revision: str | None = None, token: str | bool | None = None) -> Place:
    """Find a model.

    Args:
        model (`str` or `Path`): A folder, or a Hub id.
        revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.
        token (`str` or `bool`, *optional*): As the client library takes it; by default the user's own.

    Returns:
        `Place`: Where it is.

    Raises:
        CheckpointError: There is none.
    """
    from ...runtime.loading import is_hub_id

    if is_hub_id(model):
        return HubPlace.open(str(model), revision, token)
    folder = Path(model).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        raise CheckpointError(f"{folder} {what}; name a model folder or a Hub id")
    return Place(str(folder), folder, frozenset(path.name for path in folder.iterdir() if path.is_file()))
