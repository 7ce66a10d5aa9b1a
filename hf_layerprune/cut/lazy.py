"""Load a pruned model directly, reading only the weights of the layers to keep.

The config is cut first and the tensors are selected by name from the headers. transformers' own loader then builds the
small model and fills it from a state dict of lazy safetensors slices under their new names. It reads each slice when it
needs it; slices of dropped layers are not in the state dict.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import str_to_torch_dtype

from .. import families
from ..errors import CheckpointError, boundary
from ..families.layout import find_decoder_layers
from ..families.quantization import names_layers
from ..layer_ranges import describe_layers
from ..runtime.loading import check_complete, is_hub_id, read_checked_config, resolve_base
from ..runtime.model_class import model_class_of
from .base import Base, read_weights
from .check import warn_if_unproven
from .dry_run import dry_run_cut
from .memory import kept_slices
from .plan import new_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Attribute of a model that was loaded pruned: the number of parameters in its dropped layers.
DROPPED_PARAMETERS = "_layer_drop_saved"

_HUB = ("cache_dir", "local_files_only", "revision", "token")
_UNSUPPORTED = (
    "state_dict", "key_mapping", "gguf_file", "output_loading_info", "adapter_kwargs", "trust_remote_code", "code_revision",
    "variant", "disable_mmap", "force_download", "proxies",
)  # fmt: skip


def load_pruned(
    base: str | Path,
    drop_layers: Sequence[int] | Callable[[PreTrainedConfig], Sequence[int]],
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model without some of its decoder layers. The weights of these are never read.

    Args:
        base (`str` or `Path`): A folder, or a Hub id, with safetensors weights. From a sharded checkpoint on the
            Hub, only shards with tensors to keep are downloaded.
        drop_layers (`Sequence[int]` or `Callable`): Base indices of the layers to drop, or a function that chooses
            them from the model's config. If it returns none, the whole model is loaded.
        from_pretrained_kwargs: Passed on to `from_pretrained`: `dtype`, `device_map` (by the names in the pruned model),
            `attn_implementation`, `quantization_config` (by the names in the base), `revision`, `token`, ...

    Returns:
        `PreTrainedModel`: The pruned model, in evaluation mode.

    Raises:
        CheckpointError: The model does not exist, has no safetensors weights, or they don't fit its config.
        CutError: These layers can't be dropped. No weights were read or downloaded.
        UnsupportedModelError: The architecture is not proven to survive a cut.
    """
    kwargs = dict(from_pretrained_kwargs)
    if passed := [name for name in _UNSUPPORTED if kwargs.get(name)]:
        raise CheckpointError(f"{passed[0]} can't be passed when {base} is loaded cut; load it whole, then prune it")
    # Only safetensors are read, and weights of another shape are always refused.
    for name in (*_UNSUPPORTED, "use_safetensors", "ignore_mismatched_sizes"):
        kwargs.pop(name, None)
    hub = {name: kwargs.pop(name, None) for name in _HUB}
    source, hub = _locate_base(base, {name: value for name, value in hub.items() if value is not None})

    whole, kwargs = _load_config(source, hub, kwargs)
    model_class, config = _model_class(source, whole)
    dropped = drop_layers(config) if callable(drop_layers) else drop_layers
    n, saved = families.layer_count(config), None
    if callable(drop_layers) and not dropped:
        cut, pruned = families.Cut(tuple(range(n)), n), config
    else:
        cut = families.make_cut(config, dropped)
        pruned = families.cut_config(config, cut)
        if (settings := kwargs.get("quantization_config")) is not None:
            kwargs["quantization_config"] = families.cut_quantization(settings, config, cut)
        # Makes the checks of a cut in memory, before any weight is read.
        saved, _ = dry_run_cut(model_class, config, pruned, cut)
        warn_if_unproven(config)

    with ExitStack() as stack:
        state = _open_slices(source, config, cut, stack)
        if kwargs.get("dtype", "auto") == "auto" and pruned.dtype is None:
            kwargs["dtype"] = _first_float_dtype(state.values())
        if is_deepspeed_zero3_enabled():  # its loader scatters whole tensors and does not accept slices
            state = {name: piece[...] for name, piece in state.items()}
        with boundary(f"can't load {base} cut"):
            loaded: Any = model_class.from_pretrained(
                None, config=pruned, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    model, info = loaded
    # If only the text part of a larger model is loaded, the weights of the other parts are not used.
    within = find_decoder_layers(model).path + "." if config is not whole else ""
    check_complete(source.name, info, within=within, remark="names in the pruned model")
    vars(model.config).pop("auto_map", None)  # the base's own code is neither used nor saved with the model

    model.name_or_path = model.config.name_or_path = source.name
    model.config._commit_hash = source.repo.commit if source.repo else None
    if saved is not None:
        setattr(model, DROPPED_PARAMETERS, saved)
        logger.info("loaded %s without %s of %d", base, describe_layers(cut.drop), n)
    # Without a name, `from_pretrained` has loaded no generation settings.
    if kwargs.get("generation_config") is None and model.can_generate() and hasattr(model, "adjust_generation_fn"):
        unset: dict[str, Any] = dict.fromkeys(("cache_dir", "proxies", "revision", "token"))
        unset |= {"force_download": False, "local_files_only": False, "subfolder": ""}
        model.adjust_generation_fn(None, True, None, source.name, **unset | hub, trust_remote_code=False)
    return model


# --- the base's files -----------------------------------------------------------------------------------


def _locate_base(base: str | Path, hub: dict[str, Any]) -> tuple[Base, dict[str, Any]]:
    """The files of a base, and the arguments with which `from_pretrained` finds the same ones."""
    name, gguf_file = resolve_base(base)
    if gguf_file is not None:
        raise CheckpointError(f"{base} is a GGUF file, which is not loaded cut; load it whole, then prune it")
    if not is_hub_id(name):
        return Base.open(Path(name)), {}
    files = Base.open(name, **hub)
    # Everything else must come from the same commit.
    return files, hub | {"revision": files.repo.commit if files.repo else None}


def _load_config(source: Base, hub: dict[str, Any], kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The base's config and the remaining keyword arguments, divided as the auto classes divide them."""
    explicit = {"dtype": kwargs.pop("dtype", None), "quantization_config": kwargs.pop("quantization_config", None)}
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        read_checked_config(str(config or source.name), trust_remote_code=False, **hub)
        with boundary(f"no model config at {source.name}"):
            config, kwargs = AutoConfig.from_pretrained(
                config or source.name, return_unused_kwargs=True, trust_remote_code=False, **hub, **kwargs
            )
    kwargs |= {name: value for name, value in explicit.items() if value is not None}
    return copy.deepcopy(config), kwargs


def _model_class(source: Base, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that the auto class would choose, and the part of the config that it takes."""
    picked = model_class_of(config)
    if picked is None:
        families.check_supported(config)
        raise CheckpointError(
            f"{source.name} has a {type(config).__name__}, which does not belong to a model with a language decoder; choose another model"
        )
    return picked


# --- the tensors to keep --------------------------------------------------------------------------------


def _open_slices(source: Base, config: PreTrainedConfig, cut: families.Cut, stack: ExitStack) -> dict[str, Any]:
    """Lazy slices of all tensors to keep, by their names in the pruned model."""
    # On Windows a mapping reserves memory for the whole file; on a Mac it can't be moved to the GPU.
    backend = "pread" if sys.platform in ("win32", "darwin") else "mmap"
    weights = read_weights(source, lambda names: new_names(names, config, cut)[0])
    names, _ = new_names(weights.tensor_names, config, cut)
    wide = families.wide_tensors(config)
    state: dict[str, Any] = {}
    for header in weights.headers.values():
        if names_layers(header.metadata or {}):  # lost when weights are passed on without their file
            raise CheckpointError(
                f"{source.name} notes in its weight files how its tensors are packed, as torchao does, and is not "
                "loaded cut; cut it on disk (hf-layerprune prune, without --adapter), or load it whole, then prune it"
            )
        file: Any = stack.enter_context(safe_open(header.path, framework="pt", backend=backend))
        for name in header.names:
            if name in names:
                state[names[name]] = piece = file.get_slice(name)
                for tensor, width in wide:
                    if f".{name}".endswith(f".{tensor.suffix}"):
                        state[names[name]] = kept_slices(name, piece, piece.get_shape(), tensor.dim, width, cut)
    return state


def _first_float_dtype(pieces: Iterable[Any]) -> torch.dtype:
    """The meaning of `dtype="auto"` if the config names none: the first floating-point dtype in the checkpoint."""
    dtypes = [getattr(one, "dtype", None) or str_to_torch_dtype.get(one.get_dtype(), torch.uint8) for one in pieces]
    usable = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return next((dtype for dtype in dtypes if dtype in usable), torch.float32)
