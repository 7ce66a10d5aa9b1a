"""Reading byte ranges of a file on the Hub, each answer held against what was asked.

The client library resolves where a file lies, with the user's token, and lends its session; the ranges are then asked
for there. What breaks is taken up again at the byte where it stopped.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..errors import CheckpointError
from ..files.copy import write_all
from ..runtime.loading import first_line
from ..versions import transport_error

if TYPE_CHECKING:
    from huggingface_hub.file_download import HfFileMetadata
    from huggingface_hub.hf_api import RepoSibling

logger = logging.getLogger(__name__)

# So many attempts in a row may end without a single byte.
ATTEMPTS = 6
FIRST_WAIT = 1.0
MAX_WAIT = 30.0
# A server that wants to be left alone for longer than this is not waited for.
MAX_RETRY_AFTER = 300.0
# The first request for a header. It is most often enough, and less than a hundredth of a file that is cut.
HEAD = 100_000
_LEAST_HEAD = 4096
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_GONE = {401, 403, 404, 410}
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class BrokenDownloadError(CheckpointError):
    """The Hub could not be reached for long enough. Trying again later may help."""


class WrongAnswerError(CheckpointError):
    """The server sent something else than it was asked for."""


class _BreakError(Exception):
    """An attempt that may go better next time."""

    def __init__(self, what: str, wait: float | None = None) -> None:
        super().__init__(what)
        self.wait = wait


class _MovedError(Exception):
    """The address is no longer good."""


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub client raises into one line that says what, where, and the way out.

    Args:
        repo (`str`): The repository that is read.
        revision (`str`, *optional*): The revision that was asked for.

    Raises:
        CheckpointError: The Hub refused.
        BrokenDownloadError: The Hub could not be reached.
    """
    from huggingface_hub import errors

    try:
        yield
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
    except errors.HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise CheckpointError(
                f"{repo} can't be read with this token ({first_line(error)}); log in with `hf auth login`"
            ) from error
        kind = BrokenDownloadError if error.response.status_code in _TRY_AGAIN else CheckpointError
        raise kind(f"can't read {repo}: {first_line(error)}") from error
    except (transport_error(), errors.OfflineModeIsEnabled) as error:
        raise BrokenDownloadError(f"can't reach the Hub for {repo}: {first_line(error)}") from error
    except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError, errors.FileMetadataError) as error:
        raise BrokenDownloadError(f"can't get {repo}: {first_line(error)}") from error
    except errors.HFValidationError as error:
        raise CheckpointError(f"{repo!r} is neither a folder nor a Hub id: {first_line(error)}") from error


@dataclass(frozen=True)
class HubFile:
    """One file of a repository, as its listing describes it.

    Args:
        size (`int`): Its size.
        sha256 (`str`, *optional*): The hash of its content, where it is of LFS kind.
        blob_id (`str`, *optional*): What git calls it.
    """

    size: int
    sha256: str | None = None
    blob_id: str | None = None

    @classmethod
    def of(cls, entry: RepoSibling) -> HubFile:
        """What the client library says of a file."""
        return cls(int(entry.size or 0), None if entry.lfs is None else entry.lfs.sha256, entry.blob_id)


@dataclass
class _Location:
    """Where a file's bytes are at the moment."""

    url: str
    headers: dict[str, str]
    etag: str | None = None  # of the answers from there; storage need not call it what the Hub calls it


class RemoteFile:
    """A `Source` on the Hub.

    Args:
        repo (`str`): The repository's id.
        filename (`str`): The file's name in it.
        commit (`str`): The commit that it is read at.
        entry (`HubFile`): What the repository's listing says about it.
        token (`str` or `bool`, *optional*): As the client library takes it; by default the user's own.
    """

    def __init__(self, repo: str, filename: str, commit: str, entry: HubFile, token: str | bool | None = None) -> None:
        self.repo = repo
        self.filename = filename
        self.name = f"{repo}/{filename}"
        self.size = entry.size
        self._commit = commit
        self._entry = entry
        self._token = token
        self._lock = threading.Lock()
        self._location: _Location | None = None
        self._etag: str | None = None
        self._head = b""

    @property
    def version(self) -> Hashable:
        """What changes when the content does."""
        return self._commit, self._entry.sha256 or self._entry.blob_id, self.size

    def read(self, offset: int, length: int) -> bytes:
        """Read a range. The file's first bytes are fetched once and kept.

        Args:
            offset (`int`): Where it starts.
            length (`int`): How long it is.

        Returns:
            `bytes`: Exactly that many bytes.

        Raises:
            CheckpointError: They can't be had.
        """
        if not self._head and self.size:
            self._head = self._fetch(0, min(self.size, max(_LEAST_HEAD, min(HEAD, self.size // 500))))
        known = self._head[offset : offset + length]
        return known + self._fetch(offset + len(known), length - len(known))

    def _fetch(self, offset: int, length: int) -> bytes:
        try:
            return b"".join(self.stream(offset, length))
        except BrokenDownloadError as error:
            raise BrokenDownloadError(f"{error}; check the connection and run the command again") from error

    def copy_into(self, output: int, offset: int, length: int) -> Iterator[int]:
        """Append a range of this file to an open file, yielding the size of each chunk once it is written."""
        for data in self.stream(offset, length):
            write_all(output, data)
            yield len(data)

    def stream(self, offset: int, length: int, stop: threading.Event | None = None) -> Iterator[bytes]:
        """Fetch a range, piece by piece, going on where a connection breaks.

        Args:
            offset (`int`): Where it starts.
            length (`int`): How long it is.
            stop (`threading.Event`, *optional*): Ends the waiting between attempts.

        Yields:
            `bytes`: The next bytes; all of them together are exactly as many as were asked for.

        Raises:
            BrokenDownloadError: The connection broke, or the server had errors, too many times in a row.
            CheckpointError: The answers are not what was asked for, or access is refused.
        """
        end, failures, renewals = offset + length, 0, 0
        while offset < end:
            location = self._located()
            try:
                for data in self._request(location, offset, end):
                    offset, failures, renewals = offset + len(data), 0, 0
                    yield data
            except _MovedError as moved:
                # A signed address runs out after a while. One that is refused when it is new is refused for good.
                if renewals:
                    raise CheckpointError(f"{self.name} can't be read where the Hub says it is ({moved})") from None
                renewals += 1
                self._forget(location)
            except _BreakError as broken:
                failures += 1
                if failures >= ATTEMPTS:
                    raise BrokenDownloadError(f"{self.name} broke off at byte {offset} ({broken})") from None
                wait = min(MAX_WAIT, FIRST_WAIT * 2 ** (failures - 1)) if broken.wait is None else broken.wait
                if wait > MAX_RETRY_AFTER:
                    raise BrokenDownloadError(f"{self.name}: {broken}, and not to try for {wait:.0f} s") from None
                logger.info("%s: %s at byte %d; trying again in %.1f s", self.name, broken, offset, wait)
                if (stop or threading.Event()).wait(wait):
                    raise BrokenDownloadError(f"{self.name} was left at byte {offset}") from None

    def _request(self, location: _Location, offset: int, end: int) -> Iterator[bytes]:
        from huggingface_hub import constants
        from huggingface_hub.utils import get_session

        headers = location.headers | {"Range": f"bytes={offset}-{end - 1}", "Accept-Encoding": "identity"}
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        try:
            with get_session().stream(
                "GET", location.url, headers=headers, timeout=timeout, follow_redirects=False
            ) as response:
                self._check(response, location, offset, end)
                left = end - offset
                for data in response.iter_raw():
                    left -= len(data)
                    if left < 0:
                        raise self._wrong("sent more than was asked for")
                    yield data
                if left:
                    raise _BreakError("the answer ended early")
        except transport_error() as error:
            raise _BreakError(f"{type(error).__name__}: {error}") from error

    def _check(self, response: Any, location: _Location, offset: int, end: int) -> None:
        """Hold the head of an answer against what was asked."""
        status = response.status_code
        if status in _TRY_AGAIN:
            raise _BreakError(f"the server answered {status}", retry_after(response.headers.get("Retry-After")))
        if status in _GONE or 300 <= status < 400:
            raise _MovedError(f"status {status}")
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if status == 200 and not (offset == 0 and end == self.size):
            raise self._wrong("answered a request for a part with the whole file")
        if status not in (200, 206):
            raise self._wrong(f"answered a request for bytes {offset}-{end - 1} of {self.size} with status {status}")
        if status == 206 and (found is None or tuple(map(int, found.groups())) != (offset, end - 1, self.size)):
            says = response.headers.get("Content-Range", "no Content-Range")[:100]
            raise self._wrong(f"answered a request for bytes {offset}-{end - 1} of {self.size} with {says!r}")
        length = response.headers.get("Content-Length")
        if length is not None and length != str(end - offset):
            raise self._wrong(f"sends {length[:20]} bytes in place of {end - offset}")
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise self._wrong("sends the bytes in another encoding")
        self._check_commit(response.headers.get("X-Repo-Commit"))
        etag = response.headers.get("ETag")
        with self._lock:
            if location.etag is None:
                location.etag = etag
            elif location.etag != etag:
                raise self._wrong("has changed the file meanwhile")

    def _check_commit(self, commit: str | None) -> None:
        if commit is not None and commit != self._commit:
            raise self._wrong(f"answered for commit {commit[:40]} in place of {self._commit}")

    def _wrong(self, what: str) -> WrongAnswerError:
        return WrongAnswerError(f"{self.name}: the server {what}; nothing was kept, try again later")

    def _located(self) -> _Location:
        with self._lock:
            if self._location is None:
                self._location = self._locate()
            return self._location

    def _forget(self, location: _Location) -> None:
        with self._lock:
            if self._location is location:
                self._location = None

    def _locate(self) -> _Location:
        """Ask the Hub where the bytes are; only the Hub itself gets the token."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.repo, self.filename, revision=self._commit)
        with hub_errors(self.repo):
            found = get_hf_file_metadata(url, token=self._token, retry_on_errors=True)
        self._check_metadata(found)
        headers = build_hf_headers(token=self._token)
        if urlsplit(found.location)[:2] != urlsplit(url)[:2]:
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        return _Location(found.location, headers)

    def _check_metadata(self, found: HfFileMetadata) -> None:
        self._check_commit(found.commit_hash)
        if found.size is not None and found.size != self.size:
            raise self._wrong(f"says {found.size} bytes, and the listing {self.size}")
        listed = self._entry.sha256
        other = listed is not None and _SHA256.fullmatch(found.etag or "") and found.etag != listed
        if other or (self._etag is not None and self._etag != found.etag):
            raise self._wrong("has another content than the listing says")
        self._etag = found.etag


def retry_after(value: str | None) -> float | None:
    """Seconds to wait, from a header that holds seconds or a date."""
    from email.utils import parsedate_to_datetime

    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
