"""What a GGUF file says about its own size, after a cut: `general.size_label`, and `general.name`, which has it in it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ...files.gguf_header import GGUFHeader, Tensor


def size_label_changes(header: GGUFHeader, architecture: str, kept: Sequence[Tensor]) -> dict[str, str]:
    """The metadata texts that name the model's size, after the cut, by key.

    No key is added to the file. A name without the old size in it gets the new one at its end.
    """
    texts = {key: header.keys[key].text for key in ("general.size_label", "general.name") if key in header.keys}
    entry = header.keys.get(f"{architecture}.expert_count")
    experts = entry.values[0] if entry is not None and entry.is_integer else 0
    new = _size_label(kept, experts)
    old = texts.get("general.size_label") or _size_label(header.tensors, experts)
    changes = {}
    if texts.get("general.size_label"):
        changes["general.size_label"] = new
    if name := texts.get("general.name"):
        shorter, found = re.subn(rf"(?<![\w.]){re.escape(old)}(?![\w.])", lambda _: new, name, flags=re.IGNORECASE)
        changes["general.name"] = shorter if found else f"{name} {new}"
    return changes


def _size_label(tensors: Sequence[Tensor], experts: int) -> str:
    from gguf.utility import size_label  # importing gguf is slow

    sizes = {tensor.name: math.prod(tensor.dimensions) for tensor in tensors}
    in_experts = sum(size for name, size in sizes.items() if "_exps." in name)
    total = sum(sizes.values())
    return size_label(total, total - in_experts, in_experts // max(experts, 1), experts)
