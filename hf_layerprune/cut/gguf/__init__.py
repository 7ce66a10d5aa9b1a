"""Drop decoder layers of a GGUF model file on disk, without dequantising and without torch.

    from hf_layerprune.cut.gguf import cut_gguf

    cut_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-101M.Q4_1.gguf", drop_layers=range(23, 30))

A cut is planned from the header alone: a new header, written by `gguf.GGUFWriter`, and the tensors to copy. Metadata that
does not change is passed to the writer as raw bytes, and tensors are copied byte for byte, whatever their type.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from ...errors import CheckpointError
from ...files.copy import LocalFile, check_file_target, check_space, new_file, open_new, write_all
from .layers import Rewrite, block_count_of, rewrite_metadata

if TYPE_CHECKING:
    from .reader import GGUFHeader, Tensor

logger = logging.getLogger(__name__)

_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_NUMBERED = re.compile(r"\.[0-9]+\.|^(blk|.*\.blk)\.")


class ByteRange(NamedTuple):
    """A range of the source file to copy unchanged."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class GGUFCutPlan:
    """Everything that a cut will do, known before the first byte is written."""

    source: Path
    architecture: str
    block_count: int
    kept_layers: tuple[int, ...]
    dropped_layers: tuple[int, ...]
    metadata_changes: dict[str, tuple[Any, Any]]
    tensor_names: dict[str, str] = field(repr=False)
    dropped_tensors: tuple[str, ...] = field(repr=False)
    source_bytes: int
    header: bytes = field(repr=False)
    pieces: tuple[ByteRange, ...] = field(repr=False)
    alignment: int

    @property
    def target_bytes(self) -> int:
        """Size of the file to write, in bytes."""
        return len(self.header) + sum(_padded(piece.length, self.alignment) for piece in self.pieces)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a GGUF file, judged by its first bytes and not by its name.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `bool`: `True` if it is a regular file that starts with the GGUF magic number.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def gguf_layer_count(source: str | os.PathLike[str]) -> int:
    """Count the layers of a GGUF model file.

    Args:
        source (`str` or `os.PathLike`): The GGUF file.

    Returns:
        `int`: The number of layers that can be named in `drop_layers`.

    Raises:
        CheckpointError: If the file cannot be read or is not a GGUF model.
    """
    return block_count_of(_read(Path(source)))


def gguf_texts(source: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a GGUF file, such as its licence and its chat template.

    Args:
        source (`str` or `os.PathLike`): The GGUF file.

    Returns:
        `dict[str, str]`: By key.

    Raises:
        CheckpointError: If the file cannot be read.
    """
    texts = {key: entry.text for key, entry in _read(Path(source)).keys.items()}
    return {key: text for key, text in texts.items() if text is not None}


def plan_gguf_cut(source: str | os.PathLike[str], drop_layers: Sequence[int]) -> GGUFCutPlan:
    """Plan a cut from the file's header, and refuse it if it can't be exact. Nothing is written.

    Args:
        source (`str` or `os.PathLike`): The GGUF file.
        drop_layers (`Sequence[int]`): Indices of the layers to drop.

    Returns:
        `GGUFCutPlan`: The kept tensors, the metadata changes, and the size of the result.

    Raises:
        CheckpointError: If the file is damaged or of an unknown kind, or if the cut could not be exact.
        CutError: If an index is out of range or named twice, or if no layer or every layer would be dropped.
    """
    return _plan(_read(Path(source)), drop_layers)


def cut_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    drop_layers: Sequence[int],
    *,
    force: bool = False,
    progress: bool = True,
) -> GGUFCutPlan:
    """Write a copy of a GGUF model file without some of its layers.

    The copy is written to a temporary file next to the target and renamed when it is complete and on disk. Whenever the
    process dies, the target is therefore absent, unchanged or complete.

    Args:
        source (`str` or `os.PathLike`): The GGUF file. It is only read.
        target (`str` or `os.PathLike`): The file to write, in an existing folder.
        drop_layers (`Sequence[int]`): Indices of the layers to drop.
        force (`bool`, *optional*, defaults to `False`): Replace the target if it exists.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        `GGUFCutPlan`: The plan that was carried out.

    Raises:
        CheckpointError: If the cut is refused, the target exists, the disk is too full, or writing fails.
        CutError: If an index is out of range or named twice, or if no layer or every layer would be dropped.
    """
    source, target = Path(source), Path(target)
    with LocalFile(source) as file:
        plan = _plan(_read(source), drop_layers)
        check_file_target(target, force=force, apart_from=source)
        check_space(target, plan.target_bytes, shutil.disk_usage(target.parent).free)
        logger.info(
            "%s: keeping %d of %d layers, %d of %d bytes",
            source,
            len(plan.kept_layers),
            plan.block_count,
            plan.target_bytes,
            plan.source_bytes,
        )
        with (
            new_file(target, force=force, apart_from=source) as partial,
            tqdm(
                total=plan.target_bytes,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                desc=target.name,
                disable=not progress,
            ) as bar,
        ):
            for count in _write(file, plan, partial):
                bar.update(count)
            file.check_unchanged()
    return plan


def _write(file: LocalFile, plan: GGUFCutPlan, partial: Path) -> Iterator[int]:
    with open_new(partial) as output:
        write_all(output, plan.header)
        yield len(plan.header)
        for piece in plan.pieces:
            yield from file.copy_into(output, *piece)
            padding = bytes(_padded(piece.length, plan.alignment) - piece.length)
            write_all(output, padding)
            yield len(padding)


def _read(source: Path) -> GGUFHeader:
    from .reader import read_header  # importing gguf is slow

    try:
        # Checked first, since opening a pipe would wait for a writer.
        if not stat.S_ISREG(source.stat().st_mode):
            raise CheckpointError(f"{source} is not a file; name a .gguf file")
        return read_header(source)
    except OSError as error:
        raise CheckpointError(f"could not read {source}: {error.strerror or error}") from error


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _plan(header: GGUFHeader, drop_layers: Sequence[int]) -> GGUFCutPlan:
    rewrite = rewrite_metadata(header, drop_layers)
    layer_of = _sort_tensors(header, rewrite.architecture, rewrite.block_count)
    new_index = {old: new for new, old in enumerate(rewrite.kept)}
    kept: list[tuple[Tensor, str]] = []
    dropped: list[str] = []
    for tensor in header.tensors:
        layer = layer_of.get(tensor.name)
        if layer is None:
            kept.append((tensor, tensor.name))
        elif layer in new_index:
            kept.append((tensor, f"blk.{new_index[layer]}.{tensor.name.split('.', 2)[2]}"))
        else:
            dropped.append(tensor.name)
    return GGUFCutPlan(
        source=header.path,
        architecture=rewrite.architecture,
        block_count=rewrite.block_count,
        kept_layers=rewrite.kept,
        dropped_layers=tuple(layer for layer in range(rewrite.block_count) if layer not in new_index),
        metadata_changes=rewrite.changes,
        tensor_names={tensor.name: name for tensor, name in kept},
        dropped_tensors=tuple(dropped),
        source_bytes=header.path.stat().st_size,
        header=_packed(header, rewrite, kept),
        pieces=tuple(ByteRange(tensor.offset, tensor.size) for tensor, _ in kept),
        alignment=header.alignment,
    )


def _packed(header: GGUFHeader, rewrite: Rewrite, kept: list[tuple[Tensor, str]]) -> bytes:
    """The new header, from the library's writer."""
    from gguf import GGUFValueType, GGUFWriter
    from gguf.gguf_writer import WriterState

    class Writer(GGUFWriter):
        """Also accepts raw bytes of the source file, which preserves empty arrays and text that is not UTF-8."""

        def _pack_val(self, val: Any, vtype: Any, add_vtype: bool, sub_type: Any = None) -> bytes:
            if isinstance(val, _Raw):
                return self._pack("I", vtype) + val.data
            return super()._pack_val(val, vtype, add_vtype, sub_type)

    writer: Any = Writer(None, rewrite.architecture)
    writer.data_alignment = header.alignment
    writer.kv_data[0].clear()  # the architecture is written in the position that it has in the source
    for key, entry in header.keys.items():
        if key in rewrite.changes:
            after = rewrite.changes[key][1]
            value = list(after) if entry.is_array else after
            writer.add_key_value(key, value, entry.kind, sub_type=entry.item_kind)
        else:
            writer.add_key_value(key, _Raw(entry.raw), GGUFValueType(entry.kind))
    for tensor, name in kept:
        writer.add_tensor_info(name, tensor.shape, None, tensor.size, raw_dtype=tensor.kind)
    buffer = io.BytesIO()
    writer.fout, writer.state = [buffer], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.write_padding(buffer, buffer.tell())
    return buffer.getvalue()


class _Raw(NamedTuple):
    data: bytes


def _sort_tensors(header: GGUFHeader, architecture: str, block_count: int) -> dict[str, int]:
    """Map the name of each layer's tensors to the layer, and check that no layer is missing."""
    layer_of: dict[str, int] = {}
    for tensor in header.tensors:
        match = _LAYER_TENSOR.fullmatch(tensor.name)
        if match is None:
            if _NUMBERED.search(tensor.name):
                header.fail(f"tensor {tensor.name!r} is numbered, but not like a decoder layer's (blk.0.NAME)")
            continue
        layer = int(match[1])
        if layer >= block_count:
            header.fail(
                f"tensor {tensor.name!r} belongs to a layer beyond {architecture}.block_count = {block_count}; "
                "the file is damaged or badly converted, so convert it again"
            )
        layer_of[tensor.name] = layer
    present = set(layer_of.values())
    trailing = header.keys.get(f"{architecture}.nextn_predict_layers")
    # A model may be stored without its layers for multi-token prediction.
    optional = trailing.values[0] if trailing is not None and trailing.is_integer else 0
    for layer in range(block_count - optional):
        if layer not in present:
            header.fail(
                f"layer {layer} has no tensors, though {architecture}.block_count is {block_count}; "
                "the file is damaged or badly converted, so convert it again"
            )
    return layer_of
