"""The Space that is pushed with a model. Whatever the Hub can refuse of it is refused before the model is committed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import CutError
from ...records.declared import CARD
from ...records.licences import is_licence_file
from ..requests import PushRequest
from ..space import build_space
from .contents import Contents
from .upload import (
    PushError,
    UploadJob,
    UploadResult,
    check_privacy,
    ensure_repository,
    is_unchanged,
    list_files,
    prepare_upload,
    push_errors,
)

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MESSAGE = "Upload a chat with hf-layerprune"


def plan_space(request: PushRequest, contents: Contents, place: Path, api: HfApi) -> UploadJob:
    """Write the Space of a model into the folder `place`, and check that it may be published, without changing the Hub.

    Raises:
        PushError: The Space or the model can't be written to; or the Space is something other than a chat of ours, has
            files that its owner changed, or is public although a private one is asked for.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    repo_id = str(request.space)
    build_space(place, model_repo_id=request.repo_id, model=contents.folder, token=request.token)
    files = {path.relative_to(place).as_posix(): path for path in sorted(place.rglob("*")) if path.is_file()}
    job = UploadJob(repo_id, files, "space", private=request.private, message=MESSAGE)
    with push_errors(repo_id, job.kind), suppress(RepositoryNotFoundError):
        check_privacy(f"the Space {repo_id}", api.space_info(repo_id), private=request.private)
        _, remote = list_files(job, api, expand=True)
        names = remote.keys() - {CARD, ".gitattributes", ".gitignore"}
        if names >= {"about.py", "source.py"}:
            theirs = [one for one in remote.values() if one.last_commit is None or one.last_commit.title != MESSAGE]
            changed = [one.path for one in theirs if one.path in files and not is_unchanged(files[one.path], one)]
            if changed and not request.overwrite_space:
                raise PushError(
                    f"the Space {repo_id} has changes that hf-layerprune did not make, in {', '.join(changed)}; omit --space "
                    "to leave the Space as it is, or overwrite them with --overwrite-space"
                )
        elif not all(map(is_licence_file, names)):
            raise PushError(
                f"the Space {repo_id} exists, and is not a chat of hf-layerprune, which would replace it; choose another name"
            )
        api.auth_check(repo_id, repo_type=job.kind, write=True)
    with push_errors(request.repo_id), suppress(RepositoryNotFoundError):
        api.auth_check(request.repo_id, write=True)
    return job


def prepare_space(
    request: PushRequest, job: UploadJob, api: HfApi, secret: str | None
) -> tuple[Callable[[], UploadResult], bool]:
    """Make a Space ready for its commit, which the returned function makes; also return whether its model, which exists,
    is private or gated.

    A new Space of a private model is private, too; a public one would let everybody chat with the model. The
    secret, which is a token that may read the model, is stored as the Space's own secret `HF_TOKEN`.

    Raises:
        PushError: The Hub refused.
    """
    with push_errors(request.repo_id):
        info = api.model_info(request.repo_id)
    with push_errors(job.repo_id, job.kind):
        new = not api.repo_exists(job.repo_id, repo_type="space")
    job = replace(job, private=job.private or bool(info.private and new))  # an existing one may be public on purpose
    ensure_repository(job, api)
    commit = prepare_upload(job, api)
    if secret is not None:
        with push_errors(job.repo_id, job.kind):
            api.add_space_secret(
                job.repo_id, "HF_TOKEN", secret, description="Reads the model; stored by hf-layerprune"
            )
    return commit, bool(info.private or info.gated)


def secret_from_env(variable: str | None) -> str | None:
    """Read a token from an environment variable, so that it is not in the shell history; `None` without a name.

    Raises:
        CutError: The variable is not set.
    """
    if variable is None:
        return None
    if not (token := os.environ.get(variable)):  # the name is not repeated: it may be the token itself
        raise CutError(
            "--space-secret names an environment variable that is not set; specify the one that holds the token"
        )
    return token
