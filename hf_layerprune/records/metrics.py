"""`metrics.json`: the measured numbers of a model folder, each with the hash of the weights that it was measured on.

The schema is `metrics.schema.json` next to this file, and is checked on every write. A file holds numbers for the
folder's own weights, its base, and the stages in between (cut, repaired, healed), which `lineage.json` lists with the
same hashes. Numbers for other weights are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, boundary
from ..files.copy import write_text
from ..files.json_file import check_schema, load_schema, read_object
from ..options import join_words
from .figures.results import CONDITIONS
from .fingerprints import Identity, compute_identity, identity_from_hashes
from .lineage import Lineage
from .locked import locked
from .requirements import Bound, Outcome, check_bounds, parse_bounds

FILE_NAME = "metrics.json"
SCHEMA_VERSION = 1
_MAX_DEPTH = 16
# The fields that identify a number; a new number replaces an old one with the same key.
_KEY = ("weights", "base", "kind", "task", "metric", "settings")


@dataclass
class Metrics:
    """The numbers of a model folder.

    Args:
        weights (`str`): The hash of the folder's weights, see [`~records.fingerprints.weights_hash`].
        models (`dict[str, dict]`): The measured models, by the hash of their weights: `role` (`"dense"`, `"cut"`,
            `"repaired"`, `"healed"`, `"trained"`, `"quantized"` or `"model"`), `name`, `layers`, `parameters`, and `identity`, the
            hashes of other files that affect the behaviour.
        results (`list[dict]`): The measured numbers; see the schema for the fields.
        comparisons (`list[dict]`): Differences from the base.
        bounds (`tuple[Bound, ...]`): What the model must reach, see [`~records.requirements`].
    """

    weights: str
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    bounds: tuple[Bound, ...] = ()

    @property
    def outcomes(self) -> list[Outcome]:
        """Whether its numbers meet its bounds."""
        return check_bounds(self.bounds, self)

    @classmethod
    def load(cls, folder: Path) -> Metrics | None:
        """Read the numbers of a folder, or return `None` if it has none.

        Raises:
            CheckpointError: The file does not follow the schema.
        """
        return cls.load_file(folder / FILE_NAME)

    @classmethod
    def load_file(cls, path: Path) -> Metrics | None:
        """Read a file of numbers, or return `None` if it does not exist.

        Raises:
            CheckpointError: The file does not follow the schema.
        """
        if not path.is_file():
            return None
        try:
            data = read_object(path, max_depth=_MAX_DEPTH)
            _validate(data, path)
            required = [one["require"] for one in data.get("requirements", [])]
            with boundary(f"{path} has invalid requirements"):
                bounds = parse_bounds(",".join(required) or "none")
        except CheckpointError as error:
            raise CheckpointError(f"{error}; restore the file, or delete it and measure again") from error
        return cls(data["weights"], data["models"], data["results"], data["comparisons"], bounds)

    @classmethod
    def update(cls, path: Path, change: Callable[[Metrics | None], Metrics], *, overwrite: bool = False) -> Metrics:
        """Change a file of numbers under a lock, so that concurrent changes are not lost; return the new numbers.

        With `overwrite`, the old content is not read.

        Raises:
            CheckpointError: The old or new content does not follow the schema, or the file can't be written.
        """
        with locked(path):
            metrics = change(None if overwrite else cls.load_file(path))
            metrics._write(path)
        return metrics

    def add_model(self, model: Identity, *, role: str, name: str, layers: int, parameters: int) -> None:
        """Add a measured model, with the hashes of the config, tokenizer and other files that it was measured with."""
        recorded = {"role": role, "name": name, "layers": layers, "parameters": parameters, "identity": model.parts}
        self.models[model.weights] = recorded

    def changed_since(self, model: Identity) -> list[str]:
        """The parts of a model, such as `config`, that have changed since its numbers were measured, if they were."""
        recorded = self.models.get(model.weights)
        return model.changed_since(recorded.get("identity")) if recorded is not None else []

    def add(self, *, results: Sequence[dict[str, Any]] = (), comparisons: Sequence[dict[str, Any]] = ()) -> None:
        """Add numbers, replacing earlier ones for the same weights and settings. A difference from the base goes with a
        number that it was taken from, if that is replaced by another number or was measured otherwise.
        """
        before = {_key(record): _measurement(record) for record in self.results}
        changed = {
            key for key, fact in ((_key(one), _measurement(one)) for one in results) if before.get(key, fact) != fact
        }
        self.comparisons = [old for old in self.comparisons if not changed.intersection(_compared_keys(old))]
        for name, new in (("results", results), ("comparisons", comparisons)):
            keys = {_key(record) for record in new}
            setattr(self, name, [old for old in getattr(self, name) if _key(old) not in keys] + list(new))

    def mismatch(self, model: Identity, lineage: Lineage | None) -> str | None:
        """How these numbers contradict a model and its history.

        Returns:
            `str`, *optional*: The contradiction, to follow the name of the file: the weights, config, tokenizer, chat
                template, generation settings or base have changed since they were measured, or a number belongs to
                weights that are neither the model's nor in its history. `None` if there is none.
        """
        if self.weights != model.weights:
            return f"was measured on other weights ({self.weights[:12]}, and the model's are {model.weights[:12]})"
        if changed := self.changed_since(model):
            return f"is outdated: {join_words(changed)} of the model changed since it was measured"
        known = {model.weights} | (lineage.known_weights() if lineage else set())
        if foreign := sorted(set(self.models) - known):
            names = ", ".join(f"{self.models[weights]['name']} ({weights[:12]})" for weights in foreign)
            return f"holds numbers of {names}, which are not in the history of this model"
        return None

    def recorded_identity(self, lineage: Lineage) -> Identity:
        """The identity of a model whose files are elsewhere, as the `weights` and `files` of its last stage record it.

        The base of an adapter is the one that its numbers name.
        """
        last = lineage.entries[-1]
        base = self.models.get(last["weights"], {}).get("identity", {}).get("base")
        return replace(identity_from_hashes(last["files"], base), weights=last["weights"])

    def check_belongs(self, folder: Path, lineage: Lineage | None) -> None:
        """Refuse numbers that contradict the model in a folder or its history; see [`mismatch`].

        Raises:
            CheckpointError: They do.
        """
        if text := self.mismatch(compute_identity(folder), lineage):
            raise CheckpointError(
                f"{folder / FILE_NAME} {text}; measure again with hf-layerprune eval {folder} --force"
            )

    def write(self, folder: Path) -> None:
        """Write the numbers into a folder, atomically.

        Raises:
            CheckpointError: The numbers don't follow the schema.
        """
        self._write(folder / FILE_NAME)

    @property
    def record(self) -> dict[str, Any]:
        """The content of the file."""
        data: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "weights": self.weights,
            "models": self.models,
            "results": self.results,
            "comparisons": self.comparisons,
        }
        if self.bounds:
            data["requirements"] = [outcome.record for outcome in self.outcomes]
        return data

    def _write(self, path: Path) -> None:
        data = self.record
        _validate(data, path)
        write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _key(record: dict[str, Any]) -> str:
    return json.dumps([record.get(name) for name in _KEY], sort_keys=True)


def _measurement(record: dict[str, Any]) -> list[Any]:
    """What a number is, and how it was measured."""
    return [record["value"], *(record.get(name) for name in CONDITIONS)]


def _compared_keys(record: dict[str, Any]) -> list[str]:
    """The keys of the two numbers that a comparison is about."""
    return [_key(record | {"weights": record[name], "base": None}) for name in ("weights", "base")]


def _validate(data: dict[str, Any], path: Path) -> None:
    check_schema(data, load_schema(__package__, "metrics.schema.json"), str(path))
    known = set(data["models"])
    for record in [*data["results"], *data["comparisons"]]:
        for name in ("weights", "base"):
            if name in record and record[name] not in known:
                raise CheckpointError(f"{path} has a number of {record[name][:12]}, which `models` does not list")
