"""Validate `config.json` before use: every field that this package or its libraries count, allocate or loop over."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..families.fields import COUNT_FIELDS
from ..files.json_file import check_schema, read_object
from ..layer_ranges import MAX_LAYERS

if TYPE_CHECKING:
    from jsonschema.protocols import Validator

_MAX_TOKENS = 2**31
# Fields that may name a repository with code.
_KERNELS = ("attn_implementation", "experts_implementation")


@cache
def _validator() -> Validator:
    from jsonschema import Draft202012Validator

    # `maximum` and the like apply to numbers only, so a field that an architecture gives as a list or null passes.
    count = {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_LAYERS}
    names = {"type": ["array", "null"], "items": {"type": "string"}}
    fields: dict[str, Any] = {
        **dict.fromkeys(COUNT_FIELDS, count),
        "model_type": {"type": "string", "maxLength": 200},
        "architectures": names | {"maxItems": 100},
        "layer_types": {"maxItems": MAX_LAYERS},
        "vocab_size": {"minimum": 1, "maximum": 100_000_000},
        "hidden_size": {"minimum": 1, "maximum": 10_000_000},
        "num_labels": {"maximum": 1_000_000},
        "auto_map": {"type": ["object", "null"]},
        # transformers reads whatever it names: an index of pickles, or a file elsewhere.
        "transformers_weights": {
            "type": ["string", "null"],
            "pattern": r"^[^/\\]{1,200}\.safetensors\Z",
            "errorMessage": "it may only name a .safetensors file in the same folder; correct it, or remove it",
        },
        "layer_drop": {
            "type": ["object", "null"],
            "properties": {
                "drop_layers": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": MAX_LAYERS},
                "num_base_layers": {"type": "integer", "minimum": 1, "maximum": MAX_LAYERS},
            },
            "required": ["drop_layers", "num_base_layers"],
        },
    }
    patterns = {
        "layers?$|^depth$": {"maximum": MAX_LAYERS},
        "^(num|n)_": {"maximum": 10_000_000},
        "(size|dim|length|embeddings|positions)$": {"maximum": _MAX_TOKENS},
        "_config$|^(en|de)coder$": {"$ref": "#"},  # nested configs
    }
    return Draft202012Validator({"properties": fields, "patternProperties": patterns})


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a `config.json` and reject values that no decoder has, before transformers builds anything from it.

    Raises:
        CheckpointError: It can't be read, a field that this package uses has the wrong type, a number is out of
            bounds (such as more than 1,000 layers), or there is no `model_type`.
    """
    fields = read_object(path, non_finite=True)
    check_schema(fields, _validator(), str(path))
    if not fields.get("model_type"):
        raise CheckpointError(
            f"{path} has no model_type, so it is not the config of a transformers model; specify a model that transformers loads"
        )
    return fields


def check_no_code(fields: dict[str, Any], name: str) -> None:
    """Refuse a model whose config names code to run.

    Raises:
        CheckpointError: transformers does not know the model type, and the config names code for it; or the config names
            a repository whose kernels would be run.
    """
    from transformers import CONFIG_MAPPING

    if fields.get("auto_map") and fields["model_type"] not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{name} needs code of its own (auto_map in its config.json), which is not run; specify a model of an "
            "architecture that transformers has"
        )
    for field, value in _fields_of_sections(fields):
        if field.endswith(_KERNELS) and "/" in str(value):
            raise CheckpointError(
                f"{name} would run code of {str(value)[:200]} ({field} in its config.json); remove that field"
            )


def _fields_of_sections(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a config and of its sections, at any depth."""
    for field, value in fields.items():
        yield field, value
        if isinstance(value, dict):
            yield from _fields_of_sections(value)
