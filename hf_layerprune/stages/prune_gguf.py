"""The prune stage for a GGUF file that stays one: its tensors are copied, and it is not loaded."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..cut.gguf import cut_gguf, is_gguf, plan_gguf_cut
from ..cut.gguf.modelfile import make_modelfile
from ..errors import CheckpointError, CutError
from ..families import Cut
from ..files.copy import check_file_target, write_text
from ..files.gguf_header import GGUFHeader, Tensor, block_count_of, read_header
from ..options import format_bytes, format_count, refuse_unused
from ..runtime.loading import resolve_base
from ..select import needs_model, select_layers
from ..select.reverse_order import advise_small
from ..select.targets import Target
from .prune_writers import prepare_dense
from .requests import PruneRequest

logger = logging.getLogger(__name__)


def prune_gguf(request: PruneRequest, base: Path, output: Path) -> Cut:
    """Write a pruned GGUF file, and beside it, what Ollama needs.

    Raises:
        CutError: These layers can't be dropped, or an option needs a model that is loaded.
        CheckpointError: The base is no GGUF file or can't be read, or the output can't be written.
    """
    if not is_gguf(base):
        resolve_base(request.base)
        raise CheckpointError(
            f"{request.base} is not a GGUF file, so {output} takes two steps: prune into the folder {output.stem}, then "
            f"run llama.cpp's converter: python convert_hf_to_gguf.py {output.stem} --outfile {output} (docs/engines.md "
            "says where it is)"
        )
    unused = ("dtype", "adapter", "repair", "check", "link", "target_dtype")
    why = "where a GGUF file stays one, since it is cut without being loaded"
    refuse_unused(request, unused, why, "write a folder, or ")
    check_file_target(output, force=request.force, source=base)  # before layers are chosen
    header = read_header(base)  # once: a large vocabulary takes a second
    if needs_model(request):
        dropped = prepare_dense(request, None).drop_layers  # looks at the dequantised model
    elif request.drop_layers is not None:
        dropped = list(request.drop_layers)
    else:
        n = block_count_of(header)
        dropped = select_layers(n, request, target=_gguf_target(request, header, n))
    if request.drop_layers is None and request.criterion == "reverse_order":
        advise_small(_elements(header.tensors))
    plan = cut_gguf(base, output, dropped, force=request.force)
    _write_modelfile(output)
    return plan.cut


def _write_modelfile(output: Path) -> None:
    """Write what Ollama needs beside a file that chats; an existing one may have been edited, and stays."""
    text, path = make_modelfile(output), output.with_suffix(".Modelfile")
    if text is None:
        return
    if os.path.lexists(path):
        logger.info("%s exists and stays as it is", path)
        return
    write_text(path, text)
    logger.info("wrote %s, for Ollama", path)


def _elements(tensors: Iterable[Tensor]) -> int:
    """The parameters in tensors, as llama.cpp counts them: a head that is stored twice counts twice."""
    return sum(math.prod(tensor.dimensions) for tensor in tensors)


def _gguf_target(request: PruneRequest, header: GGUFHeader, num_layers: int) -> Target | None:
    """What must be left of a GGUF file."""
    if request.target is None:
        return None
    limit: Any = getattr(request, request.target)  # as a number, since it is checked
    if request.target not in ("target_size", "target_params"):
        raise CutError(
            f"{request.target} is not known for a GGUF file that stays one; use target_size, target_params or drop=N"
        )

    def size(drop: Sequence[int]) -> float:
        return plan_gguf_cut(header, list(drop)).target_bytes if drop else header.path.stat().st_size

    def parameters(drop: Sequence[int]) -> float:
        return _elements(plan_gguf_cut(header, list(drop)).tensors if drop else header.tensors)

    left, unit = (size, format_bytes) if request.target == "target_size" else (parameters, format_count)
    each = [left(()) - left((i,)) for i in range(num_layers)]
    return Target(request.target, limit, left, each, unit)
