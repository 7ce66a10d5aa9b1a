"""A small stand-in for the Hugging Face Hub: real HTTP on loopback, standard library only.

    with HubServer({"org/name": folder}) as server:
        subprocess.run([sys.executable, "-c", script], env=client_env(server, home), check=True)
        assert server.bytes_served("model.safetensors") == size

The unmodified `huggingface_hub` client, and everything built on it, reads repositories from plain folders through it. With
a token from `writers`, it also creates repositories and commits to them, in a folder that the server creates and removes.
Models are named by their id, others `datasets/org/name` and `spaces/org/name`. Like the real Hub, it is two web servers.
The Hub serves the API and small files, and redirects LFS files, with a signed URL, to a CDN on another port. That is another
origin, to which the client must not send its token. (On the same origin, the client would follow a redirected `HEAD` and
lose the `X-Repo-Commit` that it needs.)
"""

import hashlib
import hmac
import os
import re
import secrets
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from tests.hub_repo import Commit, Refusal, Repo
from tests.hub_routes import CDN_ROUTES, HUB_ROUTES, Request, Route
from tests.hub_writing import STORAGE_ROUTES, WRITING_ROUTES, WritingHandler
from tests.hub_written import WrittenRepo


@dataclass
class _Fault:
    kind: str
    suffix: str
    times: int
    value: Any
    prefix: str = ""
    method: str | None = None

    def hits(self, method: str, path: str) -> bool:
        return (
            self.times > 0
            and self.method in (None, method)
            and path.startswith(self.prefix)
            and path.endswith(self.suffix)
        )


class HubServer:
    """Serves repositories from folders, and those that clients create.

    Args:
        repos (`Mapping[str, Path]`): The folder of each repository, by id. It is read again for each request, and never
            written.
        private (`Collection[str]`): Ids that look missing without a token for them.
        gated (`Collection[str]`): Ids whose files need a token; as on the Hub, the API describes them to everybody.
        tokens (`Mapping[str, Collection[str] | None]`): The ids that each token may read; `None` for all.
        writers (`Mapping[str, Collection[str] | None]`): The namespaces in which each token may read and write; `None`
            for all. Other tokens are read-only.
    """

    user = "somebody"  # the owner of all tokens

    def __init__(
        self,
        repos: Mapping[str, Path] | None = None,
        *,
        private: Collection[str] = (),
        gated: Collection[str] = (),
        tokens: Mapping[str, Collection[str] | None] | None = None,
        writers: Mapping[str, Collection[str] | None] | None = None,
    ) -> None:
        self.repos: dict[str, Repo] = {repo_id: Repo(Path(folder)) for repo_id, folder in (repos or {}).items()}
        self.private, self.gated = set(private), set(gated)
        self.closed: set[str] = set()  # namespaces in which a repository is private unless its maker says otherwise
        self.tokens, self.writers = dict(tokens or {}), dict(writers or {})
        self.endpoint = self.cdn_endpoint = ""
        self._secret = secrets.token_bytes(16)
        self._lock = threading.Lock()
        self._created = 0
        self.reset()

    def __enter__(self) -> Self:
        self._root = tempfile.TemporaryDirectory(prefix="hub-")
        self._listeners = [_Listener(self, HUB_ROUTES + WRITING_ROUTES), _Listener(self, CDN_ROUTES + STORAGE_ROUTES)]
        # The CDN has another host name, since some clients send the token to any port of the same host.
        self.endpoint, self.cdn_endpoint = (
            f"http://{host}:{one.server_port}"
            for host, one in zip(("127.0.0.1", "localhost"), self._listeners, strict=True)
        )
        return self

    def __exit__(self, *_: object) -> None:
        for listener in self._listeners:
            listener.stop()
        self._root.cleanup()

    # The log

    @property
    def log(self) -> list[Request]:
        """The requests so far, in the order of their responses."""
        with self._lock:
            return list(self._log)

    def bytes_served(self, path_suffix: str | None = None) -> int:
        """The number of body bytes sent, in total or for paths with a suffix (a file's Hub and CDN paths have the same)."""
        return sum(request.sent for request in self.log if request.path.endswith(path_suffix or ""))

    def reset(self) -> None:
        """Forget the log and every fault."""
        with self._lock:
            self._log: list[Request] = []
            self._faults: list[_Fault] = []
            self._expiring: dict[str, int] = {}

    def record(self, request: Request) -> Callable[[int], None]:
        """Log a request; the returned function adds to its sent bytes."""
        with self._lock:
            log, index = self._log, len(self._log)
            log.append(request)

        def add(count: int) -> None:
            with self._lock:
                log[index] = replace(log[index], sent=log[index].sent + count)

        return add

    # Faults

    def status(
        self,
        path_suffix: str,
        code: int,
        times: int = 1,
        *,
        method: str | None = None,
        prefix: str = "",
        body: Mapping | str | None = None,
        **headers: str,
    ) -> None:
        """Answer `times` requests with an error instead; `prefix="/cdn/"` or `"/api/"` restricts the paths."""
        refusal = Refusal(code, f"Status {code}, as the test asked", body=body, **headers)
        self._fail(_Fault("status", path_suffix, times, refusal, prefix, method))

    def delay(self, path_suffix: str, seconds: float, times: int = 1) -> None:
        """Wait before answering `times` requests."""
        self._fail(_Fault("delay", path_suffix, times, seconds))

    def hang_up(self, path_suffix: str, count: int, times: int = 1, *, method: str = "PUT", prefix: str = "") -> None:
        """Close the connection after `count` bytes of a request's body, `times` times."""
        self._fail(_Fault("hang up", path_suffix, times, count, prefix, method))

    def lose(self, path_suffix: str, *, method: str | None = None, prefix: str = "") -> None:
        """Execute a request, but close the connection instead of answering."""
        self._fail(_Fault("lose", path_suffix, 1, True, prefix, method))

    def garble(self) -> None:
        """Flip a bit of an upload on its way."""
        self._fail(_Fault("garble", "", 1, True, "/upload/", "PUT"))

    def fail_after(self, count: int, path_suffix: str, times: int = 1) -> None:
        """Close the connection after `count` bytes of a longer response body, `times` times."""
        self._fail(_Fault("break", path_suffix, times, count))

    def expire(self, token: str, after: int) -> None:
        """Let a token expire after this many more requests with it."""
        with self._lock:
            self._expiring[token] = after

    def _fail(self, fault: _Fault) -> None:
        with self._lock:
            self._faults.append(fault)

    def take(self, kind: str, method: str, path: str, length: int | None = None) -> Any:
        """The value of a fault of this kind that is due (within a body of this length), which is used up."""
        with self._lock:
            for fault in self._faults:
                if fault.kind == kind and fault.hits(method, path) and (length is None or fault.value < length):
                    fault.times -= 1
                    return fault.value
        return None

    def use_token(self, token: str | None) -> None:
        """Count a request with a token, and remove the token when it expires."""
        with self._lock:
            if token not in self._expiring:
                return
            self._expiring[token] -= 1
            if self._expiring[token] < 0:
                self.tokens.pop(token, None)
                self.writers.pop(token, None)

    # Access

    def repo(self, repo_id: str, token: str | None) -> Repo:
        """Look up a repository, if the token may know of it."""
        found = self.repos.get(repo_id)
        if found is None or (repo_id in self.private and not self._may_read(repo_id, token)):
            # A private repository looks like a missing one; the status depends on whether the user is logged in.
            raise Refusal(404 if self._knows(token) else 401, "Repository not found", "RepoNotFound")
        return found

    def at(self, repo_id: str, token: str | None, revision: str, content: bool = False) -> Commit:
        """Look up a repository at a revision; `content` if the content of files is requested too."""
        found = self.repo(repo_id, token)
        if content and repo_id in self.gated and not self._may_read(repo_id, token):
            raise Refusal(403, f"Access to model {repo_id} is restricted and you are not in its list.", "GatedRepo")
        if (commit := found.at(revision)) is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        return commit

    def writable(self, repo_id: str, token: str | None, propose: bool = False) -> WrittenRepo:
        """Look up a repository, if the token may write to it, or with `propose`, if it may read it."""
        # The client takes the Hub's plain 401 for a missing repository, but only over HTTPS; the code says it here.
        self._log_in(token, "RepoNotFound")
        found = self.repo(repo_id, token)
        if not propose and not self._may_write(repo_id, token):
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        if not isinstance(found, WrittenRepo):
            raise Refusal(403, f"{repo_id} is a folder that is only served; create a repository to write to it")
        return found

    def create(
        self, token: str | None, kind: str, namespace: str | None, name: str, private: bool, sdk: str | None
    ) -> str:
        """Create a repository; returns its id."""
        self._log_in(token)
        repo_id = {"dataset": "datasets/", "space": "spaces/"}.get(kind, "") + f"{namespace or self.user}/{name}"
        if not self._may_write(repo_id, token):
            where = f'the namespace "{namespace or self.user}"'
            raise Refusal(403, f"You don't have the rights to create a {kind} under {where}")
        with self._lock:
            if repo_id in self.repos:
                url = f"{self.endpoint}/{repo_id}"
                raise Refusal(409, f"You already created this {kind} repo: {repo_id}", body={"url": url})
            # A new folder, since a test may remove and recreate a repository while the old one is still being read.
            self._created += 1
            self.repos[repo_id] = WrittenRepo(Path(self._root.name, str(self._created)), sdk)
            if private:
                self.private.add(repo_id)
        return repo_id

    def whoami(self, token: str | None) -> dict:
        """Describe the owner of a token, and its permissions."""
        self._log_in(token)
        role = "write" if token in self.writers else "read"
        orgs = [{"type": "org", "name": one, "roleInOrg": "write"} for one in self.writers.get(token) or ()]
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        return {"type": "user", "name": self.user, "fullname": self.user, "orgs": orgs, "auth": auth}

    def _log_in(self, token: str | None, code: str | None = None) -> None:
        if token is None:
            raise Refusal(401, "Invalid username or password.", code)
        if not self._knows(token):
            raise Refusal(401, "Invalid credentials in Authorization header")

    def _knows(self, token: str | None) -> bool:
        return token in self.tokens or token in self.writers

    def _may_read(self, repo_id: str, token: str | None) -> bool:
        opened = self.tokens.get(token, ())
        return opened is None or repo_id in opened or self._may_write(repo_id, token)

    def _may_write(self, repo_id: str, token: str | None) -> bool:
        if token not in self.writers or "/" not in repo_id:
            return False
        namespaces = self.writers[token]
        return namespaces is None or repo_id.split("/")[-2] in (self.user, *namespaces)

    def signature(self, path: str) -> str:
        """The signature that allows a CDN path without a token."""
        return hmac.new(self._secret, path.encode(), hashlib.sha256).hexdigest()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, hub: HubServer, routes: list[Route]) -> None:
        super().__init__(("127.0.0.1", 0), WritingHandler)
        self.hub, self.routes = hub, routes
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        # Tests expect clients that hang up; anything else is a bug in this server.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
        # Kept-alive connections have their own threads, which would continue to answer.
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def client_env(server: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    """The environment of a process that uses only `server` as the Hub, and only the cache in `home`.

    The client reads it when it is imported, so it works only in a new process.
    """
    ours = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS|XDG_CACHE)_.*|.*_PROXY|DISABLE_TELEMETRY", re.IGNORECASE)
    env = {name: value for name, value in os.environ.items() if not ours.fullmatch(name)}
    return env | {
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "*",  # otherwise the operating system's proxy settings apply
        **({"HF_TOKEN": token} if token else {}),
    }
