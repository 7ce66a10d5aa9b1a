"""Load a model that may be larger than memory, with the weights of its layers mapped from files.

`from_pretrained` maps the weights of most models from their files, and the system drops them from memory again when it
runs short. Weights that it converts are in memory as a whole: experts that are stored one by one and joined on loading,
and weights of another data type. But it can also [leave layers on
disk](https://huggingface.co/docs/accelerate/usage_guides/big_modeling), where it writes joined experts. Those files are
mapped here, and so are weights of another data type, once they are converted and written, too.
"""

from __future__ import annotations

import logging
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError, boundary
from ..families.layout import find_decoder_layers
from ..files.folders import scratch_folder
from ..options import format_bytes
from .loading import LOCATION_ARGUMENTS, load_base, load_config, resolve_base
from .memory import free_bytes
from .model_class import model_without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def load_mapped(base: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a base on the CPU; if it takes more than half of the free memory, with its layers mapped from files.

    Converted layers are written to a folder in `HF_HOME`. It is deleted at once, and the space is free when the process
    ends; what a killed process left there is deleted by the next one. GGUF files, quantised models, and all models on
    Windows and macOS, under FSDP's `cpu_ram_efficient_loading`, or where `HF_HOME` can't be written, are loaded as
    [`load_base`] does.

    Args:
        base (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: As for [`load_base`], but no `device_map`.

    Raises:
        CheckpointError: It can't be loaded, or its converted layers can't be written, as on a full disk.
    """
    from huggingface_hub.constants import HF_HOME
    from transformers.integrations import is_fsdp_enabled

    # On Windows a mapped file can't be deleted; on a Mac a mapped weight can't be moved to the GPU. Where FSDP loads a model
    # once for all processes, transformers leaves no layers on disk.
    if sys.platform != "linux" or is_fsdp_enabled() or resolve_base(base)[1] is not None:
        return load_base(base, **kwargs)
    config = load_config(base, **{name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs})
    if hasattr(config, "quantization_config") or kwargs.get("quantization_config") is not None:
        return load_base(base, **kwargs)
    dtype = kwargs.get("dtype", "auto")
    empty = model_without_weights(config, **({} if dtype == "auto" else {"dtype": dtype}))
    size = empty.get_memory_footprint(return_buffers=False)
    if size <= free_bytes(torch.device("cpu")) // 2:
        return load_base(base, **kwargs)
    large = f"{base} takes {format_bytes(size)}, more than half of the free memory"
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(scratch_folder(Path(HF_HOME)))
        except OSError as error:
            logger.warning(
                "%s, and weights that have to be converted will be in memory as a whole, because %s can't be written (%s); set "
                "HF_HOME to a folder that can be", large, HF_HOME, error.strerror,
            )  # fmt: skip
            return load_base(base, **kwargs)
        free = format_bytes(shutil.disk_usage(folder).free)
        logger.info("%s: its layers stay on disk, in %s (%s free) if they have to be converted", large, HF_HOME, free)
        try:
            model = load_base(base, device_map=_layers_on_disk(empty), offload_folder=str(folder), **kwargs)
        except CheckpointError as error:
            if "serializing" in str(error):  # safetensors', for what it can't write
                raise CheckpointError(f"{error}; free some space in {HF_HOME}") from error
            raise
        _map_layers(model, folder)
    return model  # mapped files remain readable once they are deleted


def _layers_on_disk(model: PreTrainedModel) -> dict[str, str]:
    """A `device_map` with the decoder layers on disk and everything else on the CPU."""
    path = find_decoder_layers(model).path
    places, prefix = {path: "disk"}, ""
    module: nn.Module = model
    for part in path.split("."):
        inside = (*module.named_children(), *module.named_parameters(recurse=False))
        places |= {f"{prefix}{name}": "cpu" for name, _ in inside if name != part}
        prefix, module = f"{prefix}{part}.", module.get_submodule(part)
    return places


def _map_layers(model: PreTrainedModel, folder: Path) -> None:
    """Replace accelerate's hooks, which read a layer whenever it runs, by weights mapped from the same files."""
    from accelerate.hooks import remove_hook_from_module

    hooked: list[tuple[str, nn.Module, Any]] = [
        (path, module, module._hf_hook) for path, module in model.named_modules() if hasattr(module, "_hf_hook")
    ]
    for path, module, hook in hooked:
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                file = hook.weights_map.dataset.index[f"{path}.{name}"]
                mapped = _map(file["safetensors_file"], file["weight_name"], weight.dtype, folder)
                module.register_parameter(name, nn.Parameter(mapped, weight.requires_grad))
        remove_hook_from_module(module)
        del module.forward  # which is its class's again
    del model.hf_device_map


def _map(file: str | Path, name: str, dtype: torch.dtype, folder: Path) -> torch.Tensor:
    """Map a tensor from a file, or from a new one in the folder if the file has it in another type."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(file, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    if tensor.dtype == dtype:
        return tensor
    converted = folder / f"{len(list(folder.iterdir()))}.safetensors"
    with boundary(f"can't write converted weights to {folder.parent}", "free some space there"):
        save_file({name: tensor.to(dtype)}, converted)
    return _map(converted, name, dtype, folder)
