"""The model and the base that `verify` looks at: folders, or repositories of which no more is fetched than is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...records.fingerprints import ADAPTER_CONFIG, CONFIG, WEIGHTS, fingerprint, is_inert, sha256_of
from ...records.history import History
from ...records.lineage import FILE_NAME as LINEAGE
from ...records.metrics import FILE_NAME as METRICS
from ...records.names import base_name
from ...runtime.loading import is_hub_id

if TYPE_CHECKING:
    from ...files.hub import Repo

_RECORDS = (LINEAGE, METRICS)
_MAX_SMALL = 512 << 20


@dataclass(frozen=True)
class Place:
    """A model where it is.

    Args:
        name (`str`): What to call it.
        folder (`Path`): Where its records and small files are.
        hashes (`dict[str, str]`): The sha256 of each file that may change how it behaves, by its relative path.
        repo (`Repo`, *optional*): Its repository, where it is on the Hub.
    """

    name: str
    folder: Path
    hashes: dict[str, str]
    repo: Repo | None = None

    @classmethod
    def open(cls, model: str | Path, revision: str | None = None, token: str | bool | None = None) -> Place:
        """Find a model, and hash its files; of weights on the Hub, the Hub's hashes are taken.

        Args:
            model (`str` or `Path`): A folder, or a Hub id.
            revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.
            token (`str` or `bool`, *optional*): As the Hub client takes it; by default the user's own.

        Raises:
            CheckpointError: There is no such model, or it can't be read.
        """
        if is_hub_id(model):
            from ...files.hub import Repo

            return cls._on_hub(Repo.open(str(model), revision, token=token))
        folder = Path(model).expanduser()
        if not folder.is_dir():
            what = "is a file" if folder.is_file() else "does not exist"
            raise CheckpointError(f"{folder} {what}; name a model folder or a Hub id")
        hashes: dict[str, str] = {}
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if is_inert(name) or (path.is_dir() and not path.is_symlink()):
                continue
            if not path.is_file():
                raise CheckpointError(f"{path} is a link to a folder or to nothing; remove it")
            hashes[name] = sha256_of(path)
        return cls(str(folder), folder, hashes)

    @classmethod
    def _on_hub(cls, repo: Repo) -> Place:
        names = [name for name in repo.files if not is_inert(name)]
        if repo.offline and not any(name.endswith(WEIGHTS) for name in names):
            raise CheckpointError(f"the weights of {repo.name} are not in the cache: {repo.offline}")
        # Without a connection, the hashes are only what the cache calls its files.
        large = [name for name in names if repo.files[name].sha256 and name.endswith(WEIGHTS) and not repo.offline]
        small = [name for name in names if name not in large]
        if huge := [name for name in small if repo.files[name].size > _MAX_SMALL]:
            raise CheckpointError(
                f"{repo.name}/{huge[0]} is too large for a file beside the weights; download the model"
            )
        paths = repo.fetch([*small, *(name for name in _RECORDS if name in repo.files)])
        hashes = {name: str(repo.files[name].sha256) for name in large} | {
            name: sha256_of(paths[name]) for name in small
        }
        folder = next((path.parent for name, path in paths.items() if "/" not in name), Path(repo.name))
        return cls(repo.name, folder, hashes, repo)

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter rather than a whole model."""
        return ADAPTER_CONFIG in self.hashes and CONFIG not in self.hashes

    @property
    def weights(self) -> list[str]:
        """The weight files, in any folder."""
        return [name for name in self.hashes if name.endswith(WEIGHTS)]

    def path(self, name: str) -> Path:
        """Where a file is; one on the Hub is downloaded."""
        return self.repo.get(name) if self.repo is not None else self.folder / name


@dataclass(frozen=True)
class Base:
    """The base of a model.

    Args:
        source (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        commit (`str`, *optional*): The commit of a base on the Hub.
        files (`dict[str, dict]`): Size and sha256 of its weight and JSON files.
        token (`str` or `bool`, *optional*): As the Hub client takes it.
    """

    source: str | Path
    commit: str | None
    files: dict[str, dict[str, Any]]
    token: str | bool | None = None

    @classmethod
    def find(cls, history: History, named: str | None, token: str | bool | None) -> Base:
        """Find the base that a lineage names.

        Args:
            history (`History`): What the lineage says.
            named (`str`, *optional*): Where the user says that it is.
            token (`str` or `bool`, *optional*): As the Hub client takes it.

        Raises:
            CheckpointError: It can't be found, or can't be read.
        """
        told = history.lineage.base
        place = named or str(told.get("id") or "")
        path = Path(place).expanduser()
        if place and path.exists() and (named or not told.get("commit")):
            return cls(path, None, fingerprint(path))
        name = place if named else history.base_on_hub
        if not name or not is_hub_id(name):
            raise CheckpointError(f"the base, {named or base_name(told)}, is not here; say where it is with --base")
        from ...files.hub import Repo

        repo = Repo.open(name, told.get("commit") if name == told.get("id") else None, token=token)
        repo.fetch(file for file in told.get("files") or () if file in repo.files and file.endswith(".json"))
        return cls(name, repo.commit, repo.fingerprint(), token)

    @property
    def packed(self) -> bool:
        """Whether it is a GGUF file."""
        return isinstance(self.source, Path) and self.source.is_file()

    def __str__(self) -> str:
        return f"{self.source} at {self.commit[:12]}" if self.commit else str(self.source)

    def differences(self, told: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """The files that are not those that a lineage names: of weights and config also those that are missing."""
        decisive = [name for name in told if name.endswith(WEIGHTS) or name == CONFIG]
        return [name for name in told if (name in decisive or name in self.files)
                and _bytes(self.files.get(name)) != _bytes(told[name])]  # fmt: skip


def _bytes(entry: Mapping[str, Any] | None) -> tuple[Any, ...] | None:
    return None if entry is None else (entry.get("size"), entry.get("sha256"), entry.get("blob_id"))
