"""Read repositories on the Hub: list one at a fixed commit, and download its files through the Hub client's cache.

    repo = Repo.open("org/name", revision="main")
    path = repo.get("config.json")

The Hub client handles transfers, retries, resuming and Xet. This module adds clear errors, a check of downloaded files
against the hashes that the Hub lists, and offline use.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, LayerPruneError, boundary, cause_of
from ..versions import transport_error

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_WORKERS = 4


class UnreachableError(CheckpointError):
    """The Hub could not be reached. Trying again later may help."""


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn exceptions of the Hub client into errors of this package.

    Raises:
        CheckpointError: The Hub refused the request, or the answer is not from the Hub.
        UnreachableError: The Hub could not be reached.
    """
    try:
        yield
    except LayerPruneError:
        raise
    except Exception as error:
        raise _translate_error(error, repo, revision) from error


def _translate_error(error: Exception, repo: str, revision: str | None) -> CheckpointError:
    from huggingface_hub import errors

    cause = cause_of(error)
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{repo} is gated; ask for access on its page, then {login}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return CheckpointError(
            f"{repo} is neither a folder here nor on the Hub, unless it is private; check the name, or {login}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{repo} has no revision {revision!r}; specify a branch, a tag or a commit")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return CheckpointError(f"{repo} can't be read with this token ({cause}); {login}")
        kind = UnreachableError if status in (408, 429) or status >= 500 else CheckpointError
        return kind(f"can't read {repo}: {cause}; try again later")
    unreachable = (errors.LocalEntryNotFoundError, errors.RevisionResolutionError, errors.OfflineModeIsEnabled)
    if isinstance(error, (*unreachable, transport_error())):
        reason = cause_of(error.__cause__) if isinstance(error.__cause__, Exception) else cause
        return UnreachableError(f"can't reach the Hub for {repo} ({reason}); check the connection")
    if isinstance(error, OSError) and not isinstance(error, errors.FileMetadataError):  # no space or no permission
        return CheckpointError(f"can't store {repo} in the cache ({cause}); free space there, or set HF_HOME")
    return CheckpointError(
        f"can't read {repo} ({cause}); if the answer is not from the Hub, check for a log-in page or a proxy in between"
    )


def resolve_commit(repo: str, **kwargs: Any) -> str | None:
    """The commit that a revision on the Hub points to; `None` for a folder, or if it can't be resolved.

    Args:
        repo (`str`): A Hub id, or a folder.
        kwargs: `revision`, `token`, `cache_dir` and `local_files_only`, as the Hub client takes them.
    """
    from huggingface_hub import HfApi, constants

    if os.path.exists(repo):
        return None
    kwargs["local_files_only"] = kwargs.get("local_files_only") or constants.HF_HUB_OFFLINE
    with suppress(Exception):
        return HfApi().resolve_revision(repo, **kwargs).resolved
    return None


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, as its listing describes it. Those in LFS or Xet have a sha256."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True)
class Repo:
    """A model repository at one commit.

    Args:
        name (`str`): The Hub id.
        commit (`str`): The commit to read.
        files (`dict[str, HubFile]`): The files; offline, only those in the cache.
        offline (`str`, *optional*): The reason why only the cache is used, if so.
        token (`str` or `bool`, *optional*): As the Hub client takes it; by default the stored one.
        cache_dir (`str`, *optional*): The Hub client's cache, if not the default.
    """

    name: str
    commit: str
    files: dict[str, HubFile]
    offline: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | None = None

    @classmethod
    def open(
        cls,
        name: str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
    ) -> Repo:
        """Resolve a branch, tag or commit, and list the repository; only its cached part if the Hub can't be reached.

        `token` and `cache_dir` are as the Hub client takes them. With `local_files_only`, only the cache is used.

        Raises:
            CheckpointError: The repository or revision does not exist or the user has no access, or the Hub can't be
                reached and the repository is not in the cache.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import validate_repo_id

        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
        offline = offline or ("local_files_only is set" if local_files_only else None)
        with boundary(f"{name} is not a Hub id"):
            validate_repo_id(name)
        cache = None if cache_dir is None else str(cache_dir)
        if offline is None:
            try:
                with hub_errors(name, revision):
                    # Remembers the commit in the cache, so that the revision can be resolved offline later.
                    commit = HfApi().resolve_revision(name, revision=revision, token=token, cache_dir=cache)
                    info = HfApi().model_info(name, revision=commit.resolved, files_metadata=True, token=token)
                    files = {
                        one.rfilename: HubFile(int(one.size or 0), one.lfs.sha256 if one.lfs else None)
                        for one in info.siblings or ()
                    }
                return cls(name, str(info.sha), files, None, token, cache)
            except UnreachableError as error:
                offline = str(error)
                logger.info("%s; looking in the cache", error)
        cached = _cached_files(name, revision, cache)
        if cached is None:
            raise CheckpointError(
                f"{name} is not in the cache, and the Hub can't be reached ({offline}); go online, or specify a folder"
            )
        return cls(name, cached[0], cached[1], offline, token, cache)

    def is_released(self) -> bool:
        """Whether its commit is in the history of a branch or a tag. The Hub also serves commits of pull requests, which
        anybody can open.

        Raises:
            CheckpointError: The Hub can't be asked.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        with hub_errors(self.name, self.commit):
            found = api.list_repo_refs(self.name)
            refs = [*found.branches, *found.tags]
            if any(ref.target_commit == self.commit for ref in refs):
                return True
            histories = (api.list_repo_commits(self.name, revision=ref.name) for ref in refs)
            return any(one.commit_id == self.commit for history in histories for one in history)

    def get(self, name: str) -> Path:
        """Download a file into the cache, unless it is there, by its path in the repository.

        Raises:
            CheckpointError: The file does not exist, can't be downloaded, or differs from what the Hub lists.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        self._check_listed(name)
        file = self.files[name]
        downloaded = not isinstance(try_to_load_from_cache(self.name, name, self.cache_dir, self.commit), str)
        with hub_errors(self.name, self.commit):
            kwargs: dict[str, Any] = {"token": self.token, "cache_dir": self.cache_dir}
            kwargs["local_files_only"] = bool(self.offline)
            path = Path(hf_hub_download(self.name, name, revision=self.commit, **kwargs))
        if path.stat().st_size != file.size:
            raise CheckpointError(f"{path} is incomplete; delete it from the cache to download it again")
        if downloaded and not self.offline:
            self._check(path, name, file)
        return path

    def _check_listed(self, name: str) -> None:
        if name in self.files:
            return
        if self.offline:
            raise CheckpointError(
                f"{self.name}/{name} is not in the cache, and the Hub can't be reached ({self.offline}); go online"
            )
        raise CheckpointError(f"{self.name} has no {name}; choose another revision")

    def _check(self, path: Path, name: str, file: HubFile) -> None:
        """Check a downloaded file against the hash that the Hub lists."""
        if file.sha256 is None:
            return
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() == file.sha256:
                return
        blob = path.resolve()
        for part in (path, blob):
            with suppress(OSError):
                part.unlink()
        raise CheckpointError(
            f"{self.name}/{name} differs from the file on the Hub (its sha256 is not {file.sha256[:12]}...); it was "
            "removed from the cache, so run the command again"
        )

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Download several files into the cache in parallel; see `get`."""
        names = list(dict.fromkeys(names))
        for name in names:  # before anything is downloaded
            self._check_listed(name)
        with ThreadPoolExecutor(_MAX_WORKERS) as pool:
            return dict(zip(names, pool.map(self.get, names), strict=True))

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Size and sha256, by name, of the files at the top level that define a model, as the Hub lists them.

        Of files that are not stored in LFS, the Hub lists no sha256: weights, which are small then, are downloaded; other
        files that are not in the cache are omitted.
        """
        from huggingface_hub import try_to_load_from_cache

        known: dict[str, dict[str, Any]] = {}
        for name, file in sorted(self.files.items()):
            if "/" in name or not name.endswith((".safetensors", ".json")):
                continue
            sha256 = file.sha256
            if sha256 is None:
                path = try_to_load_from_cache(self.name, name, self.cache_dir, self.commit)
                if not isinstance(path, str) and not name.endswith(".safetensors"):
                    continue
                sha256 = hashlib.sha256(self.get(name).read_bytes()).hexdigest()
            known[name] = {"size": file.size, "sha256": sha256}
        return known


def _cached_files(repo: str, revision: str | None, cache_dir: str | None) -> tuple[str, dict[str, HubFile]] | None:
    """The commit of a revision according to the cache, and its files in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except LocalEntryNotFoundError as error:
        if not hasattr(error, "snapshot_path"):
            return None
        folder = Path(error.snapshot_path)  # only some files are missing, perhaps ones that nobody needed
    files: dict[str, HubFile] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            blob = path.resolve().name  # the cache names a blob by its hash
            sha256 = blob if _SHA256.fullmatch(blob) else None
            files[path.relative_to(folder).as_posix()] = HubFile(path.stat().st_size, sha256)
    return folder.name, files
