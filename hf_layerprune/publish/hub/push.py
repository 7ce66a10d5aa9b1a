"""`push`: a model folder onto the Hub, so that its main never shows a card without weights or weights without a card.

    push("pruned", "someone/SmolLM2-135M-Instruct-23L")

The card and the records are made ready in a staging folder of links beside the model; everything is checked there; one
commit takes it to the Hub; and only then are the new card and records put into the model's own folder.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CheckpointError
from ...files.copy import write_text
from ...records.declared import CARD, front_matter
from ..card import metadata, regions
from ..card.writing import ASSETS, EVAL_MARK, EVAL_RESULTS, compose, declare, is_generic, read_card, write_card
from .checks import REFUSAL, Check, Subject, run_checks
from .contents import Contents, find_model, is_ours, list_contents
from .upload import PushError, Upload, Uploaded, log_in, push_errors, upload

if TYPE_CHECKING:
    from huggingface_hub import HfApi

logger = logging.getLogger(__name__)

MESSAGE = "Upload a pruned model with hf-layerprune"


@dataclass(frozen=True)
class PushRequest:
    """What to push, and where to.

    Args:
        folder (`Path`): The model's folder.
        repo_id (`str`): The repository, `namespace/name`.
        private (`bool`, defaults to `False`): Make a new repository private, and refuse a public one.
        adapter_only (`bool`, defaults to `False`): Only the adapter: of the folder, or of `adapter` in it.
        revision (`str`, *optional*): A branch, which is made where it is missing; or `refs/pr/N`.
        create_pr (`bool`, defaults to `False`): Propose the change instead of making it.
        overwrite_card (`bool`, defaults to `False`): Write over what somebody changed in the card on the Hub.
        space (`str`, *optional*): A Space for the model, which the card links.
        token (`str` or `bool`, *optional*): As the client library takes it; by default the user's own.
    """

    folder: Path
    repo_id: str
    private: bool = False
    adapter_only: bool = False
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
        checks (`list[Check]`): What was checked.
    """

    contents: Contents
    checks: list[Check]

    @property
    def refusals(self) -> list[Check]:
        """Why nothing will be pushed."""
        return [check for check in self.checks if check.level == REFUSAL]


def plan(request: PushRequest) -> Plan:
    """Make everything ready and check it, without asking the Hub or changing the folder.

    Args:
        request (`PushRequest`): What to push.

    Returns:
        `Plan`: The files with their sizes, and the checks.

    Raises:
        CheckpointError: There is no model, or its card can't be written.
    """
    with _staged(request) as (folder, staging):
        return _plan(request, folder, staging)


def push(request: PushRequest) -> tuple[Plan, Uploaded]:
    """Push a model.

    Args:
        request (`PushRequest`): What to push.

    Returns:
        `tuple[Plan, Uploaded]`: What was checked, and what was done.

    Raises:
        PushError: A check or the Hub refused; or it could not be reached. Nothing that a reader of the repository
            could see was changed.
        CheckpointError: There is no model, or its card can't be written.
    """
    with _staged(request) as (folder, staging):
        made = _plan(request, folder, staging)
        if made.refusals:
            raise PushError("; ".join(check.text for check in made.refusals))
        api, user = log_in(request.token)
        _take_over_card(request, staging, api)
        contents = list_contents(staging, adapter_only=request.adapter_only)
        job = Upload(
            repo_id=request.repo_id,
            files={name: contents.path(name) for name in contents.files},
            private=request.private,
            revision=request.revision,
            create_pr=request.create_pr,
            message=MESSAGE,
            removable=lambda name: is_ours(name) and not _somebodys_result(name, request, api),
        )
        done = upload(job, api, user)
        _bring_home(staging, folder)
        return made, done


def _plan(request: PushRequest, folder: Path, staging: Path) -> Plan:
    contents = list_contents(staging, adapter_only=request.adapter_only)
    contents = replace(contents, left_out=list_contents(folder, adapter_only=request.adapter_only).left_out)
    checks = run_checks(Subject(contents, request.repo_id, request.private))
    # The user's folder is what they know by name.
    told = [Check(one.name, one.level, one.text.replace(str(staging), str(folder))) for one in checks]
    return Plan(contents, told)


@contextmanager
def _staged(request: PushRequest) -> Iterator[tuple[Path, Path]]:
    """A folder of links to a model's files, with the card and the records as they will be published."""
    folder = find_model(Path(request.folder).expanduser(), adapter_only=request.adapter_only)
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        staging = Path(place, folder.resolve().name)
        _link(folder, staging)
        try:
            published = {"repo_id": request.repo_id} | ({"space": request.space} if request.space else {})
            declare(staging, published=published)
            write_card(staging, weights=False)  # whether the records belong to the weights is checked after
        except CheckpointError as error:
            raise type(error)(str(error).replace(str(staging), str(folder))) from error
        yield folder, staging


def _link(folder: Path, staging: Path) -> None:
    """Links to all files that may be published; what is written in their place leaves the originals alone."""
    staging.mkdir()
    for path in sorted(folder.iterdir()):
        target = staging / path.name
        if path.is_dir():
            if not path.is_symlink() and path.name in (ASSETS, EVAL_RESULTS, "additional_chat_templates"):
                _link(path, target)
            continue
        try:
            target.symlink_to(path.resolve())
        except OSError:  # where symbolic links are not allowed
            try:
                os.link(path, target)
            except OSError:
                shutil.copyfile(path, target)


def _bring_home(staging: Path, folder: Path) -> None:
    """Put what was written in the staging folder into the model's own."""
    for path in sorted(staging.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        home = folder / path.relative_to(staging)
        if not home.is_file() or home.read_bytes() != path.read_bytes():
            home.parent.mkdir(exist_ok=True)
            new = home.with_name(f".{home.name}.new")
            shutil.copyfile(path, new)
            os.replace(new, home)
    for part in (ASSETS, EVAL_RESULTS):
        for home in (folder / part).glob("*") if (folder / part).is_dir() else ():
            if is_ours(f"{part}/{home.name}") and not (staging / part / home.name).exists():
                home.unlink()


def _take_over_card(request: PushRequest, staging: Path, api: HfApi) -> None:
    """Keep what people have written into the card on the Hub."""
    remote = _remote_text(CARD, request, api)
    if remote is None or is_generic(remote) or request.overwrite_card:
        return
    where = f"README.md of {request.repo_id}"
    local = (staging / CARD).read_text(encoding="utf-8")
    (remote_fields, remote_body), (local_fields, local_body) = front_matter(remote), front_matter(local)
    theirs, mine = (regions.theirs(regions.parse(body, where)) for body in (remote_body, local_body))
    # What was written on the Hub, unless all of it is in the folder's card already.
    body = local_body if mine else remote_body
    if mine and not all(any(one in own for own in mine) for one in theirs):
        raise PushError(
            f"{where} has words that {request.folder}'s has not, and the other way round; bring them together in the "
            "folder's, or write over the Hub's with --overwrite-card"
        )
    card = read_card(staging)
    try:
        compose(card, remote, where=where)  # refuses where our own sections were changed there
        old = metadata.to_yaml(metadata.merged(local_fields, remote_fields)) + "\n" + body
        text = compose(card, old, where=where)
    except CheckpointError as error:
        raise PushError(f"{str(error).replace('--force', '--overwrite-card')}") from error
    if text != local:
        write_text(staging / CARD, text)


def _somebodys_result(name: str, request: PushRequest, api: HfApi) -> bool:
    """Whether a result on the Hub's leaderboards is not of our making."""
    return name.startswith(f"{EVAL_RESULTS}/") and not (_remote_text(name, request, api) or "").startswith(EVAL_MARK)


def _remote_text(name: str, request: PushRequest, api: HfApi) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

    with push_errors(request.repo_id, None), tempfile.TemporaryDirectory() as place:
        try:
            path = hf_hub_download(request.repo_id, name, revision=request.revision, token=api.token, local_dir=place)
        except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
            return None
        return Path(path).read_text(encoding="utf-8", errors="replace")
