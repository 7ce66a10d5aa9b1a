"""Read the licence, languages and chat support that a base declares, from its card or from the keys of a GGUF file.

`prune` records them in `lineage.json`, so that a card can be made later without the base.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, cause_of
from ..files.json_file import read_object
from ..files.text_file import MAX_VALUES, check_values, read_bytes

logger = logging.getLogger(__name__)

CARD = "README.md"
# The text fields to copy from a card; `language`, which may be a list, is read separately.
LICENCE_FIELDS = ("license", "license_name", "license_link")
_MAX_CARD = 2 << 20
_MAX_TEXT = 300
_MAX_LANGUAGES = 100


def split_front_matter(text: str, where: str = CARD) -> tuple[dict[str, Any], str]:
    """Split a card into the fields of its YAML block, in their order, and the text after it.

    `where` names the card in errors.

    Raises:
        CheckpointError: The YAML can't be read, so rewriting it would lose what somebody wrote.
    """
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

    if REGEX_YAML_BLOCK.search(text) is None:
        if re.match(r"\s*---[ \t]*\n[\w-]+:", text):
            raise CheckpointError(f"the YAML block of {where} has no end; put a line of three dashes after it")
        return {}, text
    try:
        card = RepoCard(text)
    except Exception as error:  # dates, numbers and tags raise other exceptions than those of YAML
        raise CheckpointError(f"the YAML block of {where} can't be read ({cause_of(error)}); correct it") from error
    fields, languages = dict(vars(card.data)), card.data.get("language")
    check_values(fields, where, max_values=MAX_VALUES)
    # A bare `no`, which is Norwegian to the Hub, is false to this reader of YAML.
    if isinstance(languages, list):
        fields["language"] = ["no" if one is False else one for one in languages]
    elif languages is False:
        fields["language"] = "no"
    return fields, card.text.lstrip("\n")


def declared_fields(folder: Path, card: Path | None = None, repository: str | None = None) -> dict[str, Any]:
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
    declared = _card_fields(card or folder / CARD) | _chat_field(folder)
    link = declared.get("license_link")
    if repository and link and "://" not in link:
        declared["license_link"] = f"https://huggingface.co/{repository}/{link.removeprefix('./')}"
    return declared


def declared_gguf_fields(keys: Mapping[str, str]) -> dict[str, Any]:
    """Read what a GGUF file declares in its text metadata; as from `declared_fields`, without languages."""
    names = {field: f"general.{field.replace('_', '.')}" for field in LICENCE_FIELDS}
    declared: dict[str, Any] = {field: keys[key].strip()[:_MAX_TEXT] for field, key in names.items() if keys.get(key)}
    return declared | ({"chat": True} if "tokenizer.chat_template" in keys else {})


def _chat_field(folder: Path) -> dict[str, Any]:
    """Whether a folder has a chat template: a file, or an entry of the tokenizer config, of several the default one."""
    inside = None
    with suppress(CheckpointError):
        inside = read_object(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(inside, list):
        inside = any(isinstance(one, dict) and one.get("name") == "default" for one in inside)
    return {"chat": True} if inside or (folder / "chat_template.jinja").is_file() else {}


def _card_fields(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        fields, _ = split_front_matter(read_bytes(path, _MAX_CARD).decode("utf-8-sig", errors="replace"), str(path))
    except CheckpointError as error:
        logger.warning("%s; the base's licence is not recorded", error)
        return {}
    declared: dict[str, Any] = {}
    for name in LICENCE_FIELDS:
        values = _as_list(fields.get(name))
        if len(values) > 1 and name == "license":
            text = "%s declares several licences (%s), and none is recorded; choose: hf-layerprune card MODEL --license ID"
            logger.warning(text, path, ", ".join(map(str, values))[:_MAX_TEXT])
        if len(values) == 1 and isinstance(values[0], str) and values[0].strip():
            declared[name] = values[0].strip()[:_MAX_TEXT]
    given = _as_list(fields.get("language"))
    if languages := [one for one in given if isinstance(one, str) and re.fullmatch(r"[\w-]{2,20}", one)]:
        declared["language"] = languages[:_MAX_LANGUAGES]
    return declared


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
