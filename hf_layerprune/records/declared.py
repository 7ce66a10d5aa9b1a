"""Read the licence, languages and chat support that a base declares, from its card or from the keys of a GGUF file.

`prune` records them in `lineage.json`, so that a card can be made later without the base.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CARD = "README.md"
# The text fields to copy from a card; `language`, which may be a list, is read separately.
LICENCE_FIELDS = ("license", "license_name", "license_link")
_MAX_CARD = 2 << 20
_MAX_TEXT = 300
_MAX_LANGUAGES = 100
_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its YAML front matter and its body.

    Args:
        text (`str`): A README.md.

    Returns:
        `tuple[dict[str, Any], str]`: The fields, empty without a valid YAML block; and the body.
    """
    import yaml

    match = _FRONT_MATTER.match(text)
    if match is None:
        return {}, text
    try:
        fields = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        logger.warning("the card's YAML can't be read (%s); it is ignored", " ".join(str(error).split())[:200])
        fields = {}
    return fields if isinstance(fields, dict) else {}, text[match.end() :].lstrip("\r\n")


def declared_by(folder: Path, card: Path | None = None, repository: str | None = None) -> dict[str, Any]:
    """Read what a base declares about itself.

    Args:
        folder (`Path`): A model folder.
        card (`Path`, *optional*): Its card, if not in the folder.
        repository (`str`, *optional*): The base on the Hub, as `org/name/blob/COMMIT`. A relative licence link in the
            card is resolved against it.

    Returns:
        `dict[str, Any]`: Those of `license`, `license_name`, `license_link` and `language` that it declares, and
            `chat` if it has a chat template.
    """
    declared = _of_card(card or folder / CARD) | _chat(folder)
    link = declared.get("license_link")
    if repository and link and "://" not in link:
        declared["license_link"] = f"https://huggingface.co/{repository}/{link.removeprefix('./')}"
    return declared


def declared_in_gguf(keys: Mapping[str, str]) -> dict[str, Any]:
    """Read what a GGUF file declares about itself.

    Args:
        keys (`Mapping[str, str]`): Its text metadata, by key.

    Returns:
        `dict[str, Any]`: As from `declared_by`, without languages.
    """
    names = {"license": "general.license", "license_name": "general.license.name"}
    names["license_link"] = "general.license.link"
    declared: dict[str, Any] = {field: keys[key].strip()[:_MAX_TEXT] for field, key in names.items() if keys.get(key)}
    return declared | ({"chat": True} if "tokenizer.chat_template" in keys else {})


def _chat(folder: Path) -> dict[str, Any]:
    """Whether a folder has a chat template, in a separate file or in the tokenizer config."""
    settings = folder / "tokenizer_config.json"
    try:
        inside = (
            settings.is_file() and settings.stat().st_size <= _MAX_CARD and '"chat_template"' in settings.read_text()
        )
    except (OSError, ValueError):
        inside = False
    return {"chat": True} if inside or (folder / "chat_template.jinja").is_file() else {}


def _of_card(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_CARD:
            return {}
        fields, _ = front_matter(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        logger.warning("%s can't be read (%s), so the base's licence is not recorded", path, error)
        return {}
    declared: dict[str, Any] = {}
    for name in LICENCE_FIELDS:
        value = fields.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str) and value.strip():
            declared[name] = value.strip()[:_MAX_TEXT]
    languages = fields.get("language")
    languages = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    # YAML reads a bare `no`, which is Norwegian, as false.
    languages = ["no" if one is False else one for one in languages]
    languages = [one for one in languages if isinstance(one, str) and re.fullmatch(r"[\w-]{2,20}", one)]
    if languages:
        declared["language"] = languages[:_MAX_LANGUAGES]
    return declared
