"""Publishes a model folder on the Hub, so that its main branch never has a card without weights or the reverse.

    push(PushRequest(Path("pruned"), "someone/SmolLM2-135M-Instruct-23L"))

The card and the records are prepared in a staging folder, which holds copies of the small files and links to the
weights. Everything is checked there, then uploaded in one commit. Only after that are the new card and records copied
to the model's own folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence, Set as AbstractSet
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...files.copy import FileState, write_bytes, write_text
from ...records.declared import CARD, split_front_matter
from ...records.fingerprints import hash_files, holds_weights
from ...records.history import History, read_history
from ...records.licences import is_licence_file
from ...records.lineage import Lineage
from ...records.metrics import Metrics
from ...records.requirements import check_measurable
from ..card import metadata, regions
from ..card.writing import (
    EVAL_RESULTS,
    compose_card,
    is_generic,
    is_our_result,
    read_card,
    read_text,
    record_declarations,
    write_card,
)
from ..requests import CardRequest, PushRequest
from .checks import REFUSAL, Check, run_checks
from .contents import Contents, find_model, is_managed, list_contents
from .space import plan_space, prepare_space, secret_from_env
from .upload import PushError, UploadJob, UploadResult, ensure_repository, log_in, prepare_upload, push_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

MESSAGE = "Upload a pruned model with hf-layerprune"


@dataclass(frozen=True)
class Plan:
    """What a push would do: the files, in the staging folder, the outcomes of the checks, and the model's history."""

    contents: Contents
    checks: list[Check]
    history: History

    @property
    def refusals(self) -> list[Check]:
        """The checks that prevent a push."""
        return [check for check in self.checks if check.level == REFUSAL]


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        plan (`Plan`): What was pushed, and the checks.
        model (`UploadResult`): The upload of the model.
        space (`UploadResult`, *optional*): The upload of its Space, if one was asked for.
        space_needs_secret (`bool`): Whether the Space needs a secret to read the model, and none was given.
    """

    plan: Plan
    model: UploadResult
    space: UploadResult | None = None
    space_needs_secret: bool = False


class PushRefusedError(PushError):
    """Checks failed before the push; `refusals` are their outcomes."""

    def __init__(self, refusals: Sequence[Check]) -> None:
        super().__init__("; ".join(check.text for check in refusals))
        self.refusals = refusals


def plan_push(request: PushRequest) -> Plan:
    """Prepare and check a push, without contacting the Hub or changing the folder.

    Raises:
        CheckpointError: There is no model, or its card can't be written.
        CutError: The environment variable that `space_secret` names is not set.
    """
    secret_from_env(request.space_secret)
    with _staged(request) as (plan, _, _):
        return plan


def push(request: PushRequest) -> Pushed:
    """Push a model, and its Space. Both are sent before either is committed; a push that fails before may leave new
    repositories empty, and the next one fills them.

    Raises:
        PushRefusedError: A check failed. Nothing was uploaded.
        PushError: The Hub refused the push. Nothing that a reader of the repository can see was changed, unless the
            message says that only the Space was not published.
        UnreachableError: The Hub could not be reached.
        CheckpointError: There is no model, or its card can't be written.
        CutError: The environment variable that `space_secret` names is not set.
    """
    secret = secret_from_env(request.space_secret)
    with _staged(request) as (plan, source, before):
        if plan.refusals:
            raise PushRefusedError(plan.refusals)
        contents, api = plan.contents, log_in(request.token)
        temporary = contents.folder.parents[1]
        space = plan_space(request, contents, temporary / "space", api) if request.space else None
        remote = temporary / "on-the-hub"
        _merge_remote_card(request, contents.folder, _download(CARD, request, api, remote))

        def removable(name: str) -> bool:
            """Whether a file of the repository is ours; others may have added a licence, or results for leaderboards."""
            if not name.startswith(f"{EVAL_RESULTS}/"):
                return is_managed(name) and not is_licence_file(name)
            path = _download(name, request, api, remote) if is_managed(name) else None
            return path is not None and is_our_result(path)

        job = UploadJob(
            repo_id=request.repo_id,
            files={name: contents.folder / name for name in contents.files},
            private=request.private,
            revision=request.revision,
            create_pr=request.create_pr,
            message=MESSAGE,
            removable=removable,
            sha256=contents.sha256,
        )
        ensure_repository(job, api)
        # The Space is small. What can be refused of it should not be after the hours that weights may take.
        commit_space, closed = prepare_space(request, space, api, secret) if space else (None, False)
        done = prepare_upload(job, api)()
        try:
            _copy_back(contents, source, before)
        except (CheckpointError, OSError) as error:  # the folder may be read-only
            logger.warning("the model is on the Hub, but its new card and records are not in %s: %s", source, error)
        if commit_space is None:
            return Pushed(plan, done)
        try:
            return Pushed(plan, done, commit_space(), closed and secret is None)
        except CheckpointError as error:
            raise type(error)(
                f"the model is on the Hub ({done.url}), but its Space was not published: {error}"
            ) from error


@contextmanager
def _staged(request: PushRequest) -> Iterator[tuple[Plan, Path, dict[str, FileState]]]:
    """Prepare and check the files in a staging folder, with the new card and records; also yield the model's own folder,
    and the states of its files as they were read.
    """
    source = find_model(request)
    listed = list_contents(source, request)
    before = {name: FileState.of_file(source / name) for name in listed.files}
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as temporary:
        staging = Path(temporary, "staging", source.resolve().name)
        staging.mkdir(parents=True)
        for name in listed.files:
            _copy_or_link(source / name, staging / name)
        try:
            published = {"repo_id": request.repo_id} | ({"space": request.space} if request.space else {})
            record_declarations(CardRequest(staging), published=published)
            _record_requirements(request, staging)
            write_card(staging, weights=False)  # the checks compare the records with the weights
        except CheckpointError as error:
            raise type(error)(str(error).replace(str(staging), str(source))) from error
        files = sorted(path for path in staging.rglob("*") if path.is_file())
        sizes = {path.relative_to(staging).as_posix(): path.stat().st_size for path in files}
        hashes = hash_files({name: staging / name for name in listed.weights})
        contents = replace(listed, folder=staging, files=sizes, sha256=hashes)
        # Messages name the user's folder, not the staging folder.
        checks = [
            replace(one, text=one.text.replace(str(staging), str(source))) for one in run_checks(contents, request)
        ]
        yield Plan(contents, checks, read_history(Lineage.load_required(staging))), source, before


def _record_requirements(request: PushRequest, staging: Path) -> None:
    """Record what the request requires, in addition to what was recorded before."""
    if request.require:
        metrics = Metrics.load(staging) or Metrics("")
        check_measurable(request.require, metrics)
        metrics.bounds = tuple(dict.fromkeys([*metrics.bounds, *request.require]))
        metrics.write(staging)


def _copy_or_link(path: Path, target: Path) -> None:
    """Copy a file; link to weights, which are only read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if holds_weights(path.name):
        with suppress(OSError):  # symbolic links may not be allowed
            target.symlink_to(path.resolve())
            return
    shutil.copyfile(path, target, follow_symlinks=False)
    if target.is_symlink():
        raise CheckpointError(f"{path} became a link while it was read; replace it with the file itself")


def _copy_back(contents: Contents, source: Path, before: Mapping[str, FileState]) -> None:
    """Copy new files from the staging folder to the model's own folder, but not over what was changed there since."""
    for name in contents.files:
        path, target = contents.folder / name, source / name
        if path.is_symlink() or (target.is_file() and target.read_bytes() == path.read_bytes()):
            continue
        if os.path.lexists(target) and FileState.of_file(target) != before.get(name):
            logger.warning("%s was changed while it was being pushed; it stays, and is not what was published", target)
            continue
        target.parent.mkdir(exist_ok=True)
        write_bytes(target, path.read_bytes(), inside=source)
    for name in before.keys() - contents.files.keys():  # outdated, and removed from the staging folder
        path = source / name
        if os.path.lexists(path) and FileState.of_file(path) == before[name]:
            path.unlink()


def _merge_remote_card(request: PushRequest, staging: Path, path: Path | None) -> None:
    """Keep the text that people have added to the card on the Hub."""
    if request.overwrite_card or path is None:
        return
    where, local, card = f"README.md of {request.repo_id}", read_text(staging / CARD) or "", read_card(staging)
    try:
        remote = read_text(path) or ""
        if is_generic(remote):
            return
        both = _combine_cards(local, remote, card.metadata.keys(), request.model, where)
        compose_card(card, remote, where=where)  # raises if our own sections were changed on the Hub
        text = compose_card(card, both, where=where)
    except CheckpointError as error:
        text = str(error).replace(str(path), where).replace("--force", "--overwrite-card")
        raise PushError(text) from error
    if text != local:
        write_text(staging / CARD, text)


def _combine_cards(local: str, remote: str, ours: AbstractSet[str], folder: Path, where: str) -> str:
    """The fields of the folder's card and of the one on the Hub, with the text of the one that has what people wrote.

    `ours` are the fields that this package writes.

    Raises:
        CheckpointError: Each card has what the other lacks.
    """
    remote_fields, remote_body = split_front_matter(remote, where)
    local_fields, local_body = split_front_matter(local, str(folder / CARD))
    theirs, mine = (regions.foreign_texts(regions.parse(body, where)) for body in (remote_body, local_body))
    lacking = mine and not all(any(one in own for own in mine) for one in theirs)
    added = remote_fields.keys() & (local_fields.keys() - ours)
    differing = sorted(name for name in added if not _includes(local_fields[name], remote_fields[name]))
    if lacking or differing:
        what = f"differ in {', '.join(differing)}" if differing else "each have text that the other lacks"
        raise CheckpointError(
            f"{where} and the one in {folder} {what}; combine them in the folder, or overwrite the one on the Hub with "
            "--overwrite-card"
        )
    fields = metadata.to_yaml(metadata.merge_metadata(local_fields, remote_fields))
    return f"{fields}\n{local_body if mine else remote_body}"


def _includes(mine: object, theirs: object) -> bool:
    """Whether a field of a card has all values of another card's; one value stands for a list of it."""
    values = mine if isinstance(mine, list) else [mine]
    return all(one in values for one in (theirs if isinstance(theirs, list) else [theirs]))


def _download(name: str, request: PushRequest, api: HfApi, temporary: Path) -> Path | None:
    """The current version of a file in the repository, or what a new branch starts with; `None` if it does not exist."""
    from huggingface_hub import errors

    with push_errors(request.repo_id):
        for revision in dict.fromkeys((request.revision, None)):
            try:
                return Path(api.hf_hub_download(request.repo_id, name, revision=revision, local_dir=temporary))
            except errors.RevisionNotFoundError:
                continue
            except (errors.LocalEntryNotFoundError, errors.GatedRepoError):
                raise  # there may be one, with others' text
            except (errors.EntryNotFoundError, errors.RepositoryNotFoundError):
                break
    return None
