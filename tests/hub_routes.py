"""The read routes of `hub_server`, for the Hub and its CDN, and how it reads requests and sends responses.

A route is a line in a table at the end of this file, and a method of the handler that sends a response or raises
`Refusal`.
"""

import hashlib
import hmac
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import PurePosixPath
from typing import BinaryIO
from urllib.parse import parse_qs, quote, unquote

from tests.hub_repo import EPOCH, Refusal, RepoFile, tree_id

CHUNK = 64 * 1024


@dataclass(frozen=True)
class Request:
    """One answered request.

    Args:
        method (`str`): `GET`, `HEAD`, ...
        path (`str`): The decoded path. CDN paths start with `/cdn/`; they end with the file's name, as Hub paths do.
        query (`str`): The part after `?`.
        range (`str`, *optional*): The `Range` header.
        status (`int`): The status code of the response.
        sent (`int`): Bytes of the body that were sent, also of errors; 0 for `HEAD`.
        authorized (`bool`): Whether the request had an `Authorization` header, valid or not.
    """

    method: str
    path: str
    query: str
    range: str | None
    status: int
    sent: int
    authorized: bool


class Handler(BaseHTTPRequestHandler):
    """One client's connection; `server` is the listener, which knows its `routes` and the `hub`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise the body, a second write, would wait for an ACK of the headers

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def answer(self) -> None:
        raw, _, self.query = self.path.partition("?")
        self.decoded = unquote(raw)
        self.unread = int(self.headers.get("Content-Length") or 0)
        try:
            hub = self.server.hub
            time.sleep(hub.take("delay", self.command, self.decoded) or 0)
            hub.use_token(self.token)
            if refusal := hub.take("status", self.command, self.decoded):
                raise refusal
            for method, pattern, action in self.server.routes:
                if method in (self.command, {"HEAD": "GET"}.get(self.command)) and (match := pattern.fullmatch(raw)):
                    found = {name: unquote(text) for name, text in match.groupdict("").items()}
                    if (section := found.pop("section", "")) in ("datasets", "spaces"):
                        found["repo"] = f"{section}/{found['repo']}"
                    return action(self, **found)
            raise Refusal(404, "No such route")
        except Refusal as refusal:
            self.send_json(refusal.body, refusal.status, refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    # The request

    @property
    def token(self) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        return token if kind == "Bearer" else None

    def flag(self, name: str) -> bool:
        return parse_qs(self.query).get(name, [""])[-1].lower() in ("true", "1")

    def body(self) -> Iterator[bytes]:
        """Read the body, piece by piece."""
        left = self.server.hub.take("hang up", self.command, self.decoded) if self.unread else None
        while self.unread:
            if left is not None and (left := left - CHUNK) < 0:
                self.close_connection = True
                raise ConnectionResetError("hung up within a request, as the test asked")
            if not (chunk := self.rfile.read(min(CHUNK, self.unread))):
                raise ConnectionResetError("the client left within its request")
            self.unread -= len(chunk)
            yield chunk

    def read_json(self) -> dict:
        """Read the body as a JSON object."""
        return json.loads(b"".join(self.body()) or b"{}")

    # Routes

    def info(self, repo: str, revision: str) -> None:
        hub = self.server.hub
        commit = hub.at(repo, self.token, revision or "main")
        files, name = commit.files, repo.removeprefix("datasets/").removeprefix("spaces/")
        siblings: list[dict] = [{"rfilename": name} for name in files]
        if self.flag("blobs"):
            for sibling, file in zip(siblings, files.values(), strict=True):
                sibling |= {"size": file.size, "blobId": file.blob_id}
                if file.sha256:
                    sibling["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
        answer = {
            "_id": hashlib.sha1(repo.encode()).hexdigest()[:24],
            "id": name,
            "author": name.rpartition("/")[0] or None,
            "sha": commit.id,
            "lastModified": EPOCH,
            "createdAt": EPOCH,
            "private": repo in hub.private,
            "gated": "manual" if repo in hub.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "usedStorage": sum(file.size for file in files.values()),
            "siblings": siblings,
            **({"modelId": repo} if name == repo else {}),
            **({"sdk": hub.repos[repo].sdk} if repo.startswith("spaces/") else {}),
        }
        self.send_json(answer)

    def tree(self, repo: str, revision: str, folder: str) -> None:
        found, commit = self.server.hub.repo(repo, self.token), self.server.hub.at(repo, self.token, revision)
        files = commit.files
        top = folder.strip("/") + "/" if folder.strip("/") else ""
        inside = {name: file for name, file in files.items() if name.startswith(top)}
        if not inside and top:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        entries: dict[str, dict] = {}
        for name, file in inside.items():
            for parent in [part.as_posix() for part in PurePosixPath(name).parents][-2::-1]:
                if parent.startswith(top) and parent not in entries:
                    under = {name: file for name, file in files.items() if name.startswith(parent + "/")}
                    entries[parent] = {"type": "directory", "oid": tree_id(under), "size": 0, "path": parent}
            entries[name] = {"type": "file", "oid": file.blob_id, "size": file.size, "path": name}
            if file.sha256:
                entries[name]["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": file.pointer_size}
            if self.flag("expand"):
                last = commit
                while (earlier := found.at(last.parent or "")) and earlier.files.get(name) == file:
                    last = earlier
                entries[name]["lastCommit"] = {"id": last.id, "title": last.title, "date": EPOCH}
        if not self.flag("recursive"):
            entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(top)}
        self.send_json(list(entries.values()))

    def refs(self, repo: str) -> None:
        branches = self.server.hub.repo(repo, self.token).branches
        told = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": head} for name, head in branches.items()]
        self.send_json({"branches": told, "converts": [], "tags": []})

    def commits(self, repo: str, revision: str) -> None:
        hub, history = self.server.hub, []
        commit = hub.at(repo, self.token, revision)
        while commit is not None:
            history.append({"id": commit.id, "title": commit.title, "message": "", "date": EPOCH, "authors": []})
            commit = hub.repo(repo, self.token).at(commit.parent) if commit.parent else None
        self.send_json(history)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        hub = self.server.hub
        commit = hub.at(repo, self.token, revision, content=True)
        headers = {"X-Repo-Commit": commit.id}
        # Looked up, never joined to a folder: a path with dots leads nowhere.
        if (file := commit.files.get(name)) is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=headers["X-Repo-Commit"])
        if not file.sha256:
            return self.send_file(file, headers)
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        path = f"/cdn/{repo}/{file.sha256}/{name}"
        headers["Location"] = f"{hub.cdn_endpoint}{quote(path)}?signature={hub.signature(path)}"
        return self.send(302, headers | {"Accept-Ranges": "bytes"}, 0, iter(()))

    def cdn(self, repo: str, sha256: str, name: str) -> None:
        if self.headers.get("Authorization"):
            # As a presigned URL does: the client has just leaked a token that was meant for the Hub.
            raise Refusal(400, "Only one auth mechanism allowed")
        given = parse_qs(self.query).get("signature", [""])[0]
        if not hmac.compare_digest(given.encode(), self.server.hub.signature(self.decoded).encode()):
            raise Refusal(403, "SignatureDoesNotMatch")
        found = self.server.hub.repos.get(repo)
        if found is None or (file := found.large(sha256, name)) is None:
            raise Refusal(404, "NoSuchKey")
        self.send_file(file, {})

    # The response

    def send_json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = (value if isinstance(value, str) else json.dumps(value)).encode()
        headers = {"Content-Type": "application/json; charset=utf-8"} | dict(headers or {})
        self.send(status, headers, len(body), iter([body]))

    def send_file(self, file: RepoFile, headers: dict[str, str]) -> None:
        headers |= {
            "ETag": f'"{file.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream" if file.sha256 else "text/plain; charset=utf-8",
        }
        span = parse_range(self.headers.get("Range"), file.size) if self.command == "GET" else None
        if span is None:
            status, span = 200, range(file.size)
        elif span:
            status, headers["Content-Range"] = 206, f"bytes {span.start}-{span.stop - 1}/{file.size}"
        else:
            raise Refusal(416, "Range Not Satisfiable", Content_Range=f"bytes */{file.size}")
        with file.path.open("rb") as opened:
            opened.seek(span.start)
            self.send(status, headers, len(span), read_chunks(opened, len(span)))

    def send(self, status: int, headers: Mapping[str, str], length: int, chunks: Iterator[bytes]) -> None:
        hub, asked = self.server.hub, self.headers
        for _ in self.body():
            pass  # unread bytes would be taken for the next request
        request = Request(self.command, self.decoded, self.query, asked["Range"], status, 0, "Authorization" in asked)
        if hub.take("lose", self.command, self.decoded):
            self.close_connection = True
            raise ConnectionResetError("the response is lost, as the test asked")
        # Logged before any byte is sent, and each chunk counted before it is written, so that a client that has read the
        # whole response finds it in the log.
        add = hub.record(request)
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = hub.take("break", self.command, self.decoded, length)
        for chunk in chunks:
            part = chunk if left is None else chunk[:left]
            add(len(part))
            try:
                self.wfile.write(part)
            except OSError:
                add(-len(part))
                raise
            if left is not None and (left := left - len(part)) == 0:
                self.close_connection = True
                return


def parse_range(header: str | None, size: int) -> range | None:
    """The positions in a `Range` header: empty if none can be satisfied, `None` to send everything.

    As RFC 9110 allows, forms other than the client's `bytes=FIRST-` and `bytes=FIRST-LAST` are ignored.
    """
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", header or "")
    if match is None:
        return None
    return range(int(match[1]), min(int(match[2] or size) + 1, size))


def read_chunks(file: BinaryIO, length: int) -> Iterator[bytes]:
    """Read `length` bytes in chunks."""
    while length and (chunk := file.read(min(CHUNK, length))):
        length -= len(chunk)
        yield chunk


Route = tuple[str, re.Pattern[str], Callable[..., None]]
_REPO = "(?P<repo>[^/]+(?:/[^/]+)?)"
# How paths of the API and of pages name a repository; its type is the `section`.
API = f"/api/(?P<section>models|datasets|spaces)/{_REPO}"
PAGE = f"(?:/(?P<section>datasets|spaces))?/{_REPO}"
# The HTTP method (GET also matches HEAD), the path, still encoded, and the method of the handler.
HUB_ROUTES: list[Route] = [
    ("GET", re.compile(f"{API}(?:/revision/(?P<revision>[^/]+))?"), Handler.info),
    ("GET", re.compile(f"{API}/refs"), Handler.refs),
    ("GET", re.compile(f"{API}/commits/(?P<revision>[^/]+)"), Handler.commits),
    ("GET", re.compile(f"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.*))?"), Handler.tree),
    ("GET", re.compile(f"{PAGE}/resolve/(?P<revision>[^/]+)/(?P<name>.+)"), Handler.resolve),
]
CDN_ROUTES: list[Route] = [("GET", re.compile(f"/cdn{PAGE}/(?P<sha256>[0-9a-f]{{64}})/(?P<name>.+)"), Handler.cdn)]
