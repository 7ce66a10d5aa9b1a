"""Where a model comes from: its base, what the base declares, and its licence."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.documents import split_source
from ..cut.gguf import gguf_text_metadata
from ..errors import CheckpointError
from ..files.hub import Repo
from ..options import join_words
from ..records.declared import CARD, declared_fields, declared_gguf_fields
from ..records.fingerprints import CONFIG, companion_names, fingerprint, holds_weights, weights_hash
from ..records.licences import copy_licence, licence_files
from ..records.lineage import FILE_NAME, Lineage
from ..records.names import last_part
from ..records.quantized import describe_quantization
from ..runtime.config_file import read_config_file
from ..runtime.loading import is_hub_id, load_tokenizer
from ..runtime.model_class import pipeline_tag_of
from .requests import PruneRequest, RankRequest

if TYPE_CHECKING:
    from ..cut.base import Base

logger = logging.getLogger(__name__)


def write_lineage(request: PruneRequest, entry: dict[str, Any], folder: Path, hub: Base | None) -> None:
    """Record a cut in the folder that was written: its base, what the base declares about itself, and what was done.

    `hub` is the base, if it is on the Hub.

    Raises:
        CheckpointError: The base can't be read, or the history can't be written.
    """
    source = hub.folder if hub else Path(request.base).expanduser()
    repo = hub.repo if hub else None
    lineage = (Lineage.load(source) if source.is_dir() else None) or Lineage({})
    if not lineage.base:
        lineage.base = {
            "id": _recorded_name(request.base),
            "commit": repo.commit if repo else None,
            "files": repo.fingerprint() if repo else fingerprint(source),
        } | _base_declarations(source, repo)
        # A copy may lack files that the base on the Hub has; an adapter has none of them.
        if not (request.adapter or repo) and source.is_dir():
            lineage.base["companions"] = companion_names(source)
        if source.is_dir():
            lineage.base |= _config_facts(read_config_file(source / CONFIG))
    if source.is_dir():
        copy_licence(source, folder)
    elif found := [path.name for path in licence_files(source.parent)]:
        logger.warning(
            "not copied: %s beside %s, which may belong to other files there; copy into %s what belongs to the model, as every "
            "copy must include it",
            join_words(found),
            source.name,
            request.output,
        )
    lineage.record(folder, entry)


def _recorded_name(base: str) -> str:
    """A base as the lineage names it; `.` and `..` would say nothing in another folder."""
    return str(Path(base).resolve()) if last_part(base) in ("", "..") else base


def as_folder(name: str | Path) -> Path:
    """A folder by its name.

    Raises:
        CheckpointError: It is something else, such as a model in memory.
    """
    if not isinstance(name, str | os.PathLike):
        raise CheckpointError(f"a {type(name).__name__} is not a folder; save the model, and specify where")
    return Path(name).expanduser()


def load_lineage_of_weights(folder: Path, name: str | None = None) -> Lineage:
    """The lineage of a model folder, if its last entry names the folder's weights; `name` is for messages.

    Raises:
        CheckpointError: There is none, or the weights are others.
    """
    lineage = Lineage.load_required(folder, name)
    if not lineage.entries or lineage.entries[-1].get("weights") != weights_hash(fingerprint(folder)):
        raise CheckpointError(
            f"the weights of {name or folder} are not those that its {FILE_NAME} names; specify the folder that they belong to"
        )
    return lineage


def is_same_base(recorded: dict[str, Any], request: PruneRequest) -> bool:
    """Whether the base that a lineage records is the one that a request names, with the same files as now.

    A base on the Hub is the same at another commit too, if its config and its weights are.
    """
    if recorded.get("id") != _recorded_name(request.base):
        return False
    before = recorded.get("files", {})
    if not is_hub_id(request.base):
        return before == fingerprint(Path(request.base).expanduser())
    repo = Repo.open(request.base, request.revision)
    if recorded.get("commit") == repo.commit:
        return True
    repo.get(CONFIG)  # small files have a hash once they are in the cache
    files = repo.fingerprint()
    decisive = [name for name in {*before, *files} if name == CONFIG or holds_weights(name)]
    return all(before.get(name) == files.get(name) for name in decisive)


def has_same_rows(recorded: dict[str, Any], request: PruneRequest | RankRequest) -> bool:
    """Whether the calibration file that a request names still holds the rows that were recorded.

    Only files of text are read again: a data set on the Hub is known by its name, and text by the model by its seed.
    """
    file = Path(split_source(request.calibration)[0]).expanduser()
    if "fingerprint" not in recorded or recorded.get("images") or not file.is_file():
        return True
    from ..calibration.rows import load_calibration  # imports torch

    rows = load_calibration(
        request.calibration,
        load_tokenizer(request.base, revision=request.revision),
        samples=request.calibration_samples,
        length=request.calibration_length,
        seed=request.seed,
    )
    return rows.fingerprint == recorded["fingerprint"]


def _base_declarations(source: Path, repo: Repo | None) -> dict[str, Any]:
    """What the base says about itself: its licence, its languages, whether it chats."""
    if repo is not None:
        try:
            card = repo.get(CARD) if CARD in repo.files else None
        except CheckpointError as error:
            logger.warning("%s; its licence is not recorded", error)
            card = None
        return declared_fields(source, card, f"{repo.name}/blob/{repo.commit}")
    if source.is_dir():
        return declared_fields(source)
    return declared_gguf_fields(gguf_text_metadata(source))


def _config_facts(fields: dict[str, Any]) -> dict[str, str]:
    """What a card says of the base from its config: its task, if it is multimodal, and how its weights are quantised."""
    task = pipeline_tag_of(fields["model_type"], fields.get("architectures"))
    settings = fields.get("quantization_config")
    found = {"pipeline_tag": task, "quantized": describe_quantization(settings) if settings else None}
    return {name: text for name, text in found.items() if text is not None}
