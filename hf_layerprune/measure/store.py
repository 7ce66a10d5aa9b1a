"""Stores numbers in `metrics.json` in the model's folder, or in a file that the user names."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, LayerPruneError
from ..families import layer_count
from ..records.fingerprints import identity
from ..records.lineage import versions
from ..records.metrics import FILE_NAME, Metrics
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Store:
    """The numbers of a model and their file.

    Args:
        metrics (`Metrics`): The existing numbers.
        path (`Path`, *optional*): The file; `None` if they are only shown.
        roles (`dict[str, str]`): The role of each model, by the hash of its weights.
        replace (`bool`, defaults to `False`): Replace the file with the first write.
    """

    def __init__(self, metrics: Metrics, path: Path | None, roles: dict[str, str], *, replace: bool = False) -> None:
        self.metrics = metrics
        self.path = path
        self._roles = roles
        self._replace = replace
        self._new = Metrics(metrics.weights)  # not in the file yet

    @classmethod
    def open(
        cls,
        model: Subject,
        base: Subject | None = None,
        *,
        output: Path | None = None,
        history: Sequence[Path] = (),
        force: bool = False,
    ) -> Store:
        """Read earlier numbers, and refuse those that do not belong to this model.

        Args:
            model (`Subject`): The model.
            base (`Subject`, *optional*): Its base.
            output (`Path`, *optional*): The file to write instead of `metrics.json` in the model's folder.
            history (`Sequence[Path]`): Folders of earlier stages, whose numbers are copied.
            force (`bool`, defaults to `False`): Replace numbers of other weights, or of the same weights with another
                config, tokenizer, chat template or base.

        Returns:
            `Store`: Nothing is written yet.

        Raises:
            CheckpointError: The existing numbers do not belong to this model and base as they are now, the model's
                history does not contain the base, or an earlier stage does not belong to this model.
        """
        path = output or (model.folder / FILE_NAME if model.folder else None)
        if path is not None:
            path = path.expanduser()
            _check_writable(path)
        before = _before(path, model, base, force)
        roles = {model.weights: model.role}
        if base is not None:
            roles[base.weights] = "dense" if base.role == "model" else base.role
            if output is None and model.folder is not None:
                _check_base(model, base)
        store = cls(before or Metrics(model.weights), path, roles, replace=before is None)
        for folder in history:
            _copy_numbers(store._new, model, folder.expanduser())
        store._merge_into(store.metrics)
        if path is None:
            logger.info(
                "%s is not a folder, so its numbers are only shown; keep them with --output FILE", model.source
            )
        return store

    @cached_property
    def versions(self) -> dict[str, str]:
        """The versions of the packages that take part in measuring."""
        return versions()

    def add_model(self, subject: Subject, model: PreTrainedModel) -> None:
        """Record a model that was measured."""
        self._new.add_model(
            subject.identity,
            role=self._roles[subject.weights],
            name=subject.name,
            layers=layer_count(model.config),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    def add(self, *, results: Sequence[dict[str, Any]] = (), comparisons: Sequence[dict[str, Any]] = ()) -> None:
        """Add numbers and write them. Numbers that another process added to the file in the meantime are kept.

        Args:
            results (`Sequence[dict]`): Numbers, without `date` and `versions`; fields that are `None` are omitted.
            comparisons (`Sequence[dict]`): Differences from the base.

        Raises:
            CheckpointError: The numbers don't follow the schema, can't be written, or the file now holds numbers of
                another model.
        """
        common = {"date": now(), "versions": self.versions}
        self._new.add(
            results=[_known(record) | common for record in results],
            comparisons=[_known(record) for record in comparisons],
        )
        if self.path is None:
            self._merge_into(self.metrics)
        else:
            self.metrics = Metrics.update(self.path, self._merged)
            self._replace = False
        self._new.results, self._new.comparisons = [], []

    def _merged(self, current: Metrics | None) -> Metrics:
        """The new content of the file, from its current content."""
        if current is None or self._replace:
            current = Metrics(self._new.weights)
        for weights, measured in self._new.models.items():
            recorded = current.models.get(weights, measured)
            if current.weights != self._new.weights or recorded.get("identity") != measured.get("identity"):
                raise CheckpointError(
                    f"{self.path} now holds numbers of another model; measure again with --output FILE or --force"
                )
        self._merge_into(current)
        return current

    def _merge_into(self, metrics: Metrics) -> None:
        metrics.models |= self._new.models
        metrics.add(results=self._new.results, comparisons=self._new.comparisons)


def now() -> str:
    """The current time in the format of the records."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _known(record: dict[str, Any]) -> dict[str, Any]:
    known = {name: value for name, value in record.items() if value is not None}
    if isinstance(error := known.get("stderr"), float) and not math.isfinite(error):
        del known["stderr"]
    return known


def _check_writable(path: Path) -> None:
    """Check that the file can be written, before hours of measuring."""
    if path.is_dir():
        raise LayerPruneError(f"{path} is a folder; name a file for the numbers")
    if not path.parent.is_dir():
        raise LayerPruneError(f"{path.parent} does not exist, so {path.name} can't be written there; create it first")
    if not os.access(path.parent, os.W_OK):
        raise LayerPruneError(f"{path.parent} is not writable; write the numbers elsewhere with --output FILE")


def _before(path: Path | None, model: Subject, base: Subject | None, force: bool) -> Metrics | None:
    """The existing numbers; `None` if they are to be replaced."""
    if path is None:
        return Metrics(model.weights)
    way_out = "replace them with --force, or write elsewhere with --output FILE"
    try:
        metrics = Metrics.read(path) or Metrics(model.weights)
        if metrics.weights != model.weights:
            raise CheckpointError(
                f"{path} holds numbers of other weights ({metrics.weights[:12]}; those of {model.name} are "
                f"{model.weights[:12]}); {way_out}"
            )
        for subject in (model, base):
            if subject is not None and (changed := metrics.changed_since(subject.identity)):
                raise CheckpointError(
                    f"{path} holds numbers of {subject.name} with another {' and '.join(changed)}; {way_out}"
                )
        if model.folder is not None and path == model.folder / FILE_NAME:
            metrics.check_belongs(model.folder, model.lineage)
    except CheckpointError:
        if not force:
            raise
        logger.warning("replacing %s", path)
        return None
    return metrics


def _check_base(model: Subject, base: Subject) -> None:
    known = model.lineage.known_weights() if model.lineage else set()
    if base.weights in known:
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
    earlier = Metrics.of(folder)
    if earlier is None:
        raise CheckpointError(f"{folder} has no {FILE_NAME}; measure it with hf-layerprune eval {folder}")
    now_there = identity(folder)
    if earlier.weights != now_there.weights or earlier.changed_since(now_there):
        raise CheckpointError(f"{folder / FILE_NAME} was measured on an earlier state of the folder; measure it again")
    known = {model.weights} | (model.lineage.known_weights() if model.lineage else set())
    if earlier.weights not in known:
        raise CheckpointError(
            f"{folder} ({earlier.weights[:12]}) is not an earlier stage of {model.name}: it is not in its history; omit --history for it"
        )
    for weights, recorded in earlier.models.items():
        if weights in known:
            metrics.models.setdefault(weights, recorded)
    metrics.add(
        results=[one for one in earlier.results if one["weights"] in known and one["weights"] != model.weights],
        comparisons=[one for one in earlier.comparisons if {one["weights"], one["base"]} <= known],
    )
