"""What a base says about itself: licence, languages, whether it chats; from its card or from a GGUF file's own keys.

`prune` records it in `lineage.json` while the base is at hand, so that a card can be made later without the base.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, LayerPruneError

if TYPE_CHECKING:
    from ..cut.remote import HubBase

logger = logging.getLogger(__name__)

CARD = "README.md"
# The fields of a card that are taken over, all of them text; `language` may be a list.
LICENCE_FIELDS = ("license", "license_name", "license_link")
_MAX_CARD = 2 << 20
_MAX_TEXT = 300
_MAX_LANGUAGES = 100
_FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into its YAML block and what follows it.

    Args:
        text (`str`): A README.md.

    Returns:
        `tuple[dict[str, Any], str]`: The YAML's fields, none where there is no sound block; and the rest.
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


def declared_by(base: Path | HubBase) -> dict[str, Any]:
    """What a base declares about itself.

    Args:
        base (`Path` or `HubBase`): A model folder, a GGUF file, or a repository.

    Returns:
        `dict[str, Any]`: Of `license`, `license_name`, `license_link` and `language`, those that it declares; and
            `chat`, where it has a chat template.
    """
    if not isinstance(base, Path):
        try:
            path = base.fetch_small(CARD)
        except CheckpointError as error:
            logger.warning("%s; its licence is not recorded", error)
            path = None
        found = (_of_card(path) if path else {}) | _chat(base.folder)
        link = found.get("license_link")
        if link and "://" not in link:  # relative to the base's repository
            found["license_link"] = f"https://huggingface.co/{base.repo}/blob/{base.commit}/{link.removeprefix('./')}"
        return found
    if base.is_dir():
        return _of_card(base / CARD) | _chat(base)
    return _of_gguf(base)


def _chat(folder: Path) -> dict[str, Any]:
    """Whether a folder has a chat template: in a file of its own, or in the tokenizer's settings."""
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
    found: dict[str, Any] = {}
    for name in LICENCE_FIELDS:
        value = fields.get(name)
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str) and value.strip():
            found[name] = value.strip()[:_MAX_TEXT]
    languages = fields.get("language")
    languages = [languages] if isinstance(languages, str) else languages if isinstance(languages, list) else []
    # YAML reads a bare `no`, which is Norwegian, as false.
    languages = ["no" if one is False else one for one in languages]
    languages = [one for one in languages if isinstance(one, str) and re.fullmatch(r"[\w-]{2,20}", one)]
    if languages:
        found["language"] = languages[:_MAX_LANGUAGES]
    return found


def _of_gguf(path: Path) -> dict[str, Any]:
    from ..cut.gguf.header import read_header

    try:
        with path.open("rb") as file:
            keys = read_header(file, path, path.stat().st_size).keys
    except (OSError, LayerPruneError):
        return {}
    names = {"license": "general.license", "license_name": "general.license.name"}
    names["license_link"] = "general.license.link"
    found = {field: keys[key].text for field, key in names.items() if key in keys and keys[key].text}
    found = {field: text.strip()[:_MAX_TEXT] for field, text in found.items()}
    return found | ({"chat": True} if "tokenizer.chat_template" in keys else {})
