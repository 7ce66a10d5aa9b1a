"""`lineage.json`: the base of a model and the stages that produced it, one entry per stage."""

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
from ..files.json_file import check_schema, load_schema, read_object
from .fingerprints import ADAPTER_CONFIG, behaviour_hashes, fingerprint, weights_hash
from .locked import locked
from .names import why_no_folder

FILE_NAME = "lineage.json"
SCHEMA_VERSION = 1
_MAX_DEPTH = 16
_PACKAGES = ("hf-layerprune", "torch", "transformers", "peft", "trl", "safetensors", "gguf", "lm-eval", "datasets")


@dataclass
class Lineage:
    """The history of a model folder.

    Args:
        base (`dict[str, Any]`): `id` as the user gave it; `commit` on the Hub or `None`; `files`, the size and sha256 of
            each weight and config file; for a folder, `companions`, the names of all its files but the weights that may
            affect the behaviour; and the fields that its card declares (see `declared.py`).
        entries (`list[dict[str, Any]]`): One entry per stage, oldest first.
        published (`dict[str, str]`): The names of this model: `repo_id` on the Hub, and `space` if it has one; or else
            a `name`. A new stage makes a different model, so it clears this field.
    """

    base: dict[str, Any]
    entries: list[dict[str, Any]] = field(default_factory=list)
    published: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Lineage | None:
        """Read the history of a folder, or return `None` if it has none.

        Raises:
            CheckpointError: The file does not follow its schema.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        data = read_object(path, max_depth=_MAX_DEPTH)
        check_schema(data, _schema(), str(path))
        return cls(data["base"], data["entries"], data.get("published", {}))

    @classmethod
    def load_required(cls, folder: Path, name: str | None = None) -> Lineage:
        """Read the history of a folder, which is called `name` in errors.

        Raises:
            CheckpointError: It has none, or the file does not follow its schema.
        """
        lineage = cls.load(folder)
        if lineage is None:
            if name is None and not folder.is_dir():
                raise CheckpointError(
                    f"{folder} {why_no_folder(folder)}; specify a model folder written by hf-layerprune prune"
                )
            if (folder / ADAPTER_CONFIG).is_file():
                raise CheckpointError(
                    f"{name or folder} is an adapter without a {FILE_NAME}, as LoRA's or a trainer's is; merge it into "
                    "a whole model with hf_layerprune.record_trained, or specify the one that the recipe writes beside it"
                )
            raise CheckpointError(
                f"{name or folder} has no {FILE_NAME}, so its origin is unknown; make the model with hf-layerprune prune, or "
                "if another program trained or quantised such a model, use hf_layerprune.record_trained or record_quantized"
            )
        return lineage

    @classmethod
    def update(cls, folder: Path, change: Callable[[Lineage], None]) -> Lineage:
        """Change the history of a folder under a lock, so that concurrent changes are not lost.

        `change` modifies the current history in place. If it modifies nothing, the file is not written.

        Raises:
            CheckpointError: The folder has no history, or the history does not follow its schema or can't be written.
        """
        with locked(folder / FILE_NAME):
            lineage = cls.load_required(folder)
            before = deepcopy(lineage)
            change(lineage)
            if lineage != before:
                lineage.write(folder)
        return lineage

    def known_weights(self) -> set[str]:
        """The recorded hashes of the base's weights and of the weights that each stage read, wrote or repaired."""
        parts = [part for entry in self.entries for part in (entry, entry.get("repair")) if isinstance(part, dict)]
        known = {part[key] for part in parts for key in ("weights", "input_weights") if key in part}
        return known | ({weights_hash(self.base["files"])} if self.base.get("files") else set())

    def record(self, folder: Path, entry: dict[str, Any]) -> None:
        """Append an entry (see [`stage_entry`]), and write the history into the stage's output.

        This is the last thing that a stage does. Added to the entry are `input_weights`, the hash of the weights from the
        previous stage; `weights`, the hash of the weights from this stage; and `files`, the sha256 of every other file that
        affects the model's behaviour: config, tokenizer, chat template, generation settings.
        """
        if self.entries and "weights" in self.entries[-1]:
            entry["input_weights"] = self.entries[-1]["weights"]
        entry["weights"] = weights_hash(fingerprint(folder))
        entry["files"] = behaviour_hashes(folder)
        self.entries.append(entry)
        self.published = {}
        self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the history into a folder, atomically."""
        data: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "base": self.base, "entries": self.entries}
        if self.published:
            data["published"] = self.published
        check_schema(data, _schema(), str(folder / FILE_NAME))
        write_text(folder / FILE_NAME, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def _schema() -> Any:
    return load_schema(__package__, "lineage.schema.json")


@contextmanager
def stage_entry(name: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Time a stage and describe it by its name, such as `"prune"`, and all settings that determine the result.

    Yields:
        `dict[str, Any]`: The entry, to which the caller adds results. Seconds and peak memory are added at the end.
    """
    entry: dict[str, Any] = {
        "stage": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": settings,
        "versions": package_versions(),
    }
    start = time.perf_counter()
    yield entry
    entry["seconds"] = round(time.perf_counter() - start, 3)
    entry["peak_memory_bytes"] = peak_rss()


def peak_rss() -> int:
    """Peak resident set size of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():  # on Linux, `ru_maxrss` includes the peak of the parent process
        peak_line = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if peak_line:
            return int(peak_line[1]) * 1024
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def package_versions() -> dict[str, str]:
    """The versions of Python and of the installed packages that affect results."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed
