"""Load a model that may be larger than memory, with the weights of its layers mapped from files.

`from_pretrained` maps the weights of most models from their files, and the system drops them from memory again when it
runs short. Weights that it converts are in memory as a whole: experts that are stored one by one and joined on loading,
and weights of another data type. But it can also [write converted layers to
disk](https://huggingface.co/docs/accelerate/usage_guides/big_modeling), from where they are mapped here.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import boundary
from ..families.layout import find_decoder_layers
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
    ends; only a process that is killed while it writes leaves the folder behind. GGUF files, quantised models,
    and all models on Windows and macOS are loaded as [`load_base`] does.

    Args:
        base (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: As for [`load_base`], but no `device_map`.

    Raises:
        CheckpointError: It can't be loaded, or its converted layers can't be written.
    """
    from huggingface_hub.constants import HF_HOME

    # On Windows a mapped file can't be deleted; on a Mac a mapped weight can't be moved to the GPU.
    if sys.platform != "linux" or resolve_base(base)[1] is not None:
        return load_base(base, **kwargs)
    config = load_config(base, **{name: kwargs[name] for name in LOCATION_ARGUMENTS if name in kwargs})
    if hasattr(config, "quantization_config") or kwargs.get("quantization_config") is not None:
        return load_base(base, **kwargs)
    dtype = kwargs.get("dtype", "auto")
    empty = model_without_weights(config, **({} if dtype == "auto" else {"dtype": dtype}))
    size = empty.get_memory_footprint(return_buffers=False)
    if size <= free_bytes(torch.device("cpu")) // 2:
        return load_base(base, **kwargs)
    logger.info(
        "%s takes %s, more than half of the free memory: its layers stay on disk, in %s if they have to be converted",
        base, format_bytes(size), HF_HOME,
    )  # fmt: skip
    with boundary(f"can't keep the layers of {base} on disk", "set HF_HOME to a folder that can be written"):
        Path(HF_HOME).mkdir(parents=True, exist_ok=True)
        folder = TemporaryDirectory(prefix="hf_layerprune-", dir=HF_HOME)
    with folder:  # mapped files remain readable once they are deleted
        model = load_base(base, device_map=_layers_on_disk(empty), offload_folder=folder.name, **kwargs)
        _map_layers(model)
    return model


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


def _map_layers(model: PreTrainedModel) -> None:
    """Replace accelerate's hooks, which read a layer whenever it runs, by weights mapped from the same files."""
    from accelerate.hooks import remove_hook_from_module

    hooked: list[tuple[nn.Module, Any]] = [
        (module, module._hf_hook) for module in model.modules() if hasattr(module, "_hf_hook")
    ]
    for module, hook in hooked:
        for name, weight in list(module.named_parameters(recurse=False)):
            if weight.is_meta:
                module.register_parameter(name, nn.Parameter(hook.weights_map[name], weight.requires_grad))
        remove_hook_from_module(module)
        del module.forward  # which is its class's again
    del model.hf_device_map
