"""Everything that is fetched from the Hub: one listing of a repository at one commit, and files through its cache.

    repo = Repo.open("org/name", revision="main")
    path = repo.get("config.json")

Transfers, retries, resuming and Xet are the Hub client's; here is what it leaves open: what a failure means for the
user, whether what arrived is what the Hub lists, and what to do without a connection.
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

from ..errors import CheckpointError, LayerPruneError, cause_of
from ..versions import transport_error

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_AT_ONCE = 4
# Files of which one is in every repository that holds a model; they tell which commit a cache knows a revision as.
_LANDMARKS = ("config.json", "adapter_config.json", "lineage.json", "README.md")


class UnreachableError(CheckpointError):
    """The Hub could not be reached. Trying again later may help."""


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub client raises into one line that says what, where, and the way out.

    Args:
        repo (`str`): The repository that is read.
        revision (`str`, *optional*): The revision that was asked for.

    Raises:
        CheckpointError: The Hub refused, or what answered is not the Hub.
        UnreachableError: The Hub could not be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except LayerPruneError:
        raise
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated; ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{repo} is not on the Hub, or it is private; check the name, or log in with `hf auth login` or HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo} has no revision {revision!r}; name a branch, a tag or a commit") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo!r} is neither a folder nor a Hub id: {cause_of(error)}") from error
    except errors.LocalEntryNotFoundError as error:
        cause = error.__cause__ or error
        raise UnreachableError(
            f"can't get {repo} ({cause_of(cause if isinstance(cause, Exception) else error)}); check the connection"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise CheckpointError(
                f"{repo} can't be read with this token ({cause_of(error)}); log in with `hf auth login`"
            ) from error
        kind = UnreachableError if status in (408, 429) or status >= 500 else CheckpointError
        raise kind(f"can't read {repo}: {cause_of(error)}; try again later") from error
    except errors.FileMetadataError as error:
        raise CheckpointError(_not_the_hub(repo, error)) from error
    except Exception as error:
        if isinstance(error, (errors.OfflineModeIsEnabled, transport_error())):
            raise UnreachableError(
                f"can't reach the Hub for {repo} ({cause_of(error)}); check the connection"
            ) from error
        if isinstance(error, OSError):  # of the cache: no space, no permission
            raise CheckpointError(f"can't store {repo} in the cache: {error.strerror or cause_of(error)}") from error
        if isinstance(error, ValueError | KeyError | TypeError | AttributeError):  # an answer that is not the Hub's
            raise CheckpointError(_not_the_hub(repo, error)) from error
        raise


def _not_the_hub(repo: str, error: Exception) -> str:
    return (
        f"the answer to a request for {repo} is not the Hub's ({cause_of(error)}); is there a log-in page or a proxy in "
        "between?"
    )


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, as its listing describes it.

    Args:
        size (`int`): Its size in bytes.
        sha256 (`str`, *optional*): The hash of its content, where it is stored by LFS or Xet.
        blob_id (`str`, *optional*): What git calls it.
    """

    size: int
    sha256: str | None = None
    blob_id: str | None = None


@dataclass(frozen=True)
class Repo:
    """A model repository at one commit.

    Args:
        name (`str`): Its id.
        commit (`str`): The commit that everything is read at.
        files (`dict[str, HubFile]`): Its files, or those of its subfolder; without a connection, what the cache has.
        offline (`str`, *optional*): Why the Hub can't be asked, where that is so.
    """

    name: str
    commit: str
    files: dict[str, HubFile]
    offline: str | None = None
    _where: dict[str, Any] = field(default_factory=dict, repr=False)
    _subfolder: str = ""

    @classmethod
    def open(
        cls,
        name: str,
        revision: str | None = None,
        *,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        subfolder: str = "",
    ) -> Repo:
        """Resolve and list a repository. Nothing but a small file is downloaded yet.

        Args:
            name (`str`): Its id.
            revision (`str`, *optional*): Branch, tag or commit.
            token (`str` or `bool`, *optional*): As the Hub client takes it; by default the user's own.
            cache_dir (`str` or `os.PathLike`, *optional*): The Hub client's cache, if it is not the usual one.
            local_files_only (`bool`, *optional*, defaults to `False`): Do not ask the Hub.
            force_download (`bool`, *optional*, defaults to `False`): Download also what the cache has.
            subfolder (`str`, *optional*): The folder in the repository that holds the model.

        Returns:
            `Repo`: Where the Hub can't be reached, of what is in the cache.

        Raises:
            CheckpointError: There is no such repository or revision, it is closed to the user, or neither the Hub nor
                the cache has it.
        """
        from huggingface_hub import HfApi, constants, hf_hub_download
        from huggingface_hub.utils import validate_repo_id

        where = {"token": token, "cache_dir": cache_dir, "force_download": force_download}
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
        offline = offline or ("local_files_only is set" if local_files_only else None)
        with hub_errors(name, revision):
            validate_repo_id(name)
        place = None if cache_dir is None else str(cache_dir)
        if offline is None:
            try:
                with hub_errors(name, revision):
                    info = HfApi().model_info(name, revision=revision, files_metadata=True, token=token)
                    files = {
                        one.rfilename: HubFile(int(one.size or 0), one.lfs.sha256 if one.lfs else None, one.blob_id)
                        for one in info.siblings or ()
                    }
                    landmark = next((one for one in _LANDMARKS if one in files), None)
                    if landmark and revision != info.sha:  # so that the cache knows the revision without a connection
                        hf_hub_download(name, landmark, revision=revision, token=token, cache_dir=place)
                return cls(name, str(info.sha), _under(files, subfolder), None, where, subfolder)
            except UnreachableError as error:
                offline = str(error)
                logger.info("%s; looking in the cache", error)
        found = _cached(name, revision, cache_dir)
        if found is None:
            raise CheckpointError(
                f"{name} is not in the cache, and the Hub can't be asked ({offline}); go online, or name a folder"
            )
        return cls(name, found[0], _under(found[1], subfolder), offline, where, subfolder)

    def get(self, name: str) -> Path:
        """Download a file into the cache, unless it is there.

        Args:
            name (`str`): Its path in the repository, or in its subfolder.

        Returns:
            `Path`: Where it is.

        Raises:
            CheckpointError: The repository has no such file, it can't be had, or it is not what the Hub lists.
        """
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        self._check_listed(name)
        file, inside = self.files[name], f"{self._subfolder}/{name}" if self._subfolder else name
        arrived = not isinstance(try_to_load_from_cache(self.name, inside, self._where["cache_dir"], self.commit), str)
        with hub_errors(self.name, self.commit):
            path = Path(
                hf_hub_download(
                    self.name, inside, revision=self.commit, local_files_only=bool(self.offline), **self._where
                )
            )
        if path.stat().st_size != file.size:
            raise CheckpointError(f"{path} is not whole; delete it from the cache, and it is downloaded again")
        if (arrived or self._where["force_download"]) and not self.offline:
            self._check(path, name, file)
        return path

    def _check_listed(self, name: str) -> None:
        if name in self.files:
            return
        if self.offline:
            raise CheckpointError(
                f"{self.name}/{name} is not in the cache, and the Hub can't be asked ({self.offline}); go online"
            )
        raise CheckpointError(f"{self.name} has no {name}; choose another revision")

    def _check(self, path: Path, name: str, file: HubFile) -> None:
        """Hold a file that has just arrived against the hash that the Hub lists."""
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
            f"{self.name}/{name} did not arrive as the Hub has it (its sha256 is not {file.sha256[:12]}...); it was "
            "removed from the cache, so run the command again"
        )

    def fetch(self, names: Iterable[str]) -> dict[str, Path]:
        """Download several files into the cache, a few at once; see `get`."""
        names = list(dict.fromkeys(names))
        for name in names:  # before anything is downloaded
            self._check_listed(name)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return dict(zip(names, pool.map(self.get, names), strict=True))

    def fingerprint(self, suffixes: tuple[str, ...] = (".safetensors", ".json")) -> dict[str, dict[str, Any]]:
        """Size and sha256 of the files at the top that make a model what it is, as the Hub lists them.

        Args:
            suffixes (`tuple[str, ...]`, *optional*): Which files count.

        Returns:
            `dict[str, dict[str, Any]]`: By file name. Of a small file that is not stored by LFS, the hash is computed
                if the cache has it; a weight file of that kind has git's `blob_id` instead, and others are left out.
        """
        from huggingface_hub import try_to_load_from_cache

        known: dict[str, dict[str, Any]] = {}
        for name, file in sorted(self.files.items()):
            if "/" in name or not name.endswith(suffixes):
                continue
            path = try_to_load_from_cache(self.name, name, self._where["cache_dir"], self.commit)
            if file.sha256 is not None:
                known[name] = {"size": file.size, "sha256": file.sha256}
            elif isinstance(path, str):
                known[name] = {"size": file.size, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}
            elif name.endswith(".safetensors"):
                known[name] = {"size": file.size, "blob_id": file.blob_id}
        return known


def _under(files: dict[str, HubFile], subfolder: str) -> dict[str, HubFile]:
    prefix = f"{subfolder}/" if subfolder else ""
    return {name.removeprefix(prefix): file for name, file in files.items() if name.startswith(prefix)}


def _cached(
    repo: str, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> tuple[str, dict[str, HubFile]] | None:
    """The commit that the cache knows a revision as, and what it has of it."""
    from huggingface_hub import try_to_load_from_cache

    for landmark in _LANDMARKS:
        path = try_to_load_from_cache(repo, landmark, None if cache_dir is None else str(cache_dir), revision)
        if isinstance(path, str):
            break
    else:
        return None
    folder = Path(path).parent
    files: dict[str, HubFile] = {}
    for one in sorted(folder.rglob("*")):
        if one.is_file():
            blob = one.resolve().name  # the cache names a blob by its hash
            sha256 = blob if _SHA256.fullmatch(blob) else None
            files[one.relative_to(folder).as_posix()] = HubFile(one.stat().st_size, sha256, blob)
    return folder.name, files


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a `Retry-After` header that holds seconds or a date."""
    from email.utils import parsedate_to_datetime
    from time import time

    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return None
