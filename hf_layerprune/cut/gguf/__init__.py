"""Drop decoder layers of a GGUF model file on disk, without dequantising and without torch.

    from hf_layerprune.cut.gguf import cut_gguf

    cut_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-101M.Q4_1.gguf", drop_layers=range(23, 30))

A cut is planned from the header alone: a list of pieces, each either new bytes or a range of the source. Writing is
then a plain loop over the pieces. `gguf.GGUFWriter` is not used, since it takes Python values: it would write arrays
of unsigned integers back as signed ones, leave out empty strings and arrays, and encode the whole vocabulary again.
Here, everything that does not change is copied byte for byte, and so are all tensors, whatever their type.
"""

import logging
import os
import re
import secrets
import shutil
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from tqdm.auto import tqdm

from ...errors import CheckpointError
from ...files.copy import KERNEL_CHUNK as _CHUNK
from ...files.copy import Copier as _Copier
from ...files.copy import FileState, check_space, sync_folder, write_all, write_failed
from .header import GGUFHeader, TensorInfo, pad, read_header
from .layers import block_count_of, rewrite_metadata

logger = logging.getLogger(__name__)

_FIXED_HEADER = struct.Struct("<4sIQQ")
_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_NUMBERED = re.compile(r"\.[0-9]+\.|^(blk|.*\.blk)\.")


class ByteRange(NamedTuple):
    """A range of the source file that is copied as it is."""

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
    target_bytes: int
    pieces: tuple[bytes | ByteRange, ...] = field(repr=False)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is a GGUF file, by its first bytes and not by its name.

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
        CheckpointError: If the file cannot be read or is no GGUF model.
    """
    with _opened(Path(source)) as (_, header):
        return block_count_of(header)


def plan_gguf_cut(source: str | os.PathLike[str], drop_layers: Sequence[int]) -> GGUFCutPlan:
    """Plan a cut from the file's header, and refuse it if it could not be exact. Writes nothing.

    Args:
        source (`str` or `os.PathLike`): The GGUF file.
        drop_layers (`Sequence[int]`): Indices of the layers to drop.

    Returns:
        `GGUFCutPlan`: What stays, what changes, and how large the result will be.

    Raises:
        CheckpointError: If the file is damaged or of an unknown kind, or if the cut could not be exact.
        CutError: If an index is out of range or named twice, or nothing or everything would go.
    """
    with _opened(Path(source)) as (_, header):
        return _plan(header, drop_layers)


def cut_gguf(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    drop_layers: Sequence[int],
    *,
    force: bool = False,
    progress: bool = True,
) -> GGUFCutPlan:
    """Write a copy of a GGUF model file without some of its layers.

    The copy is written to a temporary file beside the target and renamed when it is complete and on disk, so the
    target is absent (or the old one) or whole, whenever the process dies.

    Args:
        source (`str` or `os.PathLike`): The GGUF file. It is only read.
        target (`str` or `os.PathLike`): The file to write, in a folder that exists.
        drop_layers (`Sequence[int]`): Indices of the layers to drop.
        force (`bool`, *optional*, defaults to `False`): Replace the target if it exists.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar.

    Returns:
        `GGUFCutPlan`: What was done.

    Raises:
        CheckpointError: If the cut is refused, the target is in the way, the disk is too full, or writing fails.
        CutError: If an index is out of range or named twice, or nothing or everything would go.
    """
    source, target = Path(source), Path(target)
    with _opened(source) as (file, header):
        plan = _plan(header, drop_layers)
        _check_target(plan, target, force)
        logger.info(
            "%s: keeping %d of %d layers, %d of %d bytes",
            source,
            len(plan.kept_layers),
            plan.block_count,
            plan.target_bytes,
            plan.source_bytes,
        )
        try:
            _write(file, plan, target, force, progress)
        except OSError as error:
            raise write_failed(target, error) from error
    return plan


@contextmanager
def _opened(source: Path) -> Iterator[tuple[BinaryIO, GGUFHeader]]:
    try:
        # Looked at first: opening a pipe would wait for a writer.
        if not stat.S_ISREG(source.stat().st_mode):
            raise CheckpointError(f"{source} is not a file; name a .gguf file")
        file = open(source, "rb")  # noqa: SIM115
    except OSError as error:
        raise CheckpointError(f"could not read {source}: {error.strerror or error}") from error
    with file:
        try:
            header = read_header(file, source, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise CheckpointError(f"could not read {source}: {error.strerror or error}") from error
        yield file, header


def _plan(header: GGUFHeader, drop_layers: Sequence[int]) -> GGUFCutPlan:
    rewrite = rewrite_metadata(header, drop_layers)
    layer_of = _sort_tensors(header, rewrite.architecture, rewrite.block_count)
    new_index = {old: new for new, old in enumerate(rewrite.kept)}

    kept: list[tuple[TensorInfo, str]] = []
    dropped: list[str] = []
    for tensor in header.tensors:
        layer = layer_of.get(tensor.name)
        if layer is None:
            kept.append((tensor, tensor.name))
        elif layer in new_index:
            kept.append((tensor, f"blk.{new_index[layer]}.{_LAYER_TENSOR.fullmatch(tensor.name)[2]}"))
        else:
            dropped.append(tensor.name)

    pieces = _Pieces()
    pieces.add(_FIXED_HEADER.pack(b"GGUF", header.version, len(kept), len(header.keys)))
    for entry in header.keys.values():
        new = rewrite.entries.get(entry.key)
        pieces.add(ByteRange(entry.start, entry.end - entry.start) if new is None else new)
    # Readers want the data back to back, in the order of the descriptions.
    offset = 0
    for tensor, name in kept:
        pieces.add(tensor.encode(name, offset))
        offset += pad(tensor.size, header.alignment)
    pieces.align(header.alignment)
    for tensor, _ in kept:
        pieces.add(ByteRange(header.data_start + tensor.offset, tensor.size))
        pieces.align(header.alignment)
    return GGUFCutPlan(
        source=header.path,
        architecture=rewrite.architecture,
        block_count=rewrite.block_count,
        kept_layers=rewrite.kept,
        dropped_layers=tuple(layer for layer in range(rewrite.block_count) if layer not in new_index),
        metadata_changes=rewrite.changes,
        tensor_names={tensor.name: name for tensor, name in kept},
        dropped_tensors=tuple(dropped),
        source_bytes=header.file_size,
        target_bytes=pieces.size,
        pieces=tuple(piece if isinstance(piece, ByteRange) else bytes(piece) for piece in pieces.items),
    )


def _sort_tensors(header: GGUFHeader, architecture: str, block_count: int) -> dict[str, int]:
    """Map the name of each tensor that belongs to a layer to that layer, and check that no layer is missing."""
    layer_of: dict[str, int] = {}
    for tensor in header.tensors:
        match = _LAYER_TENSOR.fullmatch(tensor.name)
        if match is None:
            if _NUMBERED.search(tensor.name):
                header.fail(f"tensor {tensor.name!r} is numbered, and not like a decoder layer's (blk.0.NAME)")
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
    # A model may be stored without the layers that only predict further tokens.
    optional = trailing.values()[0] if trailing is not None and trailing.is_integer else 0
    for layer in range(block_count - optional):
        if layer not in present:
            header.fail(
                f"layer {layer} has no tensors, though {architecture}.block_count is {block_count}; "
                "the file is damaged or badly converted, so convert it again"
            )
    return layer_of


class _Pieces:
    def __init__(self) -> None:
        self.items: list[bytearray | ByteRange] = []
        self.size = 0

    def add(self, piece: bytes | ByteRange) -> None:
        is_range = isinstance(piece, ByteRange)
        length = piece.length if is_range else len(piece)
        if not length:
            return
        self.size += length
        last = self.items[-1] if self.items else None
        if is_range and isinstance(last, ByteRange) and last.offset + last.length == piece.offset:
            self.items[-1] = ByteRange(last.offset, last.length + length)
        elif is_range:
            self.items.append(piece)
        elif isinstance(last, bytearray):
            last += piece
        else:
            self.items.append(bytearray(piece))

    def align(self, alignment: int) -> None:
        self.add(bytes(pad(self.size, alignment) - self.size))


def _check_target(plan: GGUFCutPlan, target: Path, force: bool) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; make it first")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file to write")
    if target.exists() and plan.source.samefile(target):
        raise CheckpointError(f"{target} is the source itself; write to another file")
    if not force and os.path.lexists(target):
        raise CheckpointError(f"{target} exists; replace it with --force (force=True), or name another file")
    check_space(target, plan.target_bytes, shutil.disk_usage(target.parent).free)


def _write(file: BinaryIO, plan: GGUFCutPlan, target: Path, force: bool, progress: bool) -> None:
    before = FileState.of(file.fileno())
    temporary = target.with_name(f"{target.name}.{secrets.token_hex(8)}.partial")
    try:
        with (
            open(temporary, "xb", buffering=0) as output,
            tqdm(
                total=plan.target_bytes,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                desc=target.name,
                disable=not progress,
            ) as bar,
        ):
            copier = _Copier(file.fileno(), output.fileno(), name=file.name, chunk=_CHUNK)
            for piece in plan.pieces:
                if isinstance(piece, ByteRange):
                    for count in copier.copy(*piece):
                        bar.update(count)
                else:
                    write_all(output.fileno(), piece)
                    bar.update(len(piece))
            os.fsync(output.fileno())
        if FileState.of(file.fileno()) != before:
            raise CheckpointError(f"{plan.source} changed while it was read; make sure that nothing else writes it")
        _publish(temporary, target, force)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(target.parent)


def _publish(temporary: Path, target: Path, force: bool) -> None:
    if not force:
        # A hard link, unlike a rename, fails if somebody else has made the target in the meantime.
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise CheckpointError(f"{target} has appeared meanwhile; replace it with --force (force=True)") from None
        except OSError:
            if os.path.lexists(target):
                raise CheckpointError(
                    f"{target} has appeared meanwhile; replace it with --force (force=True)"
                ) from None
        else:
            temporary.unlink()
            return
    os.replace(temporary, target)
