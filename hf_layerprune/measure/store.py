"""Where numbers go: `metrics.json` in the model's folder, or a file that the user names."""

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
from ..records.lineage import fingerprint, versions, weights_hash
from ..records.metrics import FILE_NAME, Metrics
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Store:
    """The numbers of a model, and where they are written.

    Args:
        metrics (`Metrics`): The numbers.
        path (`Path`, *optional*): The file; `None` where they are only shown.
        roles (`dict[str, str]`): The role of each model, by the hash of its weights.
    """

    def __init__(self, metrics: Metrics, path: Path | None, roles: dict[str, str]) -> None:
        self.metrics = metrics
        self.path = path
        self._roles = roles

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
        """Read what was measured before, and refuse what does not belong to this model.

        Args:
            model (`Subject`): The model.
            base (`Subject`, *optional*): Its base.
            output (`Path`, *optional*): The file to write in place of `metrics.json` in the model's folder.
            history (`Sequence[Path]`): Folders of earlier stages, whose numbers are taken over.
            force (`bool`, defaults to `False`): Replace numbers of other weights.

        Returns:
            `Store`: Nothing is written yet.

        Raises:
            CheckpointError: The numbers that are there are of other weights, the history of the model does not know its
                base, or an earlier stage is none of this model's.
        """
        path = output or (model.folder / FILE_NAME if model.folder else None)
        if path is not None:
            path = path.expanduser()
            _check_writable(path)
        metrics = _before(path, model, force)
        roles = {model.weights: model.role}
        if base is not None:
            roles[base.weights] = "dense" if base.role == "model" else base.role
            if output is None and model.folder is not None:
                _check_base(model, base)
        for folder in history:
            _take_over(metrics, model, folder.expanduser())
        if path is None:
            logger.info("%s is no folder, so its numbers are only shown; keep them with --output FILE", model.source)
        return cls(metrics, path, roles)

    @cached_property
    def versions(self) -> dict[str, str]:
        """The versions of what measures."""
        return versions()

    def add_model(self, subject: Subject, model: PreTrainedModel) -> None:
        """Say what was measured."""
        self.metrics.add_model(
            subject.weights,
            role=self._roles[subject.weights],
            name=subject.name,
            layers=layer_count(model.config),
            parameters=sum(parameter.numel() for parameter in model.parameters()),
        )

    def add(self, *, results: Sequence[dict[str, Any]] = (), comparisons: Sequence[dict[str, Any]] = ()) -> None:
        """Add numbers, and write.

        Args:
            results (`Sequence[dict]`): Numbers, without `date` and `versions`; what is `None` is left out.
            comparisons (`Sequence[dict]`): Differences.

        Raises:
            CheckpointError: They don't follow the schema, or can't be written.
        """
        common = {"date": now(), "versions": self.versions}
        self.metrics.add(
            results=[_known(record) | common for record in results],
            comparisons=[_known(record) for record in comparisons],
        )
        if self.path is not None:
            self.metrics.write_file(self.path)


def now() -> str:
    """The time, as records have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _known(record: dict[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in record.items() if value is not None}
    if isinstance(error := found.get("stderr"), float) and not math.isfinite(error):
        del found["stderr"]
    return found


def _check_writable(path: Path) -> None:
    """Find out before hours of measuring."""
    if path.is_dir():
        raise LayerPruneError(f"{path} is a folder; name a file for the numbers")
    if not path.parent.is_dir():
        raise LayerPruneError(f"{path.parent} does not exist, so {path.name} can't be written there; make it first")
    if not os.access(path.parent, os.W_OK):
        raise LayerPruneError(f"{path.parent} can't be written to; keep the numbers elsewhere with --output FILE")


def _before(path: Path | None, model: Subject, force: bool) -> Metrics:
    if path is None:
        return Metrics(model.weights)
    try:
        metrics = Metrics.read(path)
        if metrics is None:
            return Metrics(model.weights)
        if metrics.weights != model.weights:
            raise CheckpointError(
                f"{path} holds numbers of other weights ({metrics.weights[:12]}, and those of {model.name} are "
                f"{model.weights[:12]}); replace them with --force, or write elsewhere with --output FILE"
            )
        if model.folder is not None and path == model.folder / FILE_NAME:
            metrics.check_belongs(model.folder, model.lineage)
    except CheckpointError:
        if not force:
            raise
        logger.warning("%s is replaced", path)
        return Metrics(model.weights)
    return metrics


def _check_base(model: Subject, base: Subject) -> None:
    known = model.lineage.known_weights() if model.lineage else set()
    if base.weights in known:
        return
    why = (
        f"the history of {model.name} does not know the weights of {base.name} ({base.weights[:12]}); it was made from "
        f"{model.lineage.base.get('id', 'another base')}"
        if model.lineage
        else f"{model.source} has no lineage.json that says it was made from {base.name}"
    )
    raise CheckpointError(f"{why}; compare them in a file of its own with --output FILE")


def _take_over(metrics: Metrics, model: Subject, folder: Path) -> None:
    """Copy the numbers of an earlier stage, and of what it was compared with."""
    earlier = Metrics.of(folder)
    if earlier is None:
        raise CheckpointError(f"{folder} has no {FILE_NAME}; measure it with hf-layerprune eval {folder}")
    if earlier.weights != weights_hash(fingerprint(folder)):
        raise CheckpointError(
            f"{folder / FILE_NAME} was measured on other weights than the folder's; measure it again"
        )
    known = {model.weights} | (model.lineage.known_weights() if model.lineage else set())
    if earlier.weights not in known:
        raise CheckpointError(
            f"{folder} ({earlier.weights[:12]}) is no earlier stage of {model.name}: its history does not know it"
        )
    for weights, said in earlier.models.items():
        if weights in known:
            metrics.models.setdefault(weights, said)
    metrics.add(
        results=[one for one in earlier.results if one["weights"] in known and one["weights"] != model.weights],
        comparisons=[one for one in earlier.comparisons if {one["weights"], one["base"]} <= known],
    )
