"""Weights that are mapped from safetensors files: release their memory, and copy them without using any.

On a CPU, `from_pretrained` leaves weights as private mappings of their files: a page is read into memory on first
access, and becomes the process's own memory when it is written to.
"""

from __future__ import annotations

import copy
import ctypes
import mmap
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

_MADV_DONTNEED = 4


def release(module: nn.Module) -> None:
    """Release the memory of weights that are mapped from a file; the next access reads them again.

    Args:
        module (`nn.Module`): Releases its parameters and buffers, except those in ordinary memory and those that were
            written to since they were loaded.
    """
    page = mmap.PAGESIZE
    spans = [
        (-(-start // page) * page, end // page * page) for start, end in map(_span, _dense(module))
    ]  # whole pages
    for start, end in _unmodified(sorted(span for span in spans if span[0] < span[1])):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _dense(module: nn.Module) -> list[torch.Tensor]:
    tensors = (*module.parameters(), *module.buffers())
    return [tensor for tensor in tensors if tensor.device.type == "cpu" and tensor.is_contiguous()]


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def _unmodified(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those of some address ranges that lie in mapped weight files and were not written to; Linux only.

    Releasing any other memory would wipe its contents.
    """
    if sys.platform != "linux" or not spans:
        return []
    files: list[tuple[int, int]] = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            if line.endswith(".safetensors\n"):
                low, _, high = line.partition(" ")[0].partition("-")
                files.append((int(low, 16), int(high, 16)))
    clean: list[tuple[int, int]] = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pages:
        for start, end in spans:
            if any(low <= start and end <= high for low, high in files):
                first, last = start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
                pages.seek(8 * first)
                flags = np.frombuffer(pages.read(8 * (last - first)), np.uint64) >> 61
                # A page that was written to is in memory or swapped out (4, 2), and not the file's (1).
                if len(flags) == last - first and not np.any((flags > 1) & (flags & 1 == 0)):
                    clean.append((start, end))
    return clean


def copy_by_mapping(module: nn.Module, name: str, sources: Mapping[str, tuple[Path, str]]) -> bool:
    """Make the next deep copy of a module map its weights from their files instead of copying them.

    Args:
        module (`nn.Module`): The module.
        name (`str`): Its full name in the model.
        sources (`Mapping[str, tuple[Path, str]]`): For the full name of each parameter, the file that it was mapped
            from and its name there.

    Returns:
        `bool`: Whether this is possible: all its weights are mapped and unmodified.
    """
    parameters = dict(module.named_parameters())
    full = {key: f"{name}.{key}" for key in parameters}
    if not parameters or any(
        full[key] not in sources or value.device.type != "cpu" for key, value in parameters.items()
    ):
        return False
    spans = [_span(value) for value in parameters.values()]
    if len(_unmodified(spans)) < len(spans):
        return False

    def deep_copy(memo: dict[int, Any]) -> nn.Module:
        del module.__dict__["__deepcopy__"]
        for key, value in parameters.items():
            path, stored = sources[full[key]]
            with safe_open(path, framework="pt", backend="mmap") as file:
                twin = file.get_tensor(stored)
            if twin.dtype != value.dtype or twin.shape != value.shape:
                twin = value.detach().clone()
            memo[id(value)] = type(value)(twin, requires_grad=value.requires_grad)
        return copy.deepcopy(module, memo)

    module.__dict__["__deepcopy__"] = deep_copy
    return True
