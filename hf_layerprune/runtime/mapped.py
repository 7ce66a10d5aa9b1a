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

from safetensors import safe_open
from torch import nn

_MADV_DONTNEED = 4
_WORTH_IT = 1 << 20  # bytes; finding the mappings reads the whole of smaps, which can take 0.1 s


def release(module: nn.Module) -> None:
    """Release the memory of weights that are mapped from a file; the next access reads them again.

    Args:
        module (`nn.Module`): Releases its parameters and buffers, except those in ordinary memory and those in a
            mapping that was written to since it was loaded. A module of less than 1 MiB is left alone.
    """
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())
        for tensor in (*module.parameters(), *module.buffers())
        if tensor.device.type == "cpu" and tensor.numel() and tensor.is_contiguous() and not tensor.is_meta
    )
    if sum(end - start for start, end in spans) < _WORTH_IT:
        return
    mapped = file_mappings()
    page = mmap.PAGESIZE
    for start, end in spans:
        start, end = -(-start // page) * page, end // page * page  # whole pages inside the tensor only
        if start < end and any(low <= start and end <= high for low, high in mapped):
            _madvise(start, end - start)


def file_mappings() -> list[tuple[int, int]]:
    """Start and end addresses of the weight files that are mapped into this process and unmodified; Linux only.

    Releasing any other memory would wipe its contents.
    """
    if sys.platform != "linux":
        return []
    unchanged: list[tuple[int, int]] = []
    where: tuple[int, int] | None = None
    with open("/proc/self/smaps") as maps:
        for line in maps:
            if line.rstrip("\n").endswith(".safetensors"):
                low, _, high = line.split(" ", 1)[0].partition("-")
                where = int(low, 16), int(high, 16)
            elif where is not None and line.startswith("Anonymous:"):
                if line.split()[1] == "0":  # otherwise a page was written to, and releasing it would undo that
                    unchanged.append(where)
                where = None
    return unchanged


def _madvise(start: int, length: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED)


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
    mapped = file_mappings()
    for value in parameters.values():
        start, end = value.data_ptr(), value.data_ptr() + value.numel() * value.element_size()
        if not any(low <= start and end <= high for low, high in mapped):
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
