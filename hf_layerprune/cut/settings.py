"""The JSON files of a cut checkpoint: its config, with every field of the base's, and its quantisation settings."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import families
from ..errors import CutError
from ..families.fields import COUNT_FIELDS, FIELDS, looks_per_layer
from ..families.quantization import rewrite_quantization
from ..records.fingerprints import QUANTISERS
from .base import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

# Fields about the base's files: where they were loaded from, and which of them hold its code (not copied) and weights.
_BASE_ONLY_FIELDS = ("_name_or_path", "auto_map", "transformers_weights")
# Fields that a reload may change.
_VOLATILE = (*_BASE_ONLY_FIELDS, "transformers_version")


def config_fields(source: dict[str, Any], config: PreTrainedConfig, num_layers: int) -> dict[str, Any]:
    """The fields of the config.json of a cut checkpoint.

    It contains what transformers would save, and also every other field of the base's file, such as defaults that
    transformers omits and old spellings that other programs read. Such a field gets its new value if there is one;
    otherwise it is kept unchanged if that does not alter the config on reload.

    Raises:
        CutError: A reload would give a different config.
    """
    fields = json.loads(config.to_json_string(use_diff=True))
    fields = {name: value for name, value in fields.items() if name not in _BASE_ONLY_FIELDS}
    copy_transformers_version(source, fields)
    doubtful: list[tuple[dict[str, Any], str, Any]] = []
    _add_base_fields(source, config, fields, num_layers, doubtful)
    expected = _fields_after_reload(config, fields)
    wanted = _comparable_fields(config)
    if expected != wanted:
        names = sorted(name for name in expected.keys() | wanted.keys() if expected.get(name) != wanted.get(name))
        raise CutError(
            f"{type(config).__name__} changes {', '.join(names)} on reload, so the cut can't be saved; drop other layers"
        )
    for part, name, value in doubtful:
        part[name] = value
        try:
            same = _fields_after_reload(config, fields) == expected
        except Exception:  # config classes raise exceptions of any type
            same = False
        if not same:
            del part[name]
            logger.info("config field %r is left out: it would change the cut model", name)
    return dict(sorted(fields.items()))


def copy_transformers_version(source: dict[str, Any], fields: dict[str, Any]) -> None:
    """Give a config the version in another one: by it, transformers decides how to read the tokenizer beside it."""
    fields.pop("transformers_version", None)
    fields |= {name: value for name, value in source.items() if name == "transformers_version"}


def _add_base_fields(
    source: dict[str, Any],
    config: PreTrainedConfig,
    fields: dict[str, Any],
    num_layers: int,
    doubtful: list[tuple[dict[str, Any], str, Any]],
) -> None:
    whole = json.loads(config.to_json_string(use_diff=False))
    for name, value in source.items():
        # Only for sections: some fields of a config with different layers can't be read.
        part = getattr(config, name, None) if name in config.sub_configs else None
        if (
            part is not None
            and hasattr(part, "model_type")
            and isinstance(value, dict)
            and isinstance(fields.get(name), dict)
        ):
            _add_base_fields(value, part, fields[name], num_layers, doubtful)
        elif name in fields:
            if isinstance(value, dict) and vars(config).get(name) == fields[name]:
                fields[name] = vars(config)[name]  # in the base's order; transformers has sorted it
        elif name in _BASE_ONLY_FIELDS:
            continue
        elif name in whole and name not in _VOLATILE:
            fields[name] = whole[name]
        elif name in config.attribute_map:
            fields[name] = whole.get(config.attribute_map[name])
        elif name in COUNT_FIELDS or name in FIELDS or looks_per_layer(name, value, num_layers):
            logger.info("config field %r is left out: the config class does not know it", name)
        else:
            doubtful.append((fields, name, value))


def _comparable_fields(config: PreTrainedConfig) -> dict[str, Any]:
    fields = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in fields.items() if name not in _VOLATILE}


def _fields_after_reload(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    def number(value: dict[str, Any]) -> Any:
        # JSON has no infinity; transformers writes it this way.
        return float(value["__float__"]) if value.keys() == {"__float__"} else value

    return _comparable_fields(type(config).from_dict(json.loads(json.dumps(fields), object_hook=number)))


def encode_json(fields: dict[str, Any]) -> bytes:
    """JSON in the layout that transformers writes, but in the given order: of several patterns, the first one counts."""
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def rewrite_quantiser_files(folder: Path, cut: families.Cut, several_stacks: bool) -> dict[str, bytes]:
    """Rewrite the quantisers' settings files that name layers by index; returns the new content of those that change.

    Raises:
        CutError: An entry can't be rewritten exactly.
    """
    changed: dict[str, bytes] = {}
    for name in QUANTISERS:
        if (folder / name).exists():
            old = read_json(folder / name)
            new = rewrite_quantization(old, cut, str(folder / name), several_stacks=several_stacks)
            if new != old:
                changed[name] = encode_json(new)
    return changed
