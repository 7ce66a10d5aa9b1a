"""Bringing a repository on the Hub to a state, by one commit or none.

    upload(Upload("org/name", {"config.json": Path("pruned/config.json"), ...}))

Large files go to storage first, where nobody sees them; then one commit names them all. Before it, the repository's
main is what it was, after it, everything is there. What is there already is not sent again: a second upload makes no
commit, and one that was broken off goes on where it stopped.
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

# How often an upload is attempted where the Hub stumbles; its client retries single transfers by itself.
ATTEMPTS = 4
FIRST_WAIT = 1.0
# If the Hub asks for a longer pause than this, the user is told so instead.
MAX_RETRY_AFTER = 120.0
_TRY_AGAIN = {408, 425, 429, 500, 502, 503, 504}
_Answer = TypeVar("_Answer")


class PushError(CheckpointError):
    """The Hub did not take it. Nothing that a reader could see was changed."""


@dataclass(frozen=True)
class Upload:
    """A state of a repository.

    Args:
        repo_id (`str`): The repository.
        files (`dict[str, Path]`): Where each of its files is here, by its path there.
        kind (`str`): `"model"`, `"space"` or `"dataset"`.
        sdk (`str`, *optional*): Of a Space that has to be made.
        private (`bool`): Whether nobody else may see it. A public repository that is there is then refused; without
            it, a new one is what its owner's settings say.
        revision (`str`, *optional*): A branch, which is made where it is missing; or `refs/pr/N`.
        create_pr (`bool`): Propose the change instead of making it.
        message (`str`): The commit's title.
        removable (`Callable[[str], bool]`): Which other files of the repository have to go.
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
        url (`str`): Where to look at it.
        commit (`str`): The commit at which everything is there.
        added (`tuple[str, ...]`): The files that are new or changed; none where everything was there.
        removed (`tuple[str, ...]`): The files that went.
        pull_request (`str`, *optional*): Where the change is proposed.
    """

    url: str
    commit: str
    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    pull_request: str | None = None


def log_in(token: str | bool | None = None) -> tuple[HfApi, dict[str, Any]]:
    """Prove that there is a token, that the Hub knows it, and that it may write.

    Args:
        token (`str` or `bool`, *optional*): As the client library takes it; by default the user's own.

    Returns:
        `tuple[HfApi, dict[str, Any]]`: The client, and what the Hub says of the user.

    Raises:
        PushError: There is no token, or it may not write.
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
        user = _patiently(api.whoami)
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PushError(
            "this token may only read; make one that may write at https://huggingface.co/settings/tokens, and log in "
            "with it"
        )
    return api, user


def upload(job: Upload, api: HfApi, user: dict[str, Any]) -> Uploaded:
    """Bring a repository to a state.

    Args:
        job (`Upload`): The state.
        api (`HfApi`): The client, see `log_in`.
        user (`dict[str, Any]`): What the Hub says of the user.

    Returns:
        `Uploaded`: What was done.

    Raises:
        PushError: The Hub refused. What a reader sees is what was there before.
        UnreachableError: It could not be reached for long enough.
    """
    operations: dict[str, CommitOperationAdd] = {}
    with push_errors(job.repo_id, user, job.kind):
        return _patiently(lambda: _attempt(job, api, user, operations))


def _attempt(job: Upload, api: HfApi, user: dict[str, Any], operations: dict[str, CommitOperationAdd]) -> Uploaded:
    """One attempt, from the start: what an earlier one did although its answer was lost is found, not done twice.

    Args:
        job (`Upload`): The state.
        api (`HfApi`): The client.
        user (`dict[str, Any]`): What the Hub says of the user.
        operations (`dict[str, CommitOperationAdd]`): Those of earlier attempts, which know what is in storage already.
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
    """Find the repository, or make it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(job.repo_id, repo_type=job.kind)
    except RepositoryNotFoundError:
        if job.create_pr:
            raise PushError(
                f"there is no {job.kind} {job.repo_id} to propose anything to; leave out --create-pr"
            ) from None
        _create(job, api, user)
        try:
            info = api.repo_info(job.repo_id, repo_type=job.kind)
        except RepositoryNotFoundError as error:
            raise PushError(_taken(job, api)) from error
    if job.private and not info.private:
        raise PushError(
            f"{job.repo_id} is there and public, and --private was asked for; make it private on its page first, or "
            "choose another name"
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
            f"{user.get('name')} can't make {job.repo_id}: there is no organisation {namespace}, or this token may not "
            f"write to it; yours are {', '.join(sorted(filter(None, known)))}"
        ) from error


def _taken(job: Upload, api: HfApi) -> str:
    for kind in {"model", "space", "dataset"} - {job.kind}:
        if api.repo_exists(job.repo_id, repo_type=kind):
            return f"{job.repo_id} is taken: it is a {kind} on the Hub, not a {job.kind}; choose another name"
    return f"the Hub says that {job.repo_id} exists, but does not find it; choose another name"


def _tree(job: Upload, api: HfApi, revision: str | None) -> tuple[str, dict[str, Any]]:
    """The newest commit of a branch, and its files."""
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
    """An open proposal of ours with the very same content, if there is one."""
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


def _patiently(call: Callable[[], _Answer]) -> _Answer:
    """Ask the Hub, again after a pause where it stumbles."""
    for attempt in range(ATTEMPTS):
        try:
            return call()
        except Exception as raised:
            error = _cause(raised)
            pause = max(FIRST_WAIT * 2**attempt, _retry_after(error))
            if not _stumbled(error) or attempt == ATTEMPTS - 1 or pause > MAX_RETRY_AFTER:
                raise
            logger.info("%s; trying again in %.1f s", cause_of(error), pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _cause(error: Exception) -> Exception:
    """What is behind the client's `Error while uploading ...`."""
    inner = error.__cause__
    return inner if isinstance(error, RuntimeError) and isinstance(inner, Exception) else error


def _stumbled(error: Exception) -> bool:
    """Whether the Hub may answer the same request another time."""
    from huggingface_hub.errors import HfHubHTTPError

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    return isinstance(error, transport_error()) or status in _TRY_AGAIN


def _retry_after(error: Exception) -> float:
    """The pause in seconds that the Hub asks for; 0 where it asks for none."""
    response = getattr(error, "response", None)
    return (retry_after(response.headers.get("Retry-After")) if response is not None else None) or 0.0


@contextmanager
def push_errors(repo_id: str, user: dict[str, Any] | None, kind: str = "model") -> Iterator[None]:
    """Turn what the client raises into one line that says what, where, and the way out.

    Args:
        repo_id (`str`): The repository; empty where it is about the user alone.
        user (`dict[str, Any]`, *optional*): What the Hub says of the user.
        kind (`str`, *optional*, defaults to `"model"`): What the repository is.

    Raises:
        PushError: The Hub refused.
        UnreachableError: It could not be reached.
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
                f"can't reach the Hub{where} ({cause_of(error)}); run the same command again: what has arrived is not "
                "sent again"
            ) from raised
        if isinstance(error, errors.HFValidationError):
            raise PushError(f"{repo_id!r} is not a name for a repository: {cause_of(error)}") from raised
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
            f"the Hub answers {status}{f' for {repo_id}' if repo_id else ''}; run the same command again{later}: what has arrived is not sent "
            "again"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return PushError(f"{repo_id} has no such branch or pull request; check --revision")
    if status == 401 and name is None:
        return PushError("the token is not valid, or has expired; log in again with `hf auth login`")
    if status == 401:
        return PushError(f"the token is not valid for {repo_id} any longer; log in again with `hf auth login`")
    if status == 403:
        return PushError(
            f"{name or 'this token'} may not write to {repo_id}; ask its owner, propose the change with --create-pr, "
            "or push to a name of your own"
        )
    if status == 404:
        return PushError(
            f"there is no {kind} {repo_id} for {name or 'this token'}; check the name and the token's rights"
        )
    if status == 412:
        return PushError(f"somebody else has changed {repo_id} meanwhile; run the command again")
    if status == 402:
        return PushError(f"the Hub asks for a paid plan for {repo_id} ({says})")
    return PushError(f"the Hub refused {repo_id}: {says}")
