"""Uploads files to a repository on the Hub in a single commit, or none if nothing has changed.

    job, api = UploadJob("org/name", {"config.json": Path("pruned/config.json"), ...}), log_in()
    ensure_repository(job, api)
    result = prepare_upload(job, api)()

Large files are first sent to storage, where nobody sees them; then one commit refers to all of them. Until then, the
branch is unchanged. Files that the Hub already has are not sent again: repeating an upload makes no commit, and an
interrupted upload resumes where it stopped. The Hub's client retries transfers by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError, cause_of
from ...files.hub import UnreachableError
from ...records.declared import CARD
from ...records.fingerprints import sha256_of
from ...versions import transport_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# The Hub's temporary failures.
_TEMPORARY_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_RETRY_HINT = "run the same command again: files that have arrived are not sent again"
_FOREIGN = (
    "an answer for {repo} is not the Hub's, or not as expected ({reason}); look for a log-in page or a proxy in between, or "
    "update huggingface_hub"
)
# What the Hub's refusals mean, by their status.
_STATUS_MESSAGES = {
    401: "the token for {repo} is not valid, or has expired; log in again with `hf auth login`",
    403: "this token may not write to {repo} ({reason}); use one that may, or push to another repository{proposal}",
    412: "somebody else changed {repo} in the meantime; run the command again",
}


class PushError(CheckpointError):
    """A push was refused. Nothing that a reader of the repository can see was changed."""


@dataclass(frozen=True)
class UploadJob:
    """What a repository should contain.

    Args:
        repo_id (`str`): The repository.
        files (`dict[str, Path]`): The local file for each path in the repository.
        kind (`str`): `"model"` or `"space"`.
        message (`str`): The title of the commit.
        private (`bool`): Make a new repository private, and refuse an existing public one. If `False`, the owner's
            settings decide about a new one.
        revision (`str`, *optional*): A branch, created if it does not exist; or `refs/pr/N`.
        create_pr (`bool`): Open a pull request instead of committing.
        removable (`Callable[[str], bool]`): Whether to remove another file of the repository, by its path.
        sha256 (`dict[str, str]`): What was checked of large files, by their path; they may change until they are sent.
    """

    repo_id: str
    files: dict[str, Path]
    kind: str = "model"
    message: str = "Upload with hf-layerprune"
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    removable: Callable[[str], bool] = field(default=lambda name: False, repr=False)
    sha256: dict[str, str] = field(default_factory=dict, repr=False)

    def differences(self, remote: dict[str, Any]) -> tuple[list[str], list[str]]:
        """The files to add or replace, and those to remove, given the entries of the repository by path."""
        added = [name for name, path in self.files.items() if not is_unchanged(path, remote.get(name))]
        return added, [name for name in remote if name not in self.files and self.removable(name)]


@dataclass(frozen=True)
class UploadResult:
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


def log_in(token: str | bool | None = None) -> HfApi:
    """A client for the Hub, if there is a token, the Hub accepts it, and it may write.

    Args:
        token (`str` or `bool`, *optional*): As for `huggingface_hub`; by default the user's own.

    Raises:
        PushError: There is no token, or it may not write.
        UnreachableError: The Hub is offline or could not be reached.
    """
    from huggingface_hub import HfApi, constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise UnreachableError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it")
    token = get_token() if token in (None, True) else token
    if not token:
        raise PushError("there is no token; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(token=token)
    with push_errors("your account"):
        role = api.whoami().get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise PushError(
            "this token may only read; create one that may write at https://huggingface.co/settings/tokens, and log in "
            "with it"
        )
    return api


def prepare_upload(job: UploadJob, api: HfApi) -> Callable[[], UploadResult]:
    """Send what a commit will refer to, to a repository from `ensure_repository`; returns the function that commits.

    Both raise:
        PushError: The Hub refused. What a reader sees is unchanged.
        UnreachableError: The Hub did not answer. A reader sees the old state or the whole new one.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with push_errors(job.repo_id, job.kind):
        url = f"{api.endpoint}/{'' if job.kind == 'model' else 'spaces/'}{job.repo_id}"
        url += f"/tree/{job.revision}" if job.revision else ""
        if job.revision and not job.revision.startswith("refs/pr/"):
            api.create_branch(job.repo_id, branch=job.revision, repo_type=job.kind, exist_ok=True)
        for proposal in _own_pull_requests(job, api):  # the same pull request is not opened twice
            head, remote = list_files(job, api, f"refs/pr/{proposal.num}")
            if job.differences(remote) == ([], []):
                found = UploadResult(url, head, pull_request=proposal.url)
                return lambda: found
        head, remote = list_files(job, api, job.revision)
        added, removed = job.differences(remote)
        if not added and not removed:
            return lambda: UploadResult(url, head)
        sent = [CommitOperationAdd(name, str(job.files[name])) for name in added]
        api.preupload_lfs_files(
            job.repo_id, sent, repo_type=job.kind, revision=job.revision, create_pr=job.create_pr, free_memory=False
        )
        for one in sent:
            checked = job.sha256.get(one.path_in_repo)
            if checked is not None and checked != one.upload_info.sha256.hex():
                raise PushError(f"{one.path_in_repo} was changed while it was being pushed; run the command again")

    def commit() -> UploadResult:
        with push_errors(job.repo_id, job.kind):
            made = api.create_commit(
                job.repo_id,
                [*sent, *(CommitOperationDelete(name) for name in removed)],
                commit_message=job.message,
                repo_type=job.kind,
                revision=job.revision,
                create_pr=job.create_pr,
                parent_commit=head,
            )
        return UploadResult(url, made.oid, tuple(added), tuple(removed), made.pr_url)

    return commit


def _check_card(path: Path, kind: str, api: HfApi) -> None:
    """Ask the Hub whether it accepts the metadata of a card."""
    from huggingface_hub import get_session, hf_raise_for_status

    payload = {"repoType": kind, "content": path.read_text(encoding="utf-8")}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=payload)
    if answer.status_code == 400:
        reason = "; ".join(error["message"] for error in answer.json()["errors"]) or "it gives no reason"
        raise PushError(f"the Hub does not accept the metadata of {CARD} ({reason}); correct it in that file")
    hf_raise_for_status(answer)


def check_privacy(repo_id: str, info: Any, *, private: bool) -> None:
    """Refuse a public repository where a private one is asked for.

    Raises:
        PushError: It is public.
    """
    if private and not info.private:
        raise PushError(
            f"{repo_id} exists and is public, but --private was given; make it private on its page first, or choose "
            "another name"
        )


def ensure_repository(job: UploadJob, api: HfApi) -> None:
    """Find the repository, or create it, with the client from `log_in`.

    Raises:
        PushError: The Hub refused it, or the card that it is for; or it is public although a private one is asked for.
        UnreachableError: The Hub did not answer.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    with push_errors(job.repo_id, job.kind):
        if CARD in job.files:  # the commit has it checked too, but large files are sent before that
            _check_card(job.files[CARD], job.kind, api)
        try:
            info = api.repo_info(job.repo_id, repo_type=job.kind)
            check_privacy(job.repo_id, info, private=job.private)
            return
        except RepositoryNotFoundError:
            if job.create_pr:
                text = f"there is no {job.kind} {job.repo_id} to open a pull request for; omit --create-pr"
                raise PushError(text) from None
        sdk, private = "gradio" if job.kind == "space" else None, job.private or None
        api.create_repo(job.repo_id, repo_type=job.kind, private=private, space_sdk=sdk, exist_ok=True)


def _own_pull_requests(job: UploadJob, api: HfApi) -> Iterator[Any]:
    """Our own open pull requests, if another one is to be opened."""
    if job.create_pr:
        opened = api.get_repo_discussions(
            job.repo_id, repo_type=job.kind, discussion_type="pull_request", discussion_status="open"
        )
        yield from (one for one in opened if one.title == job.message)


def list_files(
    job: UploadJob, api: HfApi, revision: str | None = None, *, expand: bool = False
) -> tuple[str, dict[str, Any]]:
    """The latest commit of a branch, and its files; with `expand`, each with the last commit that changed it."""
    head = str(api.repo_info(job.repo_id, repo_type=job.kind, revision=revision).sha)
    entries = api.list_repo_tree(job.repo_id, recursive=True, expand=expand, repo_type=job.kind, revision=head)
    return head, {entry.path: entry for entry in entries if hasattr(entry, "blob_id")}


def is_unchanged(path: Path, entry: Any) -> bool:
    """Whether a file is the same as one in a repository; `None` for one that is not there."""
    from huggingface_hub.utils.sha import git_hash

    if entry is None or entry.size != path.stat().st_size:
        return False
    if entry.lfs is not None:
        return entry.lfs.sha256 == sha256_of(path)
    return git_hash(path.read_bytes()) == entry.blob_id


@contextmanager
def push_errors(repo_id: str, kind: str = "model") -> Iterator[None]:
    """Turn exceptions of the client into one line that says what, where, and the way out.

    Raises:
        PushError: The Hub refused.
        UnreachableError: The Hub could not be reached.
    """
    from huggingface_hub import constants, errors

    repo = repo_id if kind == "model" else f"the {kind.capitalize()} {repo_id}"
    try:
        yield
    except CheckpointError:
        raise
    except Exception as raised:
        # In these, the client wraps what fails while it uploads, and while it downloads.
        wrapped = isinstance(raised, (RuntimeError, errors.LocalEntryNotFoundError))
        error: Any = raised.__cause__ if wrapped and raised.__cause__ else raised
        response: Any = getattr(error, "response", None)
        reason = (error.doc[:200] if isinstance(error, JSONDecodeError) else "") or cause_of(error)
        status = 0 if response is None else response.status_code
        if isinstance(error, transport_error()):
            raise UnreachableError(f"can't reach the Hub for {repo} ({reason}); {_RETRY_HINT}") from raised
        stored = status and not str(response.url).startswith(constants.ENDPOINT)  # outside the Hub
        if status in _TEMPORARY_STATUSES or (stored and status == 403):  # there, the right to upload runs out
            pause, where = response.headers.get("Retry-After", ""), response.url.host if stored else "the Hub"
            later = f"wait {pause} s, and then " if pause.isdecimal() else ""
            raise UnreachableError(f"{where} answers {status} for {repo}; {later}{_RETRY_HINT}") from raised
        if isinstance(error, errors.RevisionNotFoundError):
            raise PushError(f"{repo} has no such branch or pull request; check --revision") from raised
        foreign = isinstance(error, (JSONDecodeError, LookupError, TypeError, AttributeError))
        text = _STATUS_MESSAGES.get(status, _FOREIGN if foreign else "nothing was pushed to {repo}: {reason}")
        proposal = ", or open a pull request with --create-pr" if kind == "model" else ""
        raise PushError(text.format(repo=repo, reason=reason, proposal=proposal)) from raised
