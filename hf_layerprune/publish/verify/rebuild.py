"""What a model's tensors have to be, if nothing but a cut was done to its base: where the bytes of each come from."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import families
from ...cut.base import Base as Files
from ...cut.base import read_weights
from ...cut.header import Tensor
from ...cut.plan import Origin, Rows, Span, kept_tensors, new_names
from ...cut.settings import read_config
from ...errors import CheckpointError
from ...files.copy import LocalFile
from ...records.fingerprints import fingerprint
from ...records.history import History
from ...records.names import base_name
from ...runtime.loading import is_hub_id

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

CHUNK = 8 << 20


@dataclass(frozen=True)
class Base:
    """The base of a model, found.

    Args:
        name (`str`): Where it is.
        path (`Path`, *optional*): Its folder or GGUF file.
        hub (`cut.base.Base`, *optional*): Its repository.
    """

    name: str
    path: Path | None = None
    hub: Files | None = None

    @classmethod
    def find(cls, history: History, named: str | None, token: str | bool | None) -> Base:
        """Find the base that a lineage names.

        Args:
            history (`History`): What the lineage says.
            named (`str`, *optional*): Where the user says that it is.
            token (`str` or `bool`, *optional*): As the client library takes it.

        Raises:
            CheckpointError: It is nowhere.
        """
        told = history.lineage.base
        place = named or str(told.get("id") or "")
        path = Path(place).expanduser()
        if place and path.exists() and (named or not told.get("commit")):
            return cls(place, path)
        hub_id = place if named else history.base_on_hub
        if not hub_id or not is_hub_id(hub_id):
            raise CheckpointError(f"the base, {named or base_name(told)}, is not here; say where it is with --base")
        commit = told.get("commit") if hub_id == told.get("id") else None
        return cls(hub_id, hub=Files.open(hub_id, commit, token=token))

    @property
    def packed(self) -> bool:
        """Whether it is a GGUF file."""
        return self.path is not None and self.path.is_file()

    def differences(self, told: dict[str, dict[str, Any]]) -> list[str]:
        """The files that are not those that a lineage tells of.

        Args:
            told (`dict[str, dict[str, Any]]`): Size and sha256 by file name.

        Returns:
            `list[str]`: Of weights and config, those that differ or are missing; other files decide nothing.
        """
        found = self.hub.repo.fingerprint() if self.hub and self.hub.repo else fingerprint(self.path)
        decisive = [name for name in told if name.endswith((".safetensors", ".gguf")) or name == "config.json"]
        return [name for name in decisive if _identity(found.get(name)) != _identity(told[name])]


def _identity(entry: dict[str, Any] | None) -> tuple[Any, ...] | None:
    return None if entry is None else (entry.get("size"), entry.get("sha256"), entry.get("blob_id"))


@dataclass(frozen=True)
class Reference:
    """Where the bytes of every tensor come from that a cut leaves.

    Args:
        tensors (`dict[str, Origin]`): By the tensor's name after the cut.
        others (`dict[str, Origin]`): All tensors of the base by their own names, where they can be looked at.
        made_again (`bool`): Whether the cut was made again, since a cut of this kind is more than copied bytes.
    """

    tensors: dict[str, Origin]
    others: dict[str, Origin] = field(default_factory=dict)
    made_again: bool = False


def expected_config(history: History, base: Base) -> dict[str, Any]:
    """The fields of the config that the cuts leave.

    Args:
        history (`History`): What was done.
        base (`Base`): The base.

    Returns:
        `dict[str, Any]`: As the config's class gives them.
    """
    from ...runtime.loading import load_config

    config = load_config(base.path) if base.packed else read_config(base.hub.folder if base.hub else base.path)
    for stage in history.stages:
        if stage.name == "prune":
            config = families.cut_config(config, families.make_cut(config, stage.settings["drop_layers"]))
    return config.to_dict()


@contextmanager
def open_reference(history: History, base: Base) -> Iterator[Reference]:
    """Find out what a model's tensors have to be.

    Args:
        history (`History`): What was done.
        base (`Base`): The base.

    Yields:
        `Reference`: Where the bytes come from.

    Raises:
        CheckpointError: The base is damaged, or the cut can't be followed.
    """
    if base.packed or history.dtype is not None:
        with _made_again(history, base) as reference:
            yield reference
        return
    folder = base.hub.folder if base.hub else base.path
    config = read_config(folder)
    if families.layer_count(config) != history.num_base_layers:
        raise CheckpointError(
            f"the base has {families.layer_count(config)} layers, and lineage.json says {history.num_base_layers}"
        )
    cut = _cut(config, history)
    weights = read_weights(base.hub or Files.open(folder), lambda names: new_names(names, config, cut).names)
    every = {
        tensor.name: Origin(header.source, tensor, (Span(header.data_start + tensor.start, tensor.size),))
        for header in weights.headers.values()
        for tensor in header.tensors
    }
    yield Reference(kept_tensors(weights, config, cut), every)


def _cut(config: PreTrainedConfig, history: History) -> families.Cut:
    if not history.dropped:
        return families.Cut(tuple(range(history.num_base_layers)), history.num_base_layers)
    return families.make_cut(config, history.dropped)


@contextmanager
def _made_again(history: History, base: Base) -> Iterator[Reference]:
    """Weights that were converted or unpacked: the cut is made again, by the same means."""
    from ...stages.prune import PruneRequest, prune_to

    conversions = [
        one for one in history.stages if one.name == "prune" and one.settings.get("dtype", "auto") != "auto"
    ]
    if len(conversions) > 1:
        raise CheckpointError("the weights were converted more than once on the way, which can't be followed")
    logger.info("the cut is made again from %s, in a temporary folder, since its weights are converted", base.name)
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        target = Path(place, "again")
        prune_to(
            PruneRequest(
                base=str(base.path) if base.path else base.name,
                output=str(target),
                drop_layers=list(history.dropped),
                dtype=history.dtype if conversions else "auto",
                revision=base.hub.repo.commit if base.hub and base.hub.repo else None,
            )
        )
        weights = read_weights(Files.open(target))
        yield Reference(
            {
                tensor.name: Origin(header.source, tensor, (Span(header.data_start + tensor.start, tensor.size),))
                for header in weights.headers.values()
                for tensor in header.tensors
            },
            made_again=True,
        )


def stream(origin: Origin) -> Iterator[bytes]:
    """The bytes of a tensor, piece by piece."""
    from ...cut.write import take_columns

    for piece in origin.pieces:
        if isinstance(piece, Rows):
            at_once = max(1, CHUNK // piece.row_bytes)
            for row in range(0, piece.rows, at_once):
                count = min(at_once, piece.rows - row)
                data = origin.source.read(piece.offset + row * piece.row_bytes, count * piece.row_bytes)
                yield bytes(take_columns(data, piece))
        else:
            yield from read_span(origin.source, piece.offset, piece.length)


def read_span(source: LocalFile, offset: int, length: int) -> Iterator[bytes]:
    """A range of a file, piece by piece."""
    for start in range(0, length, CHUNK):
        yield source.read(offset + start, min(CHUNK, length - start))


def same_make(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same type and shape."""
    return (one.dtype, one.shape) == (other.dtype, other.shape)
