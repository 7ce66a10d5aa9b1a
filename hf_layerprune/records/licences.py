"""A table of what the licence of a base requires from the publisher of a pruned copy.

A pruned model is a modified copy, so the licence of its base applies. The rows summarise what the licence texts require
for such a copy; they are not legal advice, and every card links to the text. For a licence that is not in the table, the
card and `push` say that its conditions are not known here. A missing licence is always reported. The rows are in
`licences.toml`.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..files.copy import copy_model_file
from ..files.folders import LICENCE

_FILES = re.compile(rf"{LICENCE}([ ._-].*)?", re.IGNORECASE)
_TEXTS = re.compile(r"(MODEL[ _-]?)?LICEN|COPYING", re.IGNORECASE)
# The text of a licence, as opposed to a licence key, or to weights, which some engines load whatever their name.
_ENDS = re.compile(r"|\.(md|txt|rst|pdf|html|\d+)", re.IGNORECASE)
NOTICE = "NOTICE"


@dataclass(frozen=True)
class Licence:
    """One row of the table.

    Args:
        title (`str`): The name of the licence.
        link (`str`, *optional*): A link to the text.
        duties (`tuple[str, ...]`): The conditions for publishing a modified copy, one sentence each.
        built_with (`str`, *optional*): A text that must be displayed.
        prefix (`str`, *optional*): The required start of the model's name.
        notice (`str`, *optional*): A sentence that the NOTICE file must contain.
        needs_text (`bool`): Whether a copy of the licence must be included.
        non_commercial (`bool`): Whether commercial use is forbidden.
        forbidden (`str`, *optional*): Why a modified copy may not be published at all.
    """

    title: str
    link: str | None = None
    duties: tuple[str, ...] = ()
    built_with: str | None = None
    prefix: str | None = None
    notice: str | None = None
    needs_text: bool = False
    non_commercial: bool = False
    forbidden: str | None = None


def _read_table() -> dict[str, Licence]:
    rows = tomllib.loads(files(__package__).joinpath("licences.toml").read_text(encoding="utf-8"))
    shared = rows.pop("sentences")
    for row in rows.values():
        row["duties"] = tuple(shared.get(duty, duty) for duty in row.get("duties", ()))
    return {name: Licence(**row) for name, row in rows.items()}


# By the identifier that cards use: `license`, or `license_name` where `license` is `other`.
TABLE = _read_table()
# Other names that occur in cards.
_ALIASES = {
    "tongyi-qianwen-research": "qwen-research",
    **dict.fromkeys(("falcon", "falcon2", "falcon-2", "falcon3"), "falcon-llm"),
    "openrail++": "openrail",
    "gemma-terms-of-use": "gemma",
    "bigscience-openrail": "bigscience-openrail-m",
}


@dataclass(frozen=True)
class DeclaredLicence:
    """The licence of a base, as it declares it.

    Args:
        id (`str`, *optional*): `license` of the card, in the table's spelling; `None` if the base declares none.
        name (`str`, *optional*): `license_name`.
        link (`str`, *optional*): `license_link`, or else the link in the table.
        row (`Licence`, *optional*): The row in the table, if any.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    row: Licence | None = None

    @classmethod
    def from_base(cls, base: dict[str, Any]) -> DeclaredLicence:
        """Look up the licence that `lineage.json` records for the base."""
        declared, name, link = (base.get(key) for key in ("license", "license_name", "license_link"))
        if declared in (None, "", "unknown"):
            if not name:
                return cls()
            declared = "other"
        key = _key(name) if declared == "other" and name else _key(declared)
        row = TABLE.get(_IDS.get(_ALIASES.get(key, key), ""))
        # The Hub refuses a card with another spelling, such as `Apache 2.0`.
        known = declared if declared == "other" else _IDS.get(key, declared)
        return cls(known, name, link or (row.link if row else None), row)

    @property
    def known(self) -> bool:
        """Whether the base declares a licence at all."""
        return self.id is not None and (self.id != "other" or bool(self.name or self.link))

    @property
    def title(self) -> str:
        """The name to display."""
        return self.row.title if self.row else self.name or self.id or "unknown"


def _key(text: str) -> str:
    """A name in the spelling by which it is looked up: `Qwen LICENSE AGREEMENT` is `qwen`, and `llama-3` is `llama3`, as is
    `Meta Llama 3 Community License`.
    """
    key = re.sub(r"-licen[cs]e(-agreement)?$", "", re.sub(r"[\s_]+", "-", text.strip().lower()))
    return re.sub(r"^(?:meta-)?llama-?(\d[\d.]*)(?:-community)?$", r"llama\1", key)


_IDS = {_key(name): name for name in TABLE}


def is_licence_file(name: str) -> bool:
    """Whether a file of a model folder is a licence, notice or use policy, which every copy must include."""
    end = Path(name).suffix
    named = len(end) > 3 and any(known.startswith(end[1:].lower()) for known in TABLE)  # as in LICENSE.MIT
    return _FILES.fullmatch(name) is not None and (named or _ENDS.fullmatch(end) is not None)


def is_licence_text(name: str) -> bool:
    """Whether such a file is the licence itself, rather than a notice or a use policy."""
    return is_licence_file(name) and _TEXTS.match(name) is not None


def licence_files(folder: Path) -> list[Path]:
    """The files of a folder that every copy of its model must include."""
    return sorted(path for path in folder.iterdir() if is_licence_file(path.name) and path.is_file())


def copy_licence(source: Path, folder: Path) -> None:
    """Copy the licence and its notices from one folder to another that lacks them; raises as `copy_model_file` does."""
    for path in licence_files(source):
        if not (folder / path.name).exists():
            copy_model_file(path, source, folder / path.name)
