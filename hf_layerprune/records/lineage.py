"""`lineage.json`: where a model comes from, and what was done to it, one entry a stage."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.copy import FileState, write_text

FILE_NAME = "lineage.json"
SCHEMA_VERSION = 1
_PACKAGES = ("hf-layerprune", "torch", "transformers", "peft", "trl", "safetensors", "gguf", "lm-eval", "datasets")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_WEIGHTS = (".safetensors", ".gguf")
_IDENTIFYING = (*_WEIGHTS, ".json")


@dataclass
class Lineage:
    """The history of a model folder.

    Args:
        base (`dict[str, Any]`): `id` as the user named it, `commit` on the Hub or `None`, `files`: the size and the
            sha256 of each of its weight and config files, and what its own card declares (see `declared.py`).
        entries (`list[dict[str, Any]]`): One for each stage, oldest first.
        published (`dict[str, str]`): What this very model is called: `repo_id` on the Hub, and `space` if it has one;
            or else a `name`. What is made of it is another model, so a stage's entry empties this.
    """

    base: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path) -> Lineage | None:
        """Read the history of a folder, or `None` where it has none.

        Raises:
            CheckpointError: The file is not a lineage of a version that is known.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            data = json.loads(path.read_text())
            if data["schema_version"] != SCHEMA_VERSION:
                raise CheckpointError(
                    f"{path} has schema version {data['schema_version']}, and this version of hf-layerprune reads "
                    f"{SCHEMA_VERSION}; use a newer one"
                )
            return cls(dict(data["base"]), list(data["entries"]), dict(data.get("published", {})))
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path} is damaged ({error}); delete it to go on without the history") from error

    def known_weights(self) -> set[str]:
        """The hashes of the base's weights and of what each stage wrote or repaired, where it says so."""
        parts = [part for entry in self.entries for part in (entry, entry.get("repair")) if isinstance(part, dict)]
        known = {part[key] for part in parts for key in ("weights", "input_weights") if key in part}
        return known | ({weights_hash(self.base["files"])} if self.base.get("files") else set())

    def record(self, folder: Path, entry: dict[str, Any]) -> None:
        """Append a stage's entry, with the hash of the weights that it wrote, and write the history."""
        entry["weights"] = weights_hash(fingerprint(folder))
        self.entries.append(entry)
        self.published = {}
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the history into a folder, whole or not at all."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "base": self.base, "entries": self.entries}
        if self.published:
            data["published"] = self.published
        write_text(folder / FILE_NAME, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def stage(name: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time a stage and describe it.

    Args:
        name (`str`): What is done, such as `"prune"`.
        settings (`dict[str, Any]`): All that decides the outcome.

    Yields:
        `dict[str, Any]`: The entry. The caller adds results to it; seconds and peak memory are filled in at the end.
    """
    entry: dict[str, Any] = {
        "stage": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "versions": versions(),
    }
    start = time.perf_counter()
    yield entry
    entry["seconds"] = round(time.perf_counter() - start, 3)
    entry["peak_memory_bytes"] = peak_rss()


def peak_rss() -> int:
    """The most memory in bytes that this process had resident so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux `ru_maxrss` starts at the parent's
        peak_line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak_line:
            return int(peak_line[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide an outcome, of those that are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def fingerprint(path: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the files that make a base what it is.

    Args:
        path (`Path`): A folder, or one file.

    Returns:
        `dict[str, dict[str, Any]]`: By file name. In the Hub's cache the hash of a large file is its blob's name, so
            nothing is read.
    """
    paths = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix in _IDENTIFYING and p.is_file())
    with ThreadPoolExecutor(2) as pool:  # hashing releases the interpreter lock
        hashes = list(pool.map(sha256_of, paths))
    return {p.name: {"size": p.stat().st_size, "sha256": h} for p, h in zip(paths, hashes, strict=True)}


def weights_hash(files: dict[str, dict[str, Any]]) -> str:
    """One hash for the weights of a model.

    Args:
        files (`dict[str, dict[str, Any]]`): Size and sha256 by file name, as `fingerprint` gives them.

    Returns:
        `str`: The sha256 over the names and hashes of all weight files. Other files don't count, and the same
            weights in other shards have another hash.
    """
    lines = [f"{name} {entry['sha256']}\n" for name, entry in sorted(files.items()) if name.endswith(_WEIGHTS)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def passing_weights_hash(folder: Path) -> str:
    """The hash of a folder's weights that are about to be changed in place.

    Args:
        folder (`Path`): A model folder.

    Returns:
        `str`: As `weights_hash` gives it. It isn't remembered by the file's time of change, which may not move
            between this reading and the change.
    """
    paths = sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS)
    return weights_hash({path.name: {"sha256": _read_hash(path)} for path in paths})


def sha256_of(path: Path) -> str:
    """The sha256 of a file. It is read once as long as it does not change."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and _SHA256.fullmatch(blob.name):
        return blob.name
    return _hashed(blob, FileState.of(blob))


@lru_cache(maxsize=1024)
def _hashed(path: Path, state: FileState) -> str:
    return _read_hash(path)


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
