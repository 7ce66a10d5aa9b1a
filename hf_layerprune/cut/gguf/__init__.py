"""Drop decoder layers of a GGUF model file on disk, without dequantising and without torch.

    from hf_layerprune.cut.gguf import cut_gguf

    cut_gguf("SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-101M.Q4_1.gguf", drop_layers=range(23, 30))

A cut is planned from the header alone: a new header, and the tensors to copy. Metadata that does not change and tensors
are copied byte for byte, whatever their type.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...families.fields import Cut
from ...files.copy import LocalFile, check_space, new_file
from ...files.gguf_header import (
    CUT_KEYS,
    GGUFHeader,
    Tensor,
    align,
    block_count_of,
    cut_entries,
    read_header,
    recorded_cut,
    write_header,
)
from ...options import format_bytes
from ...screen import progress_bar
from .layers import GGUFCut, rewrite_metadata
from .names import size_label_changes

logger = logging.getLogger(__name__)

_LAYER_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)
_NUMBERED = re.compile(r"\.[0-9]+\.|^(blk|.*\.blk)\.")


@dataclass(frozen=True, slots=True)
class GGUFCutPlan:
    """Everything that a cut will do. `tensors`, under their new names, are copied from `data_start` on, after the header."""

    cut: Cut
    header: bytes = field(repr=False)
    tensors: tuple[Tensor, ...] = field(repr=False)
    data_start: int
    alignment: int

    @property
    def target_bytes(self) -> int:
        """Size of the file to write, in bytes."""
        return len(self.header) + sum(align(tensor.size, self.alignment) for tensor in self.tensors)


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a GGUF file, judged by its first bytes and not by its name."""
    if not os.path.isfile(path):  # reading from a pipe would wait
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def gguf_layer_count(source: str | os.PathLike[str]) -> int:
    """The number of layers of a GGUF model file, all of which can be named in `drop_layers`.

    Raises:
        CheckpointError: The file can't be read or is not a GGUF model.
    """
    return block_count_of(read_header(Path(source)))


def gguf_text_metadata(source: str | os.PathLike[str]) -> dict[str, str]:
    """The text metadata of a GGUF file by key, such as its licence and its chat template.

    Raises:
        CheckpointError: The file can't be read.
    """
    texts = {key: entry.text for key, entry in read_header(Path(source)).keys.items()}
    return {key: text for key, text in texts.items() if text is not None}


def plan_gguf_cut(source: str | os.PathLike[str] | GGUFHeader, drop_layers: Sequence[int]) -> GGUFCutPlan:
    """Plan a cut from a file or its header, and refuse it if it can't be exact. Nothing is written.

    Raises:
        CheckpointError: The file is damaged or of an unknown kind, or the cut could not be exact.
        CutError: An index is out of range or named twice, or no layer or every layer would be dropped.
    """
    header = source if isinstance(source, GGUFHeader) else read_header(Path(source))
    cut, changes = rewrite_metadata(header, drop_layers)
    layer_of = _map_tensors_to_layers(cut)
    new_index = cut.layers.new_index
    kept: list[Tensor] = []
    for tensor in header.tensors:
        layer = layer_of.get(tensor.name)
        if layer is None or layer in new_index:
            name = tensor.name if layer is None else f"blk.{new_index[layer]}.{tensor.name.split('.', 2)[2]}"
            kept.append(replace(tensor, name=name))
    changes |= size_label_changes(header, cut.architecture, kept)
    entries = [entry.pack(changes.get(key)) for key, entry in header.keys.items() if key not in CUT_KEYS]
    entries += cut_entries(*_cut_of_base(header, cut.layers))
    return GGUFCutPlan(
        cut=cut.layers,
        header=write_header(entries, kept, header.alignment),
        tensors=tuple(kept),
        data_start=header.data_start,
        alignment=header.alignment,
    )


def cut_gguf(
    source: str | os.PathLike[str], target: str | os.PathLike[str], drop_layers: Sequence[int], *, force: bool = False
) -> GGUFCutPlan:
    """Write a copy of a GGUF model file without some of its layers.

    The copy is written to a temporary file next to the target and renamed when it is complete and on disk. Whenever the
    process dies, the target is therefore absent, unchanged or complete.

    Args:
        source (`str` or `os.PathLike`): The GGUF file. It is only read.
        target (`str` or `os.PathLike`): The file to write, in an existing folder.
        drop_layers (`Sequence[int]`): Indices of the layers to drop.
        force (`bool`, *optional*, defaults to `False`): Replace the target if it exists.

    Returns:
        `GGUFCutPlan`: The plan that was carried out.

    Raises:
        CheckpointError: The file can't be cut, the target exists, the disk is too full, or writing fails.
        CutError: An index is out of range or given twice, or no layer or every layer would be dropped.
    """
    source, target = Path(source), Path(target)
    with LocalFile(source) as file:
        plan = plan_gguf_cut(source, drop_layers)
        total, name = plan.target_bytes, target.name
        kept, of = len(plan.cut.keep), plan.cut.num_layers
        logger.info("%s: keeping %d of %d layers; copying %s", source, kept, of, format_bytes(total))
        with new_file(target, force=force, source=source) as partial:
            check_space(target, total, shutil.disk_usage(target.parent).free)
            with (
                partial.open("wb") as output,
                progress_bar(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=name) as bar,
            ):
                output.write(plan.header)
                for tensor in plan.tensors:
                    for count in file.copy_into(output, plan.data_start + tensor.offset, tensor.size):
                        bar.update(count)
                    output.write(bytes(align(tensor.size, plan.alignment) - tensor.size))
                file.check_unchanged()
    return plan


def _cut_of_base(header: GGUFHeader, cut: Cut) -> tuple[list[int], int]:
    """The layers that a cut file lacks of the first file that was cut, and how many that had."""
    earlier = recorded_cut(header) or {"drop_layers": [], "num_base_layers": cut.num_layers}
    n, gone = earlier["num_base_layers"], earlier["drop_layers"]
    here = [layer for layer in range(n) if layer not in gone]
    return sorted([*gone, *(here[layer] for layer in cut.drop)]), n


def _map_tensors_to_layers(cut: GGUFCut) -> dict[str, int]:
    """Map the name of each layer's tensors to the layer, and check that no layer is missing."""
    header, counted = cut.header, f"{cut.architecture}.block_count"
    layer_of: dict[str, int] = {}
    for tensor in header.tensors:
        match = _LAYER_TENSOR.fullmatch(tensor.name)
        if match is None:
            if _NUMBERED.search(tensor.name):
                header.fail(f"tensor {tensor.name!r} is numbered, but not like a decoder layer's (blk.0.NAME)")
            continue
        layer = int(match[1])
        if layer >= cut.block_count:
            header.fail(
                f"tensor {tensor.name!r} belongs to a layer beyond {counted} = {cut.block_count}; "
                "the file is damaged or badly converted, so convert it again"
            )
        layer_of[tensor.name] = layer
    present = set(layer_of.values())
    # A model may be stored without its layers for multi-token prediction.
    for layer in range(cut.main_count):
        if layer not in present:
            header.fail(
                f"layer {layer} has no tensors, though {counted} is {cut.block_count}; "
                "the file is damaged or badly converted, so convert it again"
            )
    return layer_of
