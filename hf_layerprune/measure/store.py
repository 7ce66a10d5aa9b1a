"""Stores numbers in `metrics.json` in the model's folder, or in a file that the user names."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, LayerPruneError
from ..files.copy import check_file_target
from ..options import join_words
from ..records.fingerprints import compute_identity
from ..records.lineage import package_versions
from ..records.metrics import FILE_NAME, Metrics
from ..records.requirements import Bound
from .subject import Subject

logger = logging.getLogger(__name__)


class Store:
    """The numbers of a model and their file. Nothing is written before numbers are added.

    Args:
        model (`Subject`): Whose numbers they are.
        base (`Subject`, *optional*): What it is compared with.
        output (`Path`, *optional*): The file to write instead of `metrics.json` in the model's folder.
        history (`Sequence[Path]`): Folders of earlier stages, whose numbers are copied.
        force (`bool`, defaults to `False`): Replace numbers of other weights, or of the same weights with another
            config, tokenizer, chat template or base.

    Attributes:
        metrics (`Metrics`): The numbers read from the file, if it exists, and those added since.
        new (`Metrics`): What is not in the file yet.
        bounds (`tuple[Bound, ...]`, *optional*): What the model must reach, in place of what was recorded before.

    Raises:
        CheckpointError: The existing numbers do not belong to this model and base as they are now, the model's history
            does not contain the base, or an earlier stage does not belong to this model.
        LayerPruneError: The folder can't be written.
    """

    def __init__(
        self,
        model: Subject,
        base: Subject | None = None,
        *,
        output: Path | None = None,
        history: Sequence[Path] = (),
        force: bool = False,
    ) -> None:
        path = output or (model.folder / FILE_NAME if model.folder else None)
        self.path = path and path.expanduser()
        if self.path is not None and not os.access(self.path.parent, os.W_OK):
            raise LayerPruneError(
                f"{self.path.parent} is not writable; write the numbers elsewhere with --output FILE"
            )
        before = _read_existing(self.path, model, base, force)
        if base is not None and output is None and model.folder is not None:
            _check_base(model, base)
        self.metrics, self._replace = before or Metrics(model.weights), before is None
        self.new = Metrics(model.weights)
        self.bounds: tuple[Bound, ...] | None = None
        self.versions = package_versions()
        for folder in history:
            _copy_numbers(self.new, model, folder.expanduser())
        self._merge_into(self.metrics)
        if self.path is None:
            logger.info(
                "%s is not a folder, so its numbers are only shown; keep them with --output FILE", model.source
            )

    def add(self, *, results: Sequence[dict[str, Any]] = (), comparisons: Sequence[dict[str, Any]] = ()) -> None:
        """Add numbers and differences from the base, with the date, and write them.

        Fields that are unknown or not finite are omitted, and so is a number whose value is not finite. Numbers that
        another process added to the file in the meantime are kept.

        Raises:
            CheckpointError: The numbers don't follow the schema, can't be written, or the file now holds numbers of
                another model.
        """
        date = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
        known = [_finite_fields(record) | date | {"versions": self.versions} for record in results]
        for record, kept in zip(results, known, strict=True):
            if "value" not in kept:
                where = f" on {record['task']}" if "task" in record else ""
                logger.warning("%s%s is %s and is not recorded", record["metric"], where, record["value"])
        differences = [_finite_fields(record) | date for record in comparisons]
        self.new.add(
            results=[one for one in known if "value" in one],
            comparisons=[one for one in differences if "difference" in one],
        )
        if self.path is None:
            self._merge_into(self.metrics)
        else:
            self.metrics = Metrics.update(self.path, self._merge_with, overwrite=self._replace)
            self._replace = False
        self.new.results, self.new.comparisons = [], []

    def _merge_with(self, current: Metrics | None) -> Metrics:
        """The new content of the file, from its current content."""
        current = current or Metrics(self.new.weights)
        for weights, measured in self.new.models.items():
            recorded = current.models.get(weights, measured)
            if current.weights != self.new.weights or recorded.get("identity") != measured.get("identity"):
                raise CheckpointError(
                    f"{self.path} now holds numbers of another model; measure again with --output FILE or --force"
                )
        self._merge_into(current)
        return current

    def _merge_into(self, metrics: Metrics) -> None:
        metrics.models |= self.new.models
        metrics.add(results=self.new.results, comparisons=self.new.comparisons)
        metrics.bounds = metrics.bounds if self.bounds is None else self.bounds


def _finite_fields(record: dict[str, Any]) -> dict[str, Any]:
    """The fields that are known and finite."""
    return {
        name: value
        for name, value in record.items()
        if value is not None and not (isinstance(value, float) and not math.isfinite(value))
    }


def check_output(path: Path, *models: str | None) -> None:
    """Refuse an output that would overwrite something other than numbers, or a file of the models."""
    check_file_target(path, force=True)
    for model in models:
        if model is not None and path.name != FILE_NAME:
            check_file_target(path, force=True, source=Path(model).expanduser())
    if path.exists() and path.suffix != ".json":
        raise LayerPruneError(f"{path} exists and is not a .json file; choose another file for the numbers")


def _read_existing(path: Path | None, model: Subject, base: Subject | None, force: bool) -> Metrics | None:
    """The existing numbers; `None` if they are to be replaced."""
    if path is None:
        return Metrics(model.weights)
    way_out = "replace them with --force, or write elsewhere with --output FILE"
    try:
        metrics = Metrics.load_file(path) or Metrics(model.weights)
        if metrics.weights != model.weights:
            raise CheckpointError(
                f"{path} holds numbers of other weights ({metrics.weights[:12]}; those of {model.name} are "
                f"{model.weights[:12]}); {way_out}"
            )
        for subject in (model, base):
            if subject is not None and (changed := metrics.changed_since(subject.identity)):
                raise CheckpointError(
                    f"{path} holds numbers of {subject.name} with another {join_words(changed)}; {way_out}"
                )
    except CheckpointError:
        if not force:
            raise
        logger.warning("replacing %s", path)
        return None
    return metrics


def _check_base(model: Subject, base: Subject) -> None:
    if base.weights in model.known_weights:
        return
    why = (
        f"the history of {model.name} does not contain the weights of {base.name} ({base.weights[:12]}); it was made from "
        f"{model.lineage.base.get('id', 'another base')}"
        if model.lineage
        else f"{model.source} has no lineage.json, so it is unknown whether it was made from {base.name}"
    )
    raise CheckpointError(f"{why}; write the comparison to a separate file with --output FILE")


def _copy_numbers(metrics: Metrics, model: Subject, folder: Path) -> None:
    """Copy the numbers of an earlier stage, and of the models that it was compared with."""
    earlier = Metrics.load(folder)
    if earlier is None:
        raise CheckpointError(f"{folder} has no {FILE_NAME}; measure it with hf-layerprune eval {folder}")
    now_there = compute_identity(folder)
    if earlier.weights != now_there.weights or earlier.changed_since(now_there):
        raise CheckpointError(f"{folder / FILE_NAME} was measured on an earlier state of the folder; measure it again")
    known = model.known_weights
    if earlier.weights not in known:
        raise CheckpointError(
            f"{folder} ({earlier.weights[:12]}) is not an earlier stage of {model.name}: it is not in its history; omit "
            "--history for it"
        )
    for weights in earlier.models.keys() & known:
        metrics.models.setdefault(weights, earlier.models[weights])
    metrics.add(
        results=[one for one in earlier.results if one["weights"] in known and one["weights"] != model.weights],
        comparisons=[one for one in earlier.comparisons if {one["weights"], one["base"]} <= known],
    )
