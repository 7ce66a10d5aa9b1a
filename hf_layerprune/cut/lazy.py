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
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import str_to_torch_dtype

from .. import families
from ..errors import CheckpointError, boundary, cause_of
from ..families.layout import find_decoder_layers
from ..families.quantization import names_layers
from ..files.shards import shard_names
from ..layer_ranges import name_layers
from ..runtime.loading import check_complete, check_config_of, is_hub_id, resolve_base
from ..runtime.model_class import auto_class_of, model_class_of
from .base import Base
from .check import warn_if_unproven
from .folder import check_index, find_weights, read_json
from .memory import kept_slices, rehearse
from .plan import new_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Attribute of a model that was loaded pruned: the number of parameters in its dropped layers.
SAVED = "_layer_drop_saved"

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_OURS = ("state_dict", "key_mapping", "gguf_file", "output_loading_info", "adapter_kwargs")


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
            `attn_implementation`, `quantization_config` (by the names in the base), `revision`, `token`,
            `trust_remote_code`, ...

    Returns:
        `PreTrainedModel`: The pruned model, in evaluation mode.

    Raises:
        CheckpointError: The model does not exist, has no safetensors weights, or they don't fit its config.
        CutError: These layers can't be dropped. No weights were read or downloaded.
        UnsupportedModelError: The architecture is not proven to survive a cut.
    """
    kwargs = dict(from_pretrained_kwargs)
    if ours := [name for name in _OURS if kwargs.get(name)]:
        raise CheckpointError(f"{ours[0]} can't be passed when {base} is loaded cut; load it whole, then prune it")
    # Only safetensors are read, and weights of another shape are always refused.
    for name in (*_OURS, "use_safetensors", "ignore_mismatched_sizes"):
        kwargs.pop(name, None)
    variant, disable_mmap = kwargs.pop("variant", None), kwargs.pop("disable_mmap", None)
    hub = {name: kwargs.pop(name, None) for name in _HUB}
    source, hub = _find(base, {name: value for name, value in hub.items() if value is not None})

    whole, kwargs = _load_config(source, hub, kwargs)
    model_class, config = _model_class(source, hub, whole, kwargs)
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
        saved, _ = rehearse(model_class, config, pruned, cut)
        warn_if_unproven(config)

    with ExitStack() as stack:
        state = _open_slices(source, config, cut, variant, stack, disable_mmap)
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
    if not kwargs.get("trust_remote_code"):  # the base's own code is neither used nor saved with the model
        vars(model.config).pop("auto_map", None)

    model.name_or_path = model.config.name_or_path = source.name
    model.config._commit_hash = source.repo.commit if source.repo else None
    if saved is not None:
        setattr(model, SAVED, saved)
        logger.info("loaded %s without %s of %d", base, name_layers(cut.drop), n)
    # Without a name, `from_pretrained` has loaded no generation settings.
    if kwargs.get("generation_config") is None and model.can_generate() and hasattr(model, "adjust_generation_fn"):
        unset = dict.fromkeys(_HUB) | {"force_download": False, "local_files_only": False, "subfolder": ""}
        trust = kwargs.get("trust_remote_code", False)
        model.adjust_generation_fn(None, True, None, source.name, **unset | hub, trust_remote_code=trust)
    return model


# --- the base's files -----------------------------------------------------------------------------------


def _find(base: str | Path, hub: dict[str, Any]) -> tuple[Base, dict[str, Any]]:
    """The files of a base, and the arguments with which `from_pretrained` finds the same ones."""
    name, gguf_file = resolve_base(base)
    if gguf_file is not None:
        raise CheckpointError(f"{base} is a GGUF file, which is not loaded cut; load it whole, then prune it")
    if not is_hub_id(name):
        return Base.open(Path(name)), {}
    where = {key: hub[key] for key in ("token", "cache_dir", "local_files_only", "force_download") if key in hub}
    files = Base.open(name, hub.get("revision"), **where)
    # Everything else must come from the same commit, and nothing is downloaded twice.
    return files, hub | {"revision": files.repo.commit if files.repo else None, "force_download": False}


def _load_config(source: Base, hub: dict[str, Any], kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The base's config and the remaining keyword arguments, divided as the auto classes divide them."""
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", dtype)
    explicit = {"dtype": dtype, "quantization_config": kwargs.pop("quantization_config", None)}
    trust = explicit["trust_remote_code"] = kwargs.pop("trust_remote_code", False)
    code_revision = kwargs.pop("code_revision", None)
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        check_config_of(str(config or source.name), trust_remote_code=trust, **hub)
        with boundary(f"no model config at {source.name}"):
            config, kwargs = AutoConfig.from_pretrained(
                config or source.name,
                return_unused_kwargs=True,
                trust_remote_code=trust,
                code_revision=code_revision,
                **hub,
                **kwargs,
            )
    kwargs |= {name: value for name, value in explicit.items() if value is not None}
    return copy.deepcopy(config), kwargs


def _model_class(
    source: Base, hub: dict[str, Any], config: PreTrainedConfig, kwargs: dict[str, Any]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that the auto class would choose, and the part of the config that it takes."""
    reference = (getattr(config, "auto_map", None) or {}).get(auto_class_of(config).__name__)
    if reference and kwargs.get("trust_remote_code"):
        return get_class_from_dynamic_module(reference, source.name, **hub), config
    picked = model_class_of(config)
    if picked is None:
        families.check_supported(config)
        raise CheckpointError(
            f"{source.name} has a {type(config).__name__}, which does not belong to a model with a language decoder; choose another model"
        )
    return picked


# --- the tensors to keep --------------------------------------------------------------------------------


def _open_slices(
    source: Base,
    config: PreTrainedConfig,
    cut: families.Cut,
    variant: str | None,
    stack: ExitStack,
    disable_mmap: bool | None,
) -> dict[str, Any]:
    """Lazy slices of all tensors to keep, by their names in the pruned model."""
    # On Windows a mapping reserves memory for the whole file; on a Mac it can't be moved to the GPU.
    backend = "pread" if disable_mmap or sys.platform in ("win32", "darwin") else "mmap"
    opened: dict[str, Any] = {}

    def handle(filename: str) -> Any:
        if filename not in opened:
            path = source.folder / filename
            if not path.is_file():
                raise CheckpointError(
                    f"{source.name} has no {filename}, which holds weights to keep; download the checkpoint again"
                )
            try:
                opened[filename] = stack.enter_context(safe_open(path, framework="pt", backend=backend))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} can't be read as safetensors: {cause_of(error)}") from error
            if names_layers(opened[filename].metadata() or {}):  # lost when weights are passed on without their file
                raise CheckpointError(
                    f"{source.name} notes in its weight files how its tensors are packed, as torchao does, and is not "
                    "loaded cut; cut it on disk (hf-layerprune prune, without --adapter), or load it whole, then prune it"
                )
        return opened[filename]

    files = _tensor_files(source, config, variant, handle)
    names, _ = new_names(files, config, cut)
    needed = {files[name] for name in names}
    source.fetch(needed)
    mapped = {name: file for name, file in files.items() if file in needed}
    check_index(mapped, {file: handle(file).keys() for file in sorted(needed)}, f"the index of {source.name}")
    wide = families.wide_tensors(config)
    state: dict[str, Any] = {}
    for name, new_name in names.items():
        state[new_name] = piece = handle(files[name]).get_slice(name)
        for tensor, width in wide:
            if f".{name}".endswith(f".{tensor.suffix}"):
                state[new_name] = kept_slices(name, piece, piece.get_shape(), tensor.dim, width, cut)
    return state


def _tensor_files(
    source: Base, config: PreTrainedConfig, variant: str | None, handle: Callable[[str], Any]
) -> dict[str, str]:
    """The file of each tensor, from the index or, for a single file, from its header."""
    name = find_weights(source.names, source.name, variant, getattr(config, "transformers_weights", None))
    if not name.endswith(".json"):
        source.fetch([name])
        return dict.fromkeys(handle(name).keys(), name)
    index = read_json(source.get(name))
    shard_names(index, f"{source.name}/{name}")
    return index["weight_map"]


def _first_float_dtype(pieces: Iterable[Any]) -> torch.dtype:
    """The meaning of `dtype="auto"` if the config names none: the first floating-point dtype in the checkpoint."""
    dtypes = [getattr(one, "dtype", None) or str_to_torch_dtype.get(one.get_dtype(), torch.uint8) for one in pieces]
    usable = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return next((dtype for dtype in dtypes if dtype in usable), torch.float32)
