"""Compare configs field by field, as a loader reads them and as they are in their files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...families import MARKER

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TIED = "tie_word_embeddings"
# Fields that are set on loading and saving, and the marker of the cut, which is checked separately.
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache", MARKER}
# Old names of fields, which a loader reads if the new one is absent.
_OLD_NAMES = {"torch_dtype": "dtype", "rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}
Path = tuple[str, ...]


class _Absent:
    """In place of a value. A field that says null is another than none at all: models read `is_causal` as true if absent."""

    def __bool__(self) -> bool:
        return False

    def __repr__(self) -> str:
        return "absent"


ABSENT = _Absent()


def flatten(fields: dict[str, Any], path: Path = ()) -> dict[Path, Any]:
    """The values of a config by their paths; sections are not values themselves, unless they are empty."""
    values: dict[Path, Any] = {}
    for name, value in fields.items():
        at = (*path, str(name))  # once loaded, the labels of `id2label` have numbers as names
        values |= flatten(value, at) if isinstance(value, dict) and value else {at: value}
    return values


def differences(was: dict[str, Any], has: dict[str, Any]) -> dict[Path, tuple[Any, Any]]:
    """Where two loaded configs differ: both values by path, `ABSENT` for one that is absent."""
    old, new = flatten(was), flatten(has)
    sections = {path[:-1] for path in old}  # one that only the new config has may replace a loader's

    def counts(path: Path) -> bool:
        return path[0] not in _VOLATILE and not (path[-1] in _VOLATILE and path[:-1] in sections)

    paths = filter(counts, old.keys() | new.keys())
    pairs = {path: (old.get(path, ABSENT), new.get(path, ABSENT)) for path in sorted(paths)}
    return {path: pair for path, pair in pairs.items() if not _equal(*pair)}


def unties(path: Path, was: Any, has: Any) -> bool:
    """Whether a difference unties the head from the embeddings."""
    return path[-1] == TIED and bool(was) and has is False


def unread_fields(raw: dict[str, Any], loaded: PreTrainedConfig, expected: dict[str, Any]) -> Iterator[Path]:
    """The fields of a config's file that are not in the expected file, and that the loaded config does not hold with
    the same value: a loader may act on them, but a comparison of loaded configs misses them.
    """
    held = json.loads(loaded.to_json_string(use_diff=False))  # without `_name_or_path`, which can choose the tokenizer
    known = [flatten(held), flatten(expected)]
    for path, value in flatten(_without_old_names(raw, held)).items():
        set_on_saving = path[-1] in _VOLATILE - {"_name_or_path"} or path[0] == MARKER
        if not set_on_saving and not any(path in values and _equal(values[path], value) for values in known):
            yield path


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same; a NaN equals itself, and no truth value equals a number."""
    return (one == other and isinstance(one, bool) == isinstance(other, bool)) or repr(one) == repr(other)


def _without_old_names(raw: dict[str, Any], loaded: dict[str, Any]) -> dict[str, Any]:
    """The fields of a file without those that say the same as a new name in the loaded config."""
    kept = {}
    for name, value in raw.items():
        if (new := _OLD_NAMES.get(name)) in loaded and new not in raw and agrees_with_renamed(name, value, loaded):
            continue
        inner = isinstance(value, dict) and isinstance(loaded.get(name), dict)
        kept[name] = _without_old_names(value, loaded[name]) if inner else value
    return kept


def agrees_with_renamed(old: str, value: Any, loaded: dict[str, Any]) -> bool:
    """Whether a field with an old name says what the loaded config says: some loaders read only the old one."""
    new = loaded[_OLD_NAMES[old]]
    if value is None or not isinstance(new, dict):
        return value in (None, new)
    items = value if isinstance(value, dict) else {old: value}
    parts = [new, *(part for part in new.values() if isinstance(part, dict))]  # one for each type of layers
    parts = [{"type": part.get("rope_type")} | part for part in parts]
    return any(items.items() <= part.items() for part in parts)
