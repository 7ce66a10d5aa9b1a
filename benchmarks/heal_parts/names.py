"""Short names for what a result depends on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def short(*what: Any) -> str:
    """A short hash of plain data, for the name of a folder."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]


def data_hash(folder: Path) -> str:
    """A short hash of the texts and the questions of a folder."""
    from hf_layerprune.records.fingerprints import hash_files

    paths = {path.name: path for path in folder.iterdir() if path.suffix in (".txt", ".json", ".jsonl")}
    return short(sorted(hash_files(paths).items()))
