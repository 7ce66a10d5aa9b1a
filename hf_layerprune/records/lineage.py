"""`lineage.json`: where a model comes from, and what was done to it, one entry for each stage."""

from __future__ import annotations

import json
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.copy import write_text
from ..files.json_file import Validator, check_schema, load_schema, read_object
from .fingerprints import behaviour_hashes, fingerprint, weights_hash
from .locked import locked

FILE_NAME = "lineage.json"
SCHEMA_VERSION = 1
_MAX_BYTES = 32 << 20
_MAX_DEPTH = 16
_PACKAGES = ("hf-layerprune", "torch", "transformers", "peft", "trl", "safetensors", "gguf", "lm-eval", "datasets")


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
            CheckpointError: The file does not follow its schema.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        data = read_object(path, max_bytes=_MAX_BYTES, max_depth=_MAX_DEPTH)
        version = data.get("schema_version")
        if isinstance(version, int) and SCHEMA_VERSION < version < 1000:
            raise CheckpointError(
                f"{path} has schema version {version}, and this version of hf-layerprune reads {SCHEMA_VERSION}; use a "
                "newer one"
            )
        check_schema(data, _schema(), str(path))
        return cls(data["base"], data["entries"], data.get("published", {}))

    @classmethod
    def update(cls, folder: Path, change: Callable[[Lineage], None]) -> Lineage:
        """Change the history of a folder under a lock, so that no other change is lost.

        Args:
            folder (`Path`): A model folder.
            change (`Callable[[Lineage], None]`): Changes what the file holds by now; nothing is written where it
                changes nothing.

        Returns:
            `Lineage`: What the file holds now.

        Raises:
            CheckpointError: The folder has no history, it does not follow its schema, or it can't be written.
        """
        with locked(folder / FILE_NAME):
            lineage = cls.of(folder)
            if lineage is None:
                raise CheckpointError(f"{folder} has no {FILE_NAME}; make the model with hf-layerprune prune")
            before = deepcopy(lineage)
            change(lineage)
            if lineage != before:
                lineage.write(folder)
        return lineage

    def known_weights(self) -> set[str]:
        """The hashes of the base's weights and of what each stage wrote or repaired, where it says so."""
        parts = [part for entry in self.entries for part in (entry, entry.get("repair")) if isinstance(part, dict)]
        known = {part[key] for part in parts for key in ("weights", "input_weights") if key in part}
        return known | ({weights_hash(self.base["files"])} if self.base.get("files") else set())

    def record(self, folder: Path, entry: dict[str, Any]) -> None:
        """Append a stage's entry and write the history, as the last thing that a stage does.

        Args:
            folder (`Path`): What the stage has written.
            entry (`dict[str, Any]`): See [`stage`]. It gets `input_weights`, the hash of the weights that the stage
                before wrote; `weights`, the hash of those that it wrote itself; and `files`, the sha256 of every other
                file that decides how the model behaves: config, tokenizer, chat template, generation settings, ...
        """
        if self.entries and "weights" in self.entries[-1]:
            entry["input_weights"] = self.entries[-1]["weights"]
        entry["weights"] = weights_hash(fingerprint(folder))
        entry["files"] = behaviour_hashes(folder)
        self.entries.append(entry)
        self.published = {}
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the history into a folder, whole or not at all."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "base": self.base, "entries": self.entries}
        if self.published:
            data["published"] = self.published
        check_schema(data, _schema(), str(folder / FILE_NAME))
        write_text(folder / FILE_NAME, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _schema() -> Validator:
    return load_schema(__package__, "lineage.schema.json")


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
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
