"""Uploads files to a repository on the Hub in a single commit, or none if nothing has changed.

    upload(Upload("org/name", {"config.json": Path("pruned/config.json"), ...}), *log_in())

Large files are first sent to storage, where nobody sees them; then one commit refers to all of them. Until then, the
branch is unchanged. Files that the Hub already has are not sent again: repeating an upload makes no commit, and an
interrupted upload resumes where it stopped.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...errors import CheckpointError, LayerPruneError, cause_of
from ...files.hub import UnreachableError, retry_after
from ...records.fingerprints import sha256_of
from ...versions import transport_error

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

logger = logging.getLogger(__name__)

# The number of attempts after temporary failures of the Hub; its client retries single transfers by itself.
ATTEMPTS = 4
FIRST_WAIT = 1.0
# If the Hub asks for a longer pause than this, the error says so instead of waiting.
MAX_RETRY_AFTER = 120.0
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_Answer = TypeVar("_Answer")


class PushError(CheckpointError):
    """A push was refused. Nothing that a reader of the repository can see was changed."""


@dataclass(frozen=True)
class Upload:
    """What a repository should contain.

    Args:
        repo_id (`str`): The repository.
        files (`dict[str, Path]`): The local file for each path in the repository.
        kind (`str`): `"model"`, `"space"` or `"dataset"`.
        sdk (`str`, *optional*): The SDK of a new Space.
        private (`bool`): Make a new repository private, and refuse an existing public one. If `False`, the owner's
            settings decide about a new one.
        revision (`str`, *optional*): A branch, created if it does not exist; or `refs/pr/N`.
        create_pr (`bool`): Open a pull request instead of committing.
        message (`str`): The title of the commit.
        removable (`Callable[[str], bool]`): Whether to remove another file of the repository, by its path.
    """

    repo_id: str
    files: dict[str, Path]
    kind: str = "model"
    sdk: str | None = None
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    message: str = "Upload with hf-layerprune"
    removable: Callable[[str], bool] = field(default=lambda name: False, repr=False)


@dataclass(frozen=True)
class Uploaded:
    """What an upload did.

    Args:
        url (`str`): The page of the repository.
        commit (`str`): The commit that contains all files.
        added (`tuple[str, ...]`): The files that are new or changed; empty if the Hub had all of them.
        removed (`tuple[str, ...]`): The removed files.
        pull_request (`str`, *optional*): The URL of the pull request.
    """

    url: str
    commit: str
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    pull_request: str | None = None


def log_in(token: str | bool | None = None) -> tuple[HfApi, dict[str, Any]]:
    """Check that there is a token, that the Hub accepts it, and that it may write.

    Args:
        token (`str` or `bool`, *optional*): As for `huggingface_hub`; by default the user's own.

    Returns:
        `tuple[HfApi, dict[str, Any]]`: The client, and the Hub's description of the user.

    Raises:
        PushError: There is no token, or it may not write.
        UnreachableError: The Hub is offline or could not be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UnreachableError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    if token is None or token is True:
        token = get_token()
    if not token:
        raise PushError("there is no token; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with push_errors("", None):
        user = _with_retries(api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(
            "this token may only read; create one that may write at https://huggingface.co/settings/tokens, and log in "
            "with it"
        )
    return api, user


def upload(job: Upload, api: HfApi, user: dict[str, Any]) -> Uploaded:
    """Upload files in one commit.

    Args:
        job (`Upload`): What the repository should contain.
        api (`HfApi`): The client, see `log_in`.
        user (`dict[str, Any]`): The Hub's description of the user, see `log_in`.

    Returns:
        `Uploaded`: What was done.

    Raises:
        PushError: The Hub refused. What a reader sees is unchanged.
        UnreachableError: The Hub could not be reached, even after several attempts.
    """
    operations: dict[str, CommitOperationAdd] = {}
    with push_errors(job.repo_id, user, job.kind):
        return _with_retries(lambda: _attempt(job, api, user, operations))


def _attempt(job: Upload, api: HfApi, user: dict[str, Any], operations: dict[str, CommitOperationAdd]) -> Uploaded:
    """One complete attempt. If an earlier commit succeeded but its answer was lost, it is not repeated.

    Args:
        job (`Upload`): What the repository should contain.
        api (`HfApi`): The client.
        user (`dict[str, Any]`): The Hub's description of the user.
        operations (`dict[str, CommitOperationAdd]`): Those of earlier attempts, which know what is already in storage.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    _open(job, api, user)
    if job.revision and not job.revision.startswith("refs/pr/"):
        api.create_branch(job.repo_id, branch=job.revision, repo_type=job.kind, exist_ok=True)
    if job.create_pr and (proposed := _proposed(job, api)):
        return proposed
    head, remote = _tree(job, api, job.revision)
    added, removed = _difference(job, remote)
    if not added and not removed:
        return Uploaded(_url(job, api), head, tuple(operations), ())
    for name in added:
        if name not in operations:
            operations[name] = CommitOperationAdd(name, str(job.files[name]))
    commit = api.create_commit(
        job.repo_id,
        [*(operations[name] for name in added), *map(CommitOperationDelete, removed)],
        commit_message=job.message,
        repo_type=job.kind,
        revision=job.revision,
        create_pr=job.create_pr,
        parent_commit=head,
    )
    return Uploaded(_url(job, api), commit.oid, tuple(added), tuple(removed), commit.pr_url)


def _open(job: Upload, api: HfApi, user: dict[str, Any]) -> None:
    """Find the repository, or create it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(job.repo_id, repo_type=job.kind)
    except RepositoryNotFoundError:
        if job.create_pr:
            raise PushError(
                f"there is no {job.kind} {job.repo_id} to open a pull request for; omit --create-pr"
            ) from None
        _create(job, api, user)
        try:
            info = api.repo_info(job.repo_id, repo_type=job.kind)
        except RepositoryNotFoundError as error:
            raise PushError(_taken(job, api)) from error
    if job.private and not info.private:
        raise PushError(
            f"{job.repo_id} exists and is public, but --private was given; make it private on its page first, or choose "
            "another name"
        )


def _create(job: Upload, api: HfApi, user: dict[str, Any]) -> None:
    from huggingface_hub.errors import HfHubHTTPError

    private = job.private or None
    try:
        api.create_repo(job.repo_id, repo_type=job.kind, private=private, space_sdk=job.sdk, exist_ok=True)
    except HfHubHTTPError as error:
        namespace = job.repo_id.rpartition("/")[0]
        known = {user.get("name"), *(one.get("name") for one in user.get("orgs") or ())}
        if error.response.status_code not in (403, 404) or namespace in known:
            raise
        raise PushError(
            f"{user.get('name')} can't create {job.repo_id}: there is no organisation {namespace}, or this token may not "
            f"write to it; use one of your namespaces: {', '.join(sorted(filter(None, known)))}"
        ) from error


def _taken(job: Upload, api: HfApi) -> str:
    for kind in {"model", "space", "dataset"} - {job.kind}:
        if api.repo_exists(job.repo_id, repo_type=kind):
            return f"{job.repo_id} is already a {kind} on the Hub, not a {job.kind}; choose another name"
    return f"the Hub reports that {job.repo_id} exists, but can't find it; choose another name"


def _tree(job: Upload, api: HfApi, revision: str | None) -> tuple[str, dict[str, Any]]:
    """The latest commit of a branch, and its files."""
    head = str(api.repo_info(job.repo_id, repo_type=job.kind, revision=revision).sha)
    entries = api.list_repo_tree(job.repo_id, recursive=True, repo_type=job.kind, revision=head)
    return head, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def _difference(job: Upload, remote: dict[str, Any]) -> tuple[list[str], list[str]]:
    added = [name for name, path in job.files.items() if not _same(path, remote.get(name))]
    removed = [name for name in remote if name not in job.files and job.removable(name)]
    return added, removed


def _same(path: Path, entry: Any) -> bool:
    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256_of(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == entry.blob_id


def _proposed(job: Upload, api: HfApi) -> Uploaded | None:
    """An open pull request of ours with exactly the same content, if there is one."""
    proposals = api.get_repo_discussions(
        job.repo_id, repo_type=job.kind, discussion_type="pull_request", discussion_status="open"
    )
    for one in proposals:
        if one.title != job.message:
            continue
        head, remote = _tree(job, api, f"refs/pr/{one.num}")
        if _difference(job, remote) == ([], []):
            return Uploaded(_url(job, api), head, pull_request=one.url)
    return None


def _url(job: Upload, api: HfApi) -> str:
    prefix = "" if job.kind == "model" else f"{job.kind}s/"
    branch = f"/tree/{job.revision}" if job.revision else ""
    return f"{api.endpoint}/{prefix}{job.repo_id}{branch}"


def _with_retries(call: Callable[[], _Answer]) -> _Answer:
    """Call the Hub; after a temporary failure, wait and try again."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as raised:
            error = _cause(raised)
            pause = max(FIRST_WAIT * 2**attempt, _retry_after(error))
            if not _is_temporary(error) or attempt == ATTEMPTS - 1 or pause > MAX_RETRY_AFTER:
                raise
            logger.info("%s; trying again in %.1f s", cause_of(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """The cause of the client's `Error while uploading ...`."""
    inner = error.__cause__
    return inner if isinstance(error, RuntimeError) and isinstance(inner, Exception) else error


def _is_temporary(error: Exception) -> bool:
    """Whether the same request may succeed later."""
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    return isinstance(error, transport_error()) or status in _TRY_AGAIN


def _retry_after(error: Exception) -> float:
    """The pause in seconds that the Hub asks for, or 0."""
    response = getattr(error, "response", None)
    return (retry_after(response.headers.get("Retry-After")) if response is not None else None) or 0.0


@contextmanager
def push_errors(repo_id: str, user: dict[str, Any] | None, kind: str = "model") -> Iterator[None]:
    """Turn exceptions of the client into one line that says what, where, and the way out.

    Args:
        repo_id (`str`): The repository; empty if only the user is concerned.
        user (`dict[str, Any]`, *optional*): The Hub's description of the user.
        kind (`str`, *optional*, defaults to `"model"`): The kind of the repository.

    Raises:
        PushError: The Hub refused.
        UnreachableError: The Hub could not be reached.
    """
    from huggingface_hub import errors

    try:
        yield
    except LayerPruneError:
        raise
    except Exception as raised:
        error = _cause(raised)
        if isinstance(error, (transport_error(), errors.OfflineModeIsEnabled)):
            where = f" for {repo_id}" if repo_id else ""
            raise UnreachableError(
                f"can't reach the Hub{where} ({cause_of(error)}); run the same command again: files that have arrived "
                "are not sent again"
            ) from raised
        if isinstance(error, errors.HFValidationError):
            raise PushError(f"{repo_id!r} is not a valid repository name: {cause_of(error)}") from raised
        if isinstance(error, errors.HfHubHTTPError):
            raise _refused(error, repo_id, user, kind) from raised
        if isinstance(error, ValueError) and "metadata" in str(error):
            raise PushError(f"the Hub does not accept the YAML of README.md: {cause_of(error)}") from raised
        raise


def _refused(error: Any, repo_id: str, user: dict[str, Any] | None, kind: str) -> CheckpointError:
    from huggingface_hub import errors

    status, says = error.response.status_code, cause_of(error)
    name = user.get("name") if user else None
    if status in _TRY_AGAIN:
        after = error.response.headers.get("Retry-After")
        later = f" in {after} s" if status == 429 and after else " later"
        return UnreachableError(
            f"the Hub answers {status}{f' for {repo_id}' if repo_id else ''}; run the same command again{later}: files "
            "that have arrived are not sent again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return PushError(f"{repo_id} has no such branch or pull request; check --revision")
    if status == 401 and name is None:
        return PushError("the token is not valid, or has expired; log in again with `hf auth login`")
    if status == 401:
        return PushError(f"the token is not valid for {repo_id} any more; log in again with `hf auth login`")
    if status == 403:
        return PushError(
            f"{name or 'this token'} may not write to {repo_id}; ask its owner, open a pull request with --create-pr, "
            "or push to another repository"
        )
    if status == 404:
        return PushError(
            f"{name or 'this token'} can't find the {kind} {repo_id}; check the name and the token's permissions"
        )
    if status == 412:
        return PushError(f"somebody else changed {repo_id} in the meantime; run the command again")
    if status == 402:
        return PushError(f"the Hub asks for a paid plan for {repo_id} ({says})")
    return PushError(f"the Hub refused {repo_id}: {says}")
