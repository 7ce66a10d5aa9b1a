"""The options of `card`, `push`, `verify` and `chat`. This module does not import torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path

from ..errors import CutError
from ..options import MODEL, MODEL_HELP, PATH, Kind, Options, documented, many, option, whole
from ..records.names import check_repository
from ..records.requirements import RequireOptions

_FOLDER_HELP = "A model folder written by prune"
# A name that is checked where it is used, so that an empty one has the same message as any other wrong one.
_NAME = Kind(str, lambda value: value, "NAME")


def _named(metavar: str) -> Kind:
    return Kind(MODEL.parse, MODEL.check, metavar)


@documented
@dataclass
class CardRequest(Options):
    """What to write on a card that only its author knows."""

    model: Path = option(MISSING, _FOLDER_HELP, PATH)
    name: str | None = option(
        None, "The model's name until it is on the Hub; by default the base's with the layers left, such as BASE-23L"
    )
    base_model: str | None = option(None, "Hub id of the base, if MODEL was pruned from a local copy", _named("ID"))
    license: str | None = option(
        None, "The base's licence, such as apache-2.0, if the base declares none", _named("ID")
    )
    license_name: str | None = option(None, "The name of the licence, with --license other", _named("NAME"))
    license_link: str | None = option(None, "The URL of its text, with --license other", _named("URL"))
    force: bool = option(False, "Overwrite changes inside the marked sections, and plots drawn by other programs")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.license_name or self.license_link) and not self.license:
            raise CutError("--license-name and --license-link need --license (other, unless it is a well-known one)")


@documented
@dataclass
class PushRequest(RequireOptions):
    """What to push, and where."""

    model: Path = option(MISSING, _FOLDER_HELP, PATH)
    repo_id: str = option(MISSING, "NAMESPACE/NAME on the Hub", _NAME)
    private: bool = option(False, "Create the repository as private; refuse one that is public")
    adapter_only: bool = option(False, "Push only the adapter, from MODEL or MODEL/adapter")
    include: tuple[str, ...] = option((), "Also publish this file of MODEL; repeatable", many(_NAME))
    revision: str | None = option(None, "Push to this branch, created if missing, or to refs/pr/N")
    create_pr: bool = option(False, "Open a pull request instead of committing")
    overwrite_card: bool = option(False, "Overwrite changes that were made to the card on the Hub")
    allow_miss: bool = option(False, "Push a model that misses its requirements; its card says so")
    space: str | None = option(None, "Also publish a chat with the model as this Space", _named("REPO_ID"))
    space_secret: str | None = option(
        None, "Give the Space the token in this environment variable, to read a private model", _named("VARIABLE")
    )
    dry_run: bool = option(False, "List files, sizes and checks, but push nothing")
    token: str | bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space and (self.revision or self.create_pr):
            raise CutError("--space shows the model's main branch; omit --revision and --create-pr, or --space")
        if self.space:
            check_repository(self.space)


@documented
@dataclass
class VerifyRequest(Options):
    """What to verify, and against what."""

    model: str = option(MISSING, "A model folder, or a Hub id", MODEL)
    base: str | None = option(
        None, f"The base, if it is not where lineage.json says: {MODEL_HELP[0].lower()}{MODEL_HELP[1:]}", MODEL
    )
    revision: str | None = option(None, "Branch, tag or commit of MODEL on the Hub")
    accept_trained: bool = option(False, "Trust the records for the tensors that a repair or training changed")
    token: str | bool | None = field(default=None, repr=False)


@documented
@dataclass
class ChatRequest(Options):
    """What to chat with, and where to serve it."""

    model: str = option(MISSING, f"{MODEL_HELP}; an adapter too", MODEL)
    base: str | None = option(
        None,
        "Dense model to compare with; by default an adapter's base, or the folder that MODEL was pruned from, if it is here",
        MODEL,
    )
    port: int | None = option(None, "Port to serve on; by default the first free one from 7860", whole(1, 65_535))
    host: str | None = option(None, "Address to listen on, 0.0.0.0 for all; by default 127.0.0.1")
