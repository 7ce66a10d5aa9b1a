"""A checkpoint on the Hub, seen as the folder that it would be: small files in the cache, weights where they are.

    base = HubBase.open("org/name")
    plan = plan_cut(base, drop_layers=[5, 6])

The revision is resolved once and everything is read at that commit. The config, the index and the other small files
go through the Hub client's cache; of a weight file that is not in the cache only byte ranges are fetched.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..errors import CheckpointError
from ..files.copy import LocalFile, Source
from ..runtime.loading import CHECKPOINT_FILES
from .folder import CONFIG, INDEX, SINGLE, Weights, check_index, find_weights, is_companion, is_too_large, read_json
from .folder import shard_names as names_in
from .header import read_header
from .plan import files_without
from .ranges import FIRST_WAIT, BrokenDownloadError, HubFile, RemoteFile, hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_SHA256 = re.compile(r"[0-9a-f]{64}")
_IDENTIFYING = (".safetensors", ".json")
_AT_ONCE = 8
_ATTEMPTS = 3


@dataclass(frozen=True)
class HubBase:
    """A repository at one commit.

    Args:
        repo (`str`): Its id.
        commit (`str`): The commit that everything is read at.
        folder (`Path`): Where the cache keeps what is downloaded of it.
        files (`dict[str, HubFile]`): All its files.
        companions (`tuple[tuple[str, int], ...]`): Path and size of the small files, which are in the folder.
        token (`str` or `bool`, *optional*): As the client library takes it.
        offline (`str`, *optional*): Why the Hub can't be asked, where that is so.
    """

    repo: str
    commit: str
    folder: Path
    files: dict[str, HubFile]
    companions: tuple[tuple[str, int], ...]
    token: str | bool | None = None
    offline: str | None = None

    @classmethod
    def open(
        cls,
        repo: str,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        *,
        companions: bool = True,
    ) -> HubBase:
        """Resolve a repository, list it, and download its small files.

        Args:
            repo (`str`): Its id.
            revision (`str`, *optional*): Branch, tag or commit.
            token (`str` or `bool`, *optional*): As the client library takes it; by default the user's own.
            cache_dir (`str` or `os.PathLike`, *optional*): The client library's cache, if it is not the usual one.
            companions (`bool`, *optional*, defaults to `True`): Download tokenizer, chat template and the like, too,
                and not only the config and the index.

        Returns:
            `HubBase`: Of what is in the cache, where the Hub can't be reached.

        Raises:
            CheckpointError: There is no such repository or revision, it is closed to the user, or holds no model.
        """
        from huggingface_hub import HfApi, constants
        from huggingface_hub.utils import validate_repo_id

        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None
        with hub_errors(repo):
            validate_repo_id(repo)
        where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": bool(offline)}
        ask = partial(HfApi().resolve_revision, repo, revision=revision, **where)
        try:
            commit = ask_hub(repo, revision, ask, patient=not offline).resolved
        except BrokenDownloadError as error:
            reason = str(error).rstrip(".")
            raise CheckpointError(
                _not_cached(repo, offline) if offline else f"{reason}; check the connection"
            ) from error
        files: dict[str, HubFile] = {}
        if not offline:
            try:
                ask = partial(HfApi().model_info, repo, revision=commit, files_metadata=True, token=token)
                info = ask_hub(repo, revision, ask)
                files = {one.rfilename: HubFile.of(one) for one in info.siblings or ()}
            except BrokenDownloadError as error:
                offline = str(error)
        if offline:
            where["local_files_only"] = True
            files = _cached_files(repo, commit, cache_dir, offline)
        find_weights(files, repo)  # before anything is downloaded
        if CONFIG not in files:
            raise CheckpointError(f"{repo} has no {CONFIG}, so it is no model that can be cut; name another")
        wanted = {
            name: files[name]
            for name in sorted(files)
            if name in (CONFIG, INDEX) or (companions and _is_small(repo, name, files[name].size))
        }
        paths = _download(repo, commit, list(wanted), **where)
        for name, path in paths.items():
            if path.stat().st_size != wanted[name].size:
                raise CheckpointError(f"{path} is not whole; delete it from the cache, and it is downloaded again")
        others = tuple((name, file.size) for name, file in wanted.items() if name not in (CONFIG, INDEX))
        return cls(repo, commit, paths[CONFIG].parent, files, others, token, offline)

    @contextmanager
    def open_weights(self, config: PreTrainedConfig, cut: families.Cut) -> Iterator[Weights]:
        """Read the headers of the weight files that hold something that stays.

        Args:
            config (`PreTrainedConfig`): The base's config.
            cut (`families.Cut`): Which layers stay.

        Yields:
            `Weights`: Checked headers, and an index that agrees with them. What the index places in files that hold
                only dropped layers is believed: those files are never asked for.

        Raises:
            CheckpointError: The weights are damaged or incomplete, or can't be read.
        """
        names, index = [SINGLE], None
        skipped: dict[str, int] = {}
        if find_weights(self.files, self.repo) == INDEX:
            index = read_json(self.folder / INDEX)
            names = names_in(index, f"{self.repo}/{INDEX}")
            gone = files_without(index, config, cut)
            # The cache alone need not have them, nor knows then how long they are.
            sizes = {name: self.files[name].size if name in self.files else 0 for name in gone}
            skipped = {name: size for name, size in sizes.items() if name in self.files or self.offline}
            names = [name for name in names if name not in skipped]
        if skipped:
            logger.info("%s: %s only dropped layers and will not be read", self.repo, _listed(list(skipped)))
        with ExitStack() as stack:
            sources = [self._source(name, stack) for name in names]
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                headers = dict(zip(names, pool.map(read_header, sources), strict=True))
            if index is not None:
                mapped = {name: file for name, file in index["weight_map"].items() if file not in skipped}
                check_index(index | {"weight_map": mapped}, headers, f"{self.repo}/{INDEX}")
            yield Weights(headers, index, skipped)

    @staticmethod
    def remote_files(weights: Weights) -> dict[str, RemoteFile]:
        """Those of the weight files that are on the Hub alone, by name."""
        sources = {name: header.source for name, header in weights.headers.items()}
        return {name: source for name, source in sources.items() if isinstance(source, RemoteFile)}

    def _source(self, name: str, stack: ExitStack) -> Source:
        if name not in self.files:
            if self.offline:
                raise CheckpointError(
                    f"{self.repo}/{name} is not in the cache, and the Hub can't be asked ({self.offline}); go online"
                )
            raise CheckpointError(f"{self.repo}/{INDEX} names {name}, which is not there; choose another revision")
        # What the client library has downloaded lies in the folder, as a link to a complete file.
        path, entry = self.folder / name, self.files[name]
        if path.is_file() and path.stat().st_size == entry.size:
            return stack.enter_context(LocalFile(path))
        return RemoteFile(self.repo, name, self.commit, entry, self.token)

    def fetch_small(self, name: str) -> Path | None:
        """Download a file that does not go along with a cut, such as the card.

        Args:
            name (`str`): Its path in the repository.

        Returns:
            `Path`, *optional*: Where it is, or `None` where the repository, or a cache without the Hub, lacks it.
        """
        if name not in self.files:
            return None
        where = {"token": self.token, "cache_dir": self.folder.parents[2], "local_files_only": bool(self.offline)}
        return _download(self.repo, self.commit, [name], **where)[name]

    def fingerprint(self) -> dict[str, dict[str, Any]]:
        """Size and sha256 of the files that make the base what it is, without downloading any of them.

        Returns:
            `dict[str, dict[str, Any]]`: By file name. A weight file that is not of LFS kind and was not downloaded
                has git's `blob_id` in place of `sha256`.
        """
        from ..records.fingerprints import fingerprint

        known = fingerprint(self.folder)
        small = {CONFIG, INDEX, *(name for name, _ in self.companions)}
        found: dict[str, dict[str, Any]] = {}
        for name, file in sorted(self.files.items()):
            if "/" in name or not name.endswith(_IDENTIFYING):
                continue
            if file.sha256 is not None:
                found[name] = {"size": file.size, "sha256": file.sha256}
            elif name in known:
                found[name] = known[name]
            elif name not in small and name.endswith(".safetensors"):
                found[name] = {"size": file.size, "blob_id": file.blob_id}
        return found


def _is_small(repo: str, name: str, size: int) -> bool:
    """Whether a file is downloaded as it is."""
    if "\\" in name or "\0" in name or not is_companion(name):
        return False
    return any(fnmatch(name, pattern) for pattern in CHECKPOINT_FILES) and not is_too_large(f"{repo}/{name}", size)


def ask_hub(repo: str, revision: str | None, call: Callable[[], Any], *, patient: bool = True) -> Any:
    """Ask the Hub something, a few times if need be."""
    failures = 0
    while True:
        try:
            with hub_errors(repo, revision):
                return call()
        except BrokenDownloadError as error:
            failures += 1
            if not patient or failures >= _ATTEMPTS:
                raise
            logger.info("%s; trying again", error)
            time.sleep(FIRST_WAIT * 2 ** (failures - 1))


def _download(repo: str, commit: str, names: list[str], **where: Any) -> dict[str, Path]:
    from huggingface_hub import hf_hub_download

    def get(name: str) -> Path:
        ask = partial(hf_hub_download, repo, name, revision=commit, **where)
        return Path(ask_hub(repo, commit, ask, patient=not where["local_files_only"]))

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(get, names), strict=True))


def _cached_files(repo: str, commit: str, cache_dir: Any, reason: str) -> dict[str, HubFile]:
    """What the cache has of a commit."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, CONFIG, revision=commit, cache_dir=cache_dir)
    folder = Path(config).parent if isinstance(config, str) else None
    files: dict[str, HubFile] = {}
    for path in sorted(folder.rglob("*")) if folder else ():
        if not path.is_file():
            continue
        blob = path.resolve().name
        sha256 = blob if _SHA256.fullmatch(blob) else None
        files[path.relative_to(folder).as_posix()] = HubFile(path.stat().st_size, sha256, blob)
    if not {SINGLE, INDEX} & files.keys():
        raise CheckpointError(_not_cached(repo, reason))
    return files


def _not_cached(repo: str, reason: str) -> str:
    return f"{repo} is not in the cache, and the Hub can't be asked ({reason}); go online, or name a folder"


def _listed(names: list[str]) -> str:
    return f"{names[0]} holds" if len(names) == 1 else f"{len(names)} files ({names[0]} to {names[-1]}) hold"
