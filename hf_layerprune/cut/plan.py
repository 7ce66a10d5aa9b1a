"""Plan a cut of a safetensors checkpoint: which bytes to copy, where to, and under which names.

Nothing here reads a tensor or writes a file. The plan is made from headers, the index and configs alone, and every check
is made here; `disk.py` then carries it out.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .. import families
from ..errors import CheckpointError
from ..families.layout import find_layer_prefix
from ..families.quantization import names_layers
from ..files.json_file import parse_json
from ..runtime.model_class import layer_prefix_of, model_class_of
from .base import SINGLE, Weights
from .header import Header, Tensor, write_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..files.copy import FileState

logger = logging.getLogger(__name__)

_TENSOR_NAMES_KEY = "tensor_names"  # a list of all names, among torchao's notes
_SHARD_NAME = "model-{:05d}-of-{:05d}.safetensors"


class Span(NamedTuple):
    """A range of a source file to copy unchanged."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class ColumnSpans:
    """A matrix in a source file, of which only some columns are copied: the ranges of each row to keep."""

    offset: int
    rows: int
    row_bytes: int
    columns: tuple[Span, ...]

    @property
    def length(self) -> int:
        """Number of bytes that are kept."""
        return self.rows * sum(span.length for span in self.columns)

    def spans(self) -> Iterator[Span]:
        """The ranges to copy, row by row."""
        for row in range(self.rows):
            for offset, length in self.columns:
                yield Span(self.offset + row * self.row_bytes + offset, length)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One file to write: a header, then ranges of a source file, in order.

    `version` is the state of the source file when the plan was made; `whole` says that it is copied unchanged.
    """

    source: str
    version: FileState
    target: str
    header: bytes = field(repr=False)
    pieces: tuple[Span | ColumnSpans, ...] = field(repr=False)
    whole: bool

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return len(self.header) + sum(piece.length for piece in self.pieces)

    def spans(self) -> Iterator[Span]:
        """The ranges of the source file to copy after the header, in order."""
        for piece in self.pieces:
            yield from (piece,) if isinstance(piece, Span) else piece.spans()


@dataclass(frozen=True)
class WeightsPlan:
    """The part of a plan that concerns weights.

    `tensor_names` has the old and the new name of every tensor that is kept, and `tensors` has these by their new
    names, without offsets. `layer_prefix` is what precedes the layer's index in the name of a tensor.
    """

    layer_prefix: str
    shards: tuple[ShardPlan, ...]
    index: dict[str, Any] | None = field(repr=False)
    tensor_names: dict[str, str] = field(repr=False)
    tensors: dict[str, Tensor] = field(repr=False)


@dataclass(frozen=True)
class CheckpointPlan(WeightsPlan):
    """Everything that a cut will do, known before the first byte is written.

    `files` has the small files that change, by name, and `companions` those that are copied unchanged, with their
    sizes. The source of a base on the Hub is its folder in the cache.
    """

    name: str
    source: Path
    cut: families.Cut
    config: PreTrainedConfig = field(repr=False)
    files: dict[str, bytes] = field(repr=False)
    companions: tuple[tuple[str, int], ...]

    @property
    def weight_bytes(self) -> int:
        """Size of the weight files to write, in bytes."""
        return sum(shard.size for shard in self.shards)

    @property
    def target_bytes(self) -> int:
        """Size of all files to write, in bytes."""
        return self.weight_bytes + sum(map(len, self.files.values())) + sum(size for _, size in self.companions)


class _KeptTensor(NamedTuple):
    """A tensor to keep: before the cut, after it (without its offsets), and the bytes to copy."""

    old: Tensor
    new: Tensor
    piece: Span | ColumnSpans


def plan_weights(weights: Weights, config: PreTrainedConfig, cut: families.Cut) -> WeightsPlan:
    """Plan the weight files of a cut.

    Raises:
        CheckpointError: Tensors do not fit the config.
        UnsupportedModelError: The decoder layers can't be identified.
    """
    wide = families.wide_tensors(config)
    names, prefix = new_names(weights.tensor_names, config, cut)
    # Among the notes, a layer may have another name: that in the model, not that in the checkpoint.
    metadata_names = [name for header in weights.headers.values() for name in header.metadata or ()]
    metadata_prefix = find_layer_prefix(metadata_names, cut.num_layers) if names_layers(metadata_names) else ""
    kept: dict[str, list[_KeptTensor]] = {}
    for file, header in weights.headers.items():
        items = [_plan_tensor(one, names[one.name], header, wide, cut) for one in header.tensors if one.name in names]
        if items:
            kept[file] = items
    shards = []
    weight_map: dict[str, str] = {}
    for number, (file, items) in enumerate(kept.items(), 1):
        target = SINGLE if weights.index is None else _SHARD_NAME.format(number, len(kept))
        header = weights.headers[file]
        shards.append(_plan_shard(file, target, header, items, _cut_metadata(header, metadata_prefix, cut)))
        weight_map |= {item.new.name: target for item in items}
    index = None
    if weights.index is not None:
        metadata = dict(weights.index.get("metadata", {}))
        metadata["total_size"] = sum(item.new.size for items in kept.values() for item in items)
        metadata.pop("total_parameters", None)  # informative only, and not known of packed weights
        index = weights.index | {"weight_map": weight_map, "metadata": metadata}
    tensors = {item.new.name: item.new for items in kept.values() for item in items}
    return WeightsPlan(prefix, tuple(shards), index, names, tensors)


# Config fields with the number of layers for multi-token prediction; a cut sets them to zero.
_DRAFT_COUNTS = ("num_nextn_predict_layers", "num_mtp_layers")


def _is_ignored(name: str, config: PreTrainedConfig) -> bool:
    """Whether the model's class skips this tensor on loading, as some do with layers for multi-token prediction."""
    picked = model_class_of(copy.deepcopy(config))
    patterns = getattr(picked[0], "_keys_to_ignore_on_load_unexpected", None) if picked else None
    return any(re.search(pattern, name) for pattern in patterns or ())


def new_names(tensors: Iterable[str], config: PreTrainedConfig, cut: families.Cut) -> tuple[dict[str, str], str]:
    """Work out the names of a checkpoint's tensors after a cut.

    Returns:
        `tuple[dict[str, str], str]`: Old to new name of each tensor that is kept, and the part of a tensor's name
            before the layer index.

    Raises:
        CheckpointError: A tensor has no plain layer index, or belongs to a layer that the config does not have.
        UnsupportedModelError: The decoder layers can't be identified.
    """
    tensors = list(tensors)
    prefix = layer_prefix_of(tensors, config)
    counts = [getattr(families.text_config(config), name, None) for name in _DRAFT_COUNTS]
    draft_count = max((count for count in counts if isinstance(count, int)), default=0)
    names: dict[str, str] = {}
    drafts: list[str] = []
    for name in tensors:
        new = name
        if name.startswith(prefix):
            index, dot, rest = name[len(prefix) :].partition(".")
            if index.isdecimal():
                layer = int(index)
                if not dot or index != str(layer):
                    raise CheckpointError(f"tensor {name!r} has no plain layer index; save the checkpoint again")
                if layer >= cut.num_layers:
                    if layer >= cut.num_layers + draft_count and not _is_ignored(name, config):
                        raise CheckpointError(
                            f"tensor {name!r} belongs to layer {layer}, but the config describes only the layers "
                            f"0..{cut.num_layers - 1}; the weights and the config do not belong together, so download "
                            "or save both again"
                        )
                    drafts.append(name)
                if layer not in cut.new_index:
                    continue
                new = f"{prefix}{cut.new_index[layer]}.{rest}"
        elif draft_count and "mtp" in name.split("."):
            drafts.append(name)
            continue
        names[name] = new
    if drafts:
        logger.info(
            "%d tensors of layers for multi-token prediction are dropped too, such as %s", len(drafts), drafts[0]
        )
    return names, prefix


def _plan_tensor(
    tensor: Tensor, name: str, header: Header, wide: Sequence[tuple[families.WideTensor, int]], cut: families.Cut
) -> _KeptTensor:
    """The bytes of a tensor to keep: all, or the kept layers' slices of a tensor with one slice per layer."""
    start = header.data_start + tensor.start
    one = next((one for one in wide if f".{one[0].suffix.rpartition('.')[0]}." in f".{tensor.name}"), None)
    if one is None:
        return _KeptTensor(tensor, replace(tensor, name=name), Span(start, tensor.size))
    dim, width = one[0].dim, one[1]
    if not f".{tensor.name}".endswith("." + one[0].suffix):
        raise CheckpointError(
            f"tensor {tensor.name!r} belongs to one that holds a slice for each layer, and it is not known how "
            "to slice it; start from a checkpoint in which that tensor is not quantised"
        )
    shape, n = tensor.shape, cut.num_layers
    if len(shape) <= dim or shape[dim] != n * width:
        raise CheckpointError(
            f"tensor {tensor.name!r} has the shape {list(shape)}, and the config wants {n} layers of {width} along "
            f"dimension {dim}; the weights and the config do not belong together, or that tensor is quantised"
        )
    rows = math.prod(shape[:dim])
    length, rest = divmod(tensor.size, max(1, rows) * n)  # of a layer's slice of a row
    if rest:
        raise CheckpointError(
            f"tensor {tensor.name!r} of type {tensor.dtype} can't be sliced at byte boundaries; start from another checkpoint"
        )
    kept = ColumnSpans(start, rows, n * length, tuple(merge_adjacent(Span(i * length, length) for i in cut.keep)))
    new_shape = (*shape[:dim], len(cut.keep) * width, *shape[dim + 1 :])
    return _KeptTensor(tensor, Tensor(name, tensor.dtype, new_shape, 0, kept.length), kept)


def _cut_metadata(header: Header, prefix: str, cut: families.Cut) -> dict[str, str] | None:
    """What a file notes on its tensors, as torchao does to unpack them, by their names after the cut."""
    metadata = header.metadata or {}
    for name, text in metadata.items():
        if name != _TENSOR_NAMES_KEY and names_layers(text):
            raise CheckpointError(
                f"the metadata of {header.path.name} may name layers in {name!r}, and it is not known how a cut changes "
                "that; save the checkpoint without it"
            )
    if not prefix:
        return header.metadata

    def renamed(names: Iterable[str]) -> Iterator[tuple[str, str]]:
        for name in names:
            index, dot, rest = name.removeprefix(prefix).partition(".")
            if not (name.startswith(prefix) and index.isdecimal()):
                yield name, name
            elif (layer := cut.new_index.get(int(index))) is not None:
                yield name, f"{prefix}{layer}{dot}{rest}"

    cut_metadata = {new: metadata[old] for old, new in renamed(metadata)}
    listed = parse_json(cut_metadata.get(_TENSOR_NAMES_KEY, "null"), f"{_TENSOR_NAMES_KEY} in a safetensors header")
    if isinstance(listed, list):
        cut_metadata[_TENSOR_NAMES_KEY] = json.dumps([new for _, new in renamed(map(str, listed))])
    return cut_metadata


def _plan_shard(
    file: str, target: str, header: Header, kept: list[_KeptTensor], metadata: dict[str, str] | None
) -> ShardPlan:
    whole = len(kept) == len(header.tensors) and all(item.new == item.old for item in kept)
    if whole and metadata == header.metadata:
        return ShardPlan(file, header.version, target, b"", (Span(0, header.size),), whole=True)
    # The widest types first, as the safetensors library writes them: every tensor is aligned whatever goes before it.
    ordered = sorted(kept, key=lambda item: -item.old.size / max(1, item.old.elements))
    placed: list[Tensor] = []
    position = 0
    for item in ordered:
        placed.append(replace(item.new, start=position, end=position + item.new.size))
        position += item.new.size
    pieces = tuple(merge_adjacent(item.piece for item in ordered))
    return ShardPlan(file, header.version, target, write_header(placed, metadata), pieces, whole=False)


def merge_adjacent(pieces: Iterable[Any]) -> Iterator[Any]:
    """Join adjacent spans; other pieces are returned unchanged."""
    last: Any = None
    for piece in pieces:
        if isinstance(last, Span) and isinstance(piece, Span) and last.offset + last.length == piece.offset:
            last = Span(last.offset, last.length + piece.length)
        elif piece.length:
            if last is not None:
                yield last
            last = piece
    if last is not None:
        yield last
