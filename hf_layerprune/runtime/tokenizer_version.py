"""Whether the version of transformers in a config changes how the tokenizer beside it is read."""

from __future__ import annotations

from typing import Any

from packaging.version import InvalidVersion, Version

TOKENIZER = "tokenizer_config.json"


def reads_another_tokenizer(raw: dict[str, Any], expected: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether the version in a config changes the tokenizer: with `fix_mistral_regex`, that of transformers before 5 is
    fixed, and of a version that can't be read, none is loaded.
    """

    def before_5(version: Any) -> bool | None:
        try:
            return not version or Version(version) < Version("5.0.0")
        except (InvalidVersion, TypeError):
            return None

    here, there = (before_5(fields.get("transformers_version")) for fields in (raw, expected))
    return here is not there and (here is None or bool(settings.get("fix_mistral_regex")))


def needs_config(raw: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether a tokenizer with these settings changes without its model's config, whose fields are `raw`, beside it:
    transformers then takes it for one of version 5.
    """
    return reads_another_tokenizer({"transformers_version": "5.0.0"}, raw, settings)
