"""Publishes a model folder on the Hub, so that its main branch never has a card without weights or the reverse.

    push(PushRequest(Path("pruned"), "someone/SmolLM2-135M-Instruct-23L"))

The card and the records are prepared in a staging folder, which holds copies of the small files and links to the
weights. Everything is checked there, then uploaded in one commit. Only after that are the new card and records copied
to the model's own folder.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...files.copy import write_bytes, write_text
from ...records.declared import CARD
from ..card import metadata, regions
from ..card.writing import (
    ASSETS,
    EVAL_RESULTS,
    compose,
    declare,
    is_generic,
    is_our_result,
    read_card,
    read_text,
    write_card,
)
from .checks import REFUSAL, Check, Publication, run_checks
from .contents import WEIGHTS, Contents, find_model, is_ours, list_contents
from .upload import PushError, Upload, Uploaded, log_in, push_errors, upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

MESSAGE = "Upload a pruned model with hf-layerprune"


@dataclass(frozen=True)
class PushRequest:
    """What to push, and where.

    Args:
        folder (`Path`): The model's folder.
        repo_id (`str`): The repository, `namespace/name`.
        private (`bool`, defaults to `False`): Make a new repository private, and refuse a public one.
        adapter_only (`bool`, defaults to `False`): Push only the adapter in the folder or its subfolder `adapter`.
        include (`tuple[str, ...]`, defaults to `()`): Additional files to publish.
        revision (`str`, *optional*): A branch, created if it does not exist; or `refs/pr/N`.
        create_pr (`bool`, defaults to `False`): Open a pull request instead of committing.
        overwrite_card (`bool`, defaults to `False`): Overwrite changes that somebody made to the card on the Hub.
        space (`str`, *optional*): A Space for the model, which the card links to.
        token (`str` or `bool`, *optional*): As for `huggingface_hub`; by default the user's own.
    """

    folder: Path
    repo_id: str
    private: bool = False
    adapter_only: bool = False
    include: tuple[str, ...] = ()
    revision: str | None = None
    create_pr: bool = False
    overwrite_card: bool = False
    space: str | None = None
    token: str | bool | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Plan:
    """What a push would do.

    Args:
        contents (`Contents`): The files, in the staging folder.
        checks (`list[Check]`): The outcomes of the checks.
    """

    contents: Contents
    checks: list[Check]

    @property
    def refusals(self) -> list[Check]:
        """The checks that prevent a push."""
        return [check for check in self.checks if check.level == REFUSAL]


def plan(request: PushRequest) -> Plan:
    """Prepare and check a push, without contacting the Hub or changing the folder.

    Args:
        request (`PushRequest`): What to push.

    Returns:
        `Plan`: The files with their sizes, and the checks.

    Raises:
        CheckpointError: There is no model, or its card can't be written.
    """
    with _staged(request) as (contents, home):
        return _plan(request, contents, home)


def push(request: PushRequest) -> tuple[Plan, Uploaded]:
    """Push a model.

    Args:
        request (`PushRequest`): What to push.

    Returns:
        `tuple[Plan, Uploaded]`: The checks, and what was uploaded.

    Raises:
        PushError: A check failed or the Hub refused the push. Nothing that a reader of the repository can see was
            changed.
        UnreachableError: The Hub could not be reached.
        CheckpointError: There is no model, or its card can't be written.
    """
    with _staged(request) as (contents, home):
        made = _plan(request, contents, home)
        if made.refusals:
            raise PushError("; ".join(check.text for check in made.refusals))
        api, user = log_in(request.token)
        _merge_remote_card(request, contents.folder, api)
        job = Upload(
            repo_id=request.repo_id,
            files={name: contents.path(name) for name in contents.files},
            private=request.private,
            revision=request.revision,
            create_pr=request.create_pr,
            message=MESSAGE,
            removable=lambda name: is_ours(name) and not _is_foreign_result(name, request, api),
        )
        done = upload(job, api, user)
        _copy_back(contents, home)
        return made, done


def _plan(request: PushRequest, contents: Contents, home: Path) -> Plan:
    checks = run_checks(Publication(contents, request.repo_id, request.private))
    # Messages name the user's folder, not the staging folder.
    return Plan(contents, [replace(one, text=one.text.replace(str(contents.folder), str(home))) for one in checks])


@contextmanager
def _staged(request: PushRequest) -> Iterator[tuple[Contents, Path]]:
    """Prepare the files in a staging folder, with the new card and records; also yield the model's own folder."""
    home = find_model(Path(request.folder).expanduser(), adapter_only=request.adapter_only)
    listed = list_contents(home, adapter_only=request.adapter_only, include=request.include)
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        staging = Path(place, home.resolve().name)
        staging.mkdir()
        for name in listed.files:
            _stage(listed.path(name), staging / name)
        try:
            published = {"repo_id": request.repo_id} | ({"space": request.space} if request.space else {})
            declare(staging, published=published)
            write_card(staging, weights=False)  # the checks compare the records with the weights
        except CheckpointError as error:
            raise type(error)(str(error).replace(str(staging), str(home))) from error
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in files}
        yield replace(listed, folder=staging, files=sizes), home


def _stage(path: Path, target: Path) -> None:
    """Copy a file; link to weights, which are only read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(WEIGHTS):
        with suppress(OSError):  # symbolic links may not be allowed
            target.symlink_to(path.resolve())
            return
    shutil.copyfile(path, target, follow_symlinks=False)


def _copy_back(contents: Contents, home: Path) -> None:
    """Copy new files from the staging folder to the model's own folder."""
    for name in contents.files:
        path, target = contents.path(name), home / name
        if path.is_symlink() or (target.is_file() and target.read_bytes() == path.read_bytes()):
            continue
        target.parent.mkdir(exist_ok=True)
        write_bytes(target, path.read_bytes(), inside=home)
    for part in (ASSETS, EVAL_RESULTS):
        for path in (home / part).glob("*") if (home / part).is_dir() else ():
            name = f"{part}/{path.name}"
            if is_ours(name) and name not in contents.files and name not in contents.left_out:
                path.unlink()


def _merge_remote_card(request: PushRequest, staging: Path, api: HfApi) -> None:
    """Keep the text that people have added to the card on the Hub."""
    if request.overwrite_card:
        return
    where = f"README.md of {request.repo_id}"
    with _remote_file(CARD, request, api) as path:
        try:
            remote = read_text(path) if path else None
        except CheckpointError as error:
            raise PushError(
                f"{where} is not UTF-8 text; correct it on the Hub, or replace it with --overwrite-card"
            ) from error
    if remote is None or is_generic(remote):
        return
    local = read_text(staging / CARD) or ""
    card = read_card(staging)
    try:
        remote_fields, remote_body = metadata.front_matter(remote, where)
        local_fields, local_body = metadata.front_matter(local, str(request.folder / CARD))
        theirs, mine = (regions.theirs(regions.parse(body, where)) for body in (remote_body, local_body))
        # The text added on the Hub, unless the folder's card already has all of it.
        body = local_body if mine else remote_body
        if mine and not all(any(one in own for own in mine) for one in theirs):
            raise PushError(
                f"{where} and the one in {request.folder} each have text that the other lacks; combine them in the folder, "
                "or overwrite the one on the Hub with --overwrite-card"
            )
        compose(card, remote, where=where)  # raises if our own sections were changed on the Hub
        old = metadata.to_yaml(metadata.merged(local_fields, remote_fields)) + "\n" + body
        text = compose(card, old, where=where)
    except PushError:
        raise
    except CheckpointError as error:
        raise PushError(f"{str(error).replace('--force', '--overwrite-card')}") from error
    if text != local:
        write_text(staging / CARD, text)


def _is_foreign_result(name: str, request: PushRequest, api: HfApi) -> bool:
    """Whether somebody else wrote a result file for the Hub's leaderboards."""
    if not name.startswith(f"{EVAL_RESULTS}/"):
        return False
    with _remote_file(name, request, api) as path:
        return path is None or not is_our_result(path)


@contextmanager
def _remote_file(name: str, request: PushRequest, api: HfApi) -> Iterator[Path | None]:
    """The current version of a file in the repository; `None` if it does not exist."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with tempfile.TemporaryDirectory() as place:
        path = None
        with (
            push_errors(request.repo_id, None),
            suppress(EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError),
        ):
            path = Path(
                hf_hub_download(request.repo_id, name, revision=request.revision, token=api.token, local_dir=place)
            )
        yield path
