"""A repository that clients of `hub_server` write to: contents on disk by hash, and a history of commits."""

import hashlib
import os
import tempfile
import threading
from base64 import b64decode
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from tests.hub_repo import LFS_SIZE, LFS_SUFFIXES, Commit, Refusal, Repo, RepoFile, git_blob_id, tree_id


class WrittenRepo(Repo):
    """A repository with commits and branches.

    A content is written once, under its hash, and never changed, so every commit stays readable. Contents are uploaded
    before the commit that refers to them. A commit is one assignment at the end of `commit`, so one that is refused, or
    whose client hung up, leaves nothing that a reader could see.

    Args:
        folder (`Path`): The folder to use; it is created.
        sdk (`str`, *optional*): The SDK of a Space.
    """

    def __init__(self, folder: Path, sdk: str | None = None) -> None:
        self.folder, self.sdk = folder, sdk
        self._lock = threading.RLock()
        self._large: dict[str, RepoFile] = {}
        self._commits: dict[str, Commit] = {}
        self._branches: dict[str, str] = {}
        self.secrets: dict[str, str] = {}  # of a Space
        self._pulls: dict[str, str] = {}
        self.titles: list[str] = []  # of the pull requests
        self.merged: set[int] = set()
        folder.mkdir(parents=True)
        # A new repository on the Hub has one commit, with this file.
        rules = [f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)]
        self._record("main", {".gitattributes": self._keep("".join(rules).encode())}, "initial commit", None)

    # Reading

    @property
    def branches(self) -> Mapping[str, str]:
        with self._lock:
            return dict(self._branches)

    @property
    def pulls(self) -> Mapping[str, str]:  # type: ignore[override]
        """The id of the last commit of each pull request, by `refs/pr/N`."""
        with self._lock:
            return dict(self._pulls)

    def at(self, revision: str) -> Commit | None:
        with self._lock:
            refs = self._branches.get(revision) or self._pulls.get(revision)
            return self._commits.get(refs or revision)

    def large(self, sha256: str, name: str = "") -> RepoFile | None:
        with self._lock:
            return self._large.get(sha256)

    # Writing

    def receive(self, chunks: Iterable[bytes], sha256: str, size: int) -> None:
        """Store a large content, unless its size or hash differs from the announced one."""
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        try:
            digest, length = hashlib.sha256(), 0
            with os.fdopen(descriptor, "wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    length += len(chunk)
                    file.write(chunk)
            if (digest.hexdigest(), length) != (sha256, size):
                raise Refusal(400, f"Got {length} bytes with SHA256 {digest.hexdigest()}, not {size} with {sha256}")
            with self._lock:
                os.replace(name, self.folder / sha256)
                self._large[sha256] = RepoFile.large(self.folder / sha256, size, sha256)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)

    def commit(self, branch: str, lines: list[dict], *, propose: bool = False) -> Commit:
        """Commit to a branch, all or nothing.

        Args:
            branch (`str`): An existing branch, or the `refs/pr/N` of a pull request.
            lines (`list[dict]`): The lines of the request body: a header, then the operations in order.
            propose (`bool`): Open a pull request instead.
        """
        with self._lock:
            head = self.at(branch) if branch in self._branches or branch in self._pulls else None
            if head is None:
                raise Refusal(404, "Invalid rev id", "RevisionNotFound")
            header, *operations = lines
            title = header["value"]["summary"]
            if header["value"].get("parentCommit", head.id) != head.id:
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(head.files)
            for operation in operations:
                self._apply(files, operation["key"], operation["value"])
            if propose:
                self.titles.append(title)
                branch = f"refs/pr/{len(self.titles)}"
            return self._record(branch, files, title, head.id)

    def merge(self, number: int) -> None:
        """Merge a pull request."""
        with self._lock:
            self._branches["main"] = self._pulls[f"refs/pr/{number}"]
            self.merged.add(number)

    def create_branch(self, name: str, start: str) -> None:
        """Add a branch."""
        with self._lock:
            if name in self._branches:
                raise Refusal(409, f"Reference already exists: {name}")
            if (commit := self.at(start)) is None:
                raise Refusal(404, "Invalid rev id", "RevisionNotFound")
            self._branches[name] = commit.id

    def _apply(self, files: dict[str, RepoFile], key: str, value: Mapping) -> None:
        path = value["path"]
        # The server never uses it as a path, but a client that downloads the repository does.
        if not path or any(part in ("", ".", "..", ".git") for part in path.split("/")):
            raise Refusal(400, f"Invalid path in repo: {path!r}")
        match key:
            case "file":
                content = b64decode(value["content"], validate=True)
                if len(content) > LFS_SIZE:
                    raise Refusal(400, f"{path} is larger than 10 MiB and must be uploaded through LFS")
                files[path] = self._keep(content)
            case "lfsFile":
                file = self._large.get(value["oid"])
                if value["algo"] != "sha256" or file is None or value.get("size", file.size) != file.size:
                    raise Refusal(400, f"LFS pointer of {path} points to a file that does not exist")
                files[path] = file
            case "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            case _:
                raise Refusal(400, f"Unknown operation: {key}")

    def _keep(self, content: bytes) -> RepoFile:
        name = git_blob_id(content)
        path = self.folder / name
        if not path.exists():
            path.with_suffix(".new").write_bytes(content)
            path.with_suffix(".new").replace(path)
        return RepoFile(path, len(content), name)

    def _record(self, branch: str, files: Mapping[str, RepoFile], title: str, parent: str | None) -> Commit:
        files = dict(sorted(files.items()))
        commit_id = hashlib.sha1("\0".join([tree_id(files), str(parent), title]).encode()).hexdigest()
        self._commits[commit_id] = Commit(commit_id, files, title, parent)
        (self._pulls if branch.startswith("refs/pr/") else self._branches)[branch] = commit_id
        return self._commits[commit_id]
