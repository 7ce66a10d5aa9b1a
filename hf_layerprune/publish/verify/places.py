"""The model and the base for `verify`: local folders, or Hub repositories of which only needed files are downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ...files.hub import Repo
from ...records.fingerprints import (
    ADAPTER_CONFIG,
    CONFIG,
    fingerprint,
    hash_files,
    hash_hub_files,
    holds_weights,
    is_inert,
    is_model_file,
    sha256_of,
)
from ...records.history import History
from ...records.metrics import FILE_NAME as METRICS, Metrics
from ...records.names import base_name, why_no_folder
from ...runtime.loading import is_hub_id, resolve_base
from ..requests import VerifyRequest


@dataclass(frozen=True)
class ModelLocation:
    """A model in a folder or on the Hub.

    Args:
        name (`str`): The name to use in messages.
        folder (`Path`): The folder with its records and small files.
        hashes (`dict[str, str]`): The sha256 of each file that may affect the model's behaviour, by relative path.
        repo (`Repo`, *optional*): The repository, if the model is on the Hub.
    """

    name: str
    folder: Path
    hashes: dict[str, str]
    repo: Repo | None = None

    @classmethod
    def open(
        cls,
        model: str,
        revision: str | None = None,
        token: str | bool | None = None,
        counts: Callable[[str], bool] = lambda name: not is_inert(name),
    ) -> ModelLocation:
        """Locate a model and hash the files that count. For weights on the Hub, the hashes that the Hub lists are used.

        Raises:
            CheckpointError: The model does not exist or can't be read.
        """
        if is_hub_id(model):
            repo = Repo.open(model, revision, token=token)
            names = [name for name in repo.files if counts(name)]
            if repo.offline and not any(holds_weights(name) for name in names):
                raise CheckpointError(f"the weights of {repo.name} are not in the cache ({repo.offline}); go online")
            hashes, folder = hash_hub_files(repo, names)
            return cls(repo.name, folder, hashes, repo)
        folder = Path(model).expanduser()
        if not folder.is_dir():
            raise CheckpointError(f"{folder} {why_no_folder(folder)}; specify a model folder or a Hub id")
        paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
        paths = {
            name: path for name, path in paths.items() if counts(name) and (path.is_symlink() or not path.is_dir())
        }
        if no_file := next((path for path in paths.values() if not path.is_file()), None):
            raise CheckpointError(f"{no_file} is a broken link or a link to a folder; remove it")
        return cls(str(folder), folder, hash_files(paths))

    @property
    def is_adapter(self) -> bool:
        """Whether this is an adapter rather than a complete model."""
        return ADAPTER_CONFIG in self.hashes and CONFIG not in self.hashes

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return (self.folder / name).is_file() or (self.repo is not None and name in self.repo.files)

    def path(self, name: str) -> Path:
        """The path of a file, downloaded first if the model is on the Hub."""
        return self.repo.get(name) if self.repo is not None else self.folder / name

    def metrics(self) -> Metrics | None:
        """The numbers, if there are any.

        Raises:
            CheckpointError: The file can't be read, or does not follow the schema.
        """
        return Metrics.load_file(self.path(METRICS)) if self.has(METRICS) else None


@dataclass(frozen=True)
class Base:
    """The base of a model.

    Args:
        source (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        commit (`str`, *optional*): The commit of a base on the Hub.
        files (`dict[str, dict]`): Size and sha256 of the weight and JSON files, by name.
        token (`str` or `bool`, *optional*): As the Hub client takes it.
    """

    source: str | Path
    commit: str | None
    files: dict[str, dict[str, Any]]
    token: str | bool | None = field(default=None, repr=False)

    @classmethod
    def find(cls, history: History, request: VerifyRequest, model: ModelLocation) -> Base:
        """Locate the base that the lineage of a model names, or the user.

        Raises:
            CheckpointError: The base can't be found or read.
        """
        recorded, named, token = history.lineage.base, request.base, request.token
        where = named or str(recorded.get("id") or "")
        path = Path(where).expanduser()
        if where and path.exists() and (named or not recorded.get("commit")):
            # Whoever made the model made that too.
            if not named and path.resolve().is_relative_to(model.folder.resolve()):
                raise CheckpointError(
                    f"{path}, which the lineage names, is part of the model; give a base with --base"
                )
            resolve_base(path)  # raises if it is not a model
            return cls(path, None, fingerprint(path))
        name = where if named else history.base_on_hub
        if not name or not is_hub_id(name):
            raise CheckpointError(
                f"the base, {named or base_name(recorded)}, is not available here; give its location with --base"
            )
        commit = recorded.get("commit") if name == recorded.get("id") else None
        repo = Repo.open(name, commit, token=token)
        if commit and not repo.offline and not repo.is_released():
            raise CheckpointError(
                f"{repo.name} has the commit {repo.commit[:12]} in none of its branches and tags: it may be from a pull "
                "request, which anybody can open; if you trust it, download it and give its folder with --base"
            )
        if history.from_gguf:
            if (file := next(iter(recorded.get("files") or ()), "")) not in repo.files:
                raise CheckpointError(f"{repo.name} has no {file}; give the file with --base")
            path = repo.get(file)
            return cls(path, None, fingerprint(path))
        repo.fetch(file for file in recorded.get("files") or () if file in repo.files and file.endswith(".json"))
        return cls(name, repo.commit, repo.fingerprint(), token)

    @classmethod
    def of_model(cls, model: ModelLocation, token: str | bool | None) -> Base:
        """A model that is itself the base of an adapter."""
        if model.repo is None:
            return cls(model.folder, None, fingerprint(model.folder))
        return cls(model.repo.name, model.repo.commit, model.repo.fingerprint(), token)

    @property
    def is_gguf(self) -> bool:
        """Whether the base is a GGUF file."""
        return isinstance(self.source, Path) and self.source.is_file()

    def __str__(self) -> str:
        return f"{self.source} at {self.commit[:12]}" if self.commit else str(self.source)

    def differences(self, recorded: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Names of the files that differ from those in a lineage, including missing weight files and a missing config."""
        decisive = [name for name in recorded if holds_weights(name) or name == CONFIG]
        here = {name: self.files.get(name) for name in recorded if name in decisive or name in self.files}
        return [name for name, entry in here.items() if entry != recorded[name]]

    def first_difference(self, name: str, revision: str | None) -> str | None:
        """The first file, by name, that loaders read and that is another one in a folder or repository, or missing in one."""
        same = str(Path(name).expanduser()) == str(self.source)
        if same and (self.commit is None or self.commit == Repo.open(name, revision, token=self.token).commit):
            return None
        there, here = (_loaded_hashes(*at, self.token) for at in ((name, revision), (str(self.source), self.commit)))
        return next((file for file in sorted(here.keys() | there.keys()) if here.get(file) != there.get(file)), None)


def _loaded_hashes(source: str, revision: str | None, token: str | bool | None) -> dict[str, str]:
    """The sha256 of each file that a loader reads, by name."""
    path = Path(source).expanduser()
    if path.is_file():  # of whatever name
        return {"its content": sha256_of(path)}
    return ModelLocation.open(source, revision, token, is_model_file).hashes
