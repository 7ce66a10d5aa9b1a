"""The index of a checkpoint whose weights are in several files."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError

INDEX = "model.safetensors.index.json"
MAX_INDEX = 200_000_000  # bytes
_MAX_SHARDS = 10_000


def shard_names(index: dict[str, Any], where: str) -> list[str]:
    """The files that an index lists, sorted, after checking that each is a plain file name.

    Raises:
        CheckpointError: The index is malformed, or names a file outside its folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map; download or save the checkpoint again")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: weight_map[{tensor[:100]!r}] is {str(name)[:100]!r}, not a file name")
        names.add(name)
    for name in names:
        is_plain = name.endswith(".safetensors") and not name.startswith(".") and len(name) <= 200
        if not is_plain or any(character in name for character in "/\\\0"):
            raise CheckpointError(
                f"{where} names {name[:100]!r}, which is not a plain .safetensors file beside it; do not trust this folder"
            )
    if len(names) > _MAX_SHARDS:
        raise CheckpointError(f"{where} names {len(names)} files; at most {_MAX_SHARDS} are supported")
    if not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{where}: metadata is not a JSON object; download or save the checkpoint again")
    return sorted(names)
