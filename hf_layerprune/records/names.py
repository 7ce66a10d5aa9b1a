"""Public names of a base and of files: Hub ids, or names that do not reveal local paths."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePath
from typing import Any

from ..errors import CutError

# As `huggingface_hub.utils.validate_repo_id` has it, but in ASCII only, and no namespace begins with an underscore.
_HUB_ID = re.compile(
    r"(?!.*(?:--|\.\.))([a-z0-9][\w.-]{0,95}(?<![.-])/)?[a-z0-9_][\w.-]{0,95}", re.ASCII | re.IGNORECASE
)


def is_hub_name(text: str) -> bool:
    """Whether a text is a valid Hub id, `org/name` or `name`."""
    return _HUB_ID.fullmatch(text) is not None and not text.endswith((".git", ".", "-"))


def is_gguf_name(name: str | PurePath) -> bool:
    """Whether a name is that of a GGUF file; the suffix counts in either case."""
    return str(name).lower().endswith(".gguf")


def why_no_folder(path: Path) -> str:
    """What a path is that should be a model folder with records, and is none."""
    if not path.exists():
        return "does not exist"
    return "is a GGUF file, which has no records" if is_gguf_name(path) else "is a file"


def check_repository(text: str) -> None:
    """Refuse a name that is not `NAMESPACE/NAME`.

    Raises:
        CutError: It is not.
    """
    if "/" not in text or not is_hub_name(text):
        raise CutError(f"{text!r} is not a Hub id; write it as NAMESPACE/NAME")


def base_name(base: dict[str, Any]) -> str:
    """The public name of a base: its Hub id, or the last part of its path."""
    name = str(base.get("id") or "")
    if base.get("commit") or (is_hub_name(name) and "/" in name):
        return name
    return last_part(name) or "the base"


def hub_base(base: dict[str, Any]) -> str | None:
    """The Hub id of a base, or of the model that it is a copy of."""
    name = str(base.get("id") or "")
    if base.get("commit") and is_hub_name(name):
        return name
    declared = base.get("hub_id")
    return declared if isinstance(declared, str) and is_hub_name(declared) else None


def is_local(base: dict[str, Any]) -> bool:
    """Whether a base is given by a local path with more than one part."""
    name = str(base.get("id") or "")
    return not base.get("commit") and not is_hub_name(name) and last_part(name) != name


def last_part(path: str) -> str:
    """The last part of a path of any operating system."""
    return PurePath(path.replace("\\", "/")).name


def strip_local_path(word: str) -> str:
    """Shorten an absolute path to its name or, below the working folder, to the relative path; keep any other word."""
    path, here = Path(os.path.expanduser(word)), Path.cwd()
    if not path.is_absolute():
        return word
    inside = path.is_relative_to(here) and not Path.home().is_relative_to(here)
    return str(path.relative_to(here)) if inside else path.name
