"""The options of `card`, `push`, `verify` and `chat`. This module does not import torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from pathlib import Path

from ..errors import CutError
from ..options import ANY_MODEL_HELP, MODEL, MODEL_HELP, PATH, Kind, Options, documented, integer, option, tuple_of
from ..records.names import check_repository
from ..records.requirements import RequireOptions

_FOLDER_HELP = "A model folder written by prune"
# A name that is checked where it is used, so that an empty one has the same message as any other wrong one.
_NAME = Kind(str, lambda value: value, "NAME")


def _kind(metavar: str) -> Kind:
    return Kind(MODEL.parse, MODEL.check, metavar)


@documented
@dataclass
class CardRequest(Options):
    """What only the author knows, for the card."""

    model: Path = option(MISSING, _FOLDER_HELP, PATH)
    name: str | None = option(
        None,
        "Name of the model until it is on the Hub; by default the base's name and the number of layers left, such as "
        "BASE-23L",
    )
    base_model: str | None = option(
        None, "Id of the base on the Hub, if MODEL was pruned from a local copy", _kind("ID")
    )
    license: str | None = option(
        None, "Licence of the base, such as apache-2.0, if the base declares none", _kind("ID")
    )
    license_name: str | None = option(None, "Name of the licence, with --license other", _kind("NAME"))
    license_link: str | None = option(None, "URL of the licence, with --license other", _kind("URL"))
    force: bool = option(False, "Overwrite changes inside the marked sections, and plots that another program drew")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.license_name or self.license_link) and not self.license:
            raise CutError("license_name and license_link need license=... (other, unless it is a well-known one)")
        if self.license == "other" and not self.license_name:
            raise CutError("license=other says nothing without the name of the licence; add license_name=...")


@documented
@dataclass
class PushRequest(RequireOptions):
    """What to push, and where."""

    model: Path = option(MISSING, _FOLDER_HELP, PATH)
    repo_id: str = option(MISSING, "NAMESPACE/NAME on the Hub", _NAME)
    private: bool = option(False, "Create a private repository; refuse to push to a public one")
    adapter_only: bool = option(False, "Push only the adapter, from MODEL or MODEL/adapter")
    include: tuple[str, ...] = option(
        (), "Publish this file of MODEL too, or although it was changed; can be repeated", tuple_of(_NAME)
    )
    revision: str | None = option(None, "Push to this branch, created if missing, or to refs/pr/N")
    create_pr: bool = option(False, "Open a pull request instead of committing")
    overwrite_card: bool = option(False, "Overwrite changes that were made to the card on the Hub")
    allow_miss: bool = option(False, "Push a model that misses its requirements; its card says so")
    space: str | None = option(None, "Also publish a chat with the model as this Space", _kind("REPO_ID"))
    overwrite_space: bool = option(False, "Overwrite changes that were made to the files of the Space on the Hub")
    space_secret: str | None = option(
        None,
        "Environment variable with a token that the Space uses to read a private or gated model",
        _kind("VARIABLE"),
    )
    dry_run: bool = option(False, "List files, sizes and checks without pushing anything")
    token: str | bool | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space and (self.revision or self.create_pr):
            raise CutError("space=... shows the model's main branch; omit revision=... and create_pr, or the Space")
        if self.space:
            check_repository(self.space)
        elif self.space_secret or self.overwrite_space:
            raise CutError("space_secret and overwrite_space need space=...")


@documented
@dataclass
class VerifyRequest(Options):
    """What to verify, and against what."""

    model: str = option(MISSING, "A model folder, or a Hub id", MODEL)
    base: str | None = option(
        None, f"Base, if it is not where lineage.json says: {MODEL_HELP[0].lower()}{MODEL_HELP[1:]}", MODEL
    )
    revision: str | None = option(None, "Branch, tag or commit of MODEL on the Hub", revision_of="model")
    accept_trained: bool = option(
        False,
        "Trust the records for what can't be derived again: tensors that a repair or training changed, files that the base lacked",
    )
    token: str | bool | None = field(default=None, repr=False)


@documented
@dataclass
class ChatRequest(Options):
    """What to chat with, and where to serve it."""

    model: str = option(MISSING, ANY_MODEL_HELP, MODEL)
    base: str | None = option(
        None,
        "Dense model to compare with; by default an adapter's base, or the folder that MODEL was pruned from, if it still "
        "exists",
        MODEL,
    )
    port: int | None = option(None, "Port to serve on, or the next free one; by default 7860", integer(1, 65_535))
    host: str | None = option(None, "Address to listen on, or 0.0.0.0 for all addresses; by default 127.0.0.1")
