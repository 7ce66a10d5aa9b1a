"""Repositories for `hub_server`: files, commits, and a plain folder as a repository."""

import hashlib
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

EPOCH = "2024-01-01T00:00:00.000Z"
LFS_SUFFIXES = {".safetensors", ".gguf", ".bin", ".pt", ".pth", ".onnx", ".h5", ".msgpack", ".parquet", ".zip"}
LFS_SIZE = 10 * 1024 * 1024


class Refusal(Exception):
    """An error response, raised anywhere below a route.

    Args:
        status (`int`): The status code.
        message (`str`): What is wrong.
        code (`str`, *optional*): The `X-Error-Code`, by which the client distinguishes errors.
        body (`Mapping` or `str`, *optional*): Fields of the body besides the message; or all of it, as from a proxy.
        headers (`str`): More headers, with `_` for `-`.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, body: Mapping | str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = body if isinstance(body, str) else {"error": message} | dict(body or {})
        self.headers = {} if isinstance(body, str) else {"X-Error-Message": message}
        self.headers |= {"X-Error-Code": code} if code else {}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


def tracked_by_lfs(name: str, size: int) -> bool:
    """Whether a file is stored in LFS, by its name or size."""
    return Path(name).suffix in LFS_SUFFIXES or size >= LFS_SIZE


def git_blob_id(content: bytes) -> str:
    """The git object id of a content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class RepoFile:
    """One file of a repository, with its ids in git and git-lfs."""

    path: Path
    size: int
    blob_id: str
    sha256: str | None = None  # only for LFS files
    pointer_size: int = 0

    @property
    def etag(self) -> str:
        """The name under which a client caches the content."""
        return self.sha256 or self.blob_id

    @classmethod
    def large(cls, path: Path, size: int, sha256: str) -> Self:
        """Make an LFS file."""
        # Git stores only a pointer, so the blob id is that of the pointer.
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        return cls(path, size, git_blob_id(pointer), sha256, len(pointer))

    @classmethod
    def read(cls, path: Path, size: int) -> Self:
        """Hash a file."""
        git, sha = hashlib.sha1(b"blob %d\0" % size), hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                git.update(chunk)
                sha.update(chunk)
        if tracked_by_lfs(path.name, size):
            return cls.large(path, size, sha.hexdigest())
        return cls(path, size, git.hexdigest())


@dataclass(frozen=True)
class Commit:
    """The files of a repository at one commit."""

    id: str
    files: Mapping[str, RepoFile]
    title: str = "initial commit"
    parent: str | None = None


class Repo:
    """A folder as a repository with one branch, `main`, and one commit: the current content."""

    sdk: str | None = None
    pulls: Mapping[str, str] = {}

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._hashed: dict[str, tuple[tuple[int, int], RepoFile]] = {}

    @property
    def branches(self) -> Mapping[str, str]:
        """The id of the last commit of each branch."""
        return {"main": tree_id(self._files())}

    def at(self, revision: str) -> Commit | None:
        """The commit of a branch, or with an id."""
        files = self._files()
        return Commit(tree_id(files), files) if revision in ("main", tree_id(files)) else None

    def large(self, sha256: str, name: str) -> RepoFile | None:
        """Find an LFS file by its hash."""
        file = self._files().get(name)
        return file if file and file.sha256 == sha256 else None

    def _files(self) -> dict[str, RepoFile]:
        """List the files by repository path; a file is hashed again only if it has changed."""
        found = {}
        with self._lock:
            for root, folders, names in os.walk(self.folder):
                # Folders of git and of the Hub client, which never uploads them.
                folders[:] = [name for name in folders if name not in {".git", ".cache"}]
                for path in (Path(root, name) for name in names):
                    name, stat = path.relative_to(self.folder).as_posix(), path.stat()
                    stamp = (stat.st_size, stat.st_mtime_ns)
                    if name not in self._hashed or self._hashed[name][0] != stamp:
                        self._hashed[name] = stamp, RepoFile.read(path, stat.st_size)
                    found[name] = self._hashed[name][1]
        return dict(sorted(found.items()))


def tree_id(files: Mapping[str, RepoFile]) -> str:
    """40 hex digits that change with any name or content, as the id of a folder or a commit."""
    lines = (f"{name}\0{file.blob_id}\n" for name, file in files.items())
    return hashlib.sha1("".join(lines).encode()).hexdigest()
