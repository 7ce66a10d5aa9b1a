"""Load a model already cut, reading only the weights of the layers that stay.

The config alone says what remains. So the config is cut first, the tensors are planned by name from the
headers, and transformers' own loader builds the small model and fills it from a state dict of safetensors
slices under their new names: it reads a slice when it needs it, and the slices of dropped layers are not there.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_utils import str_to_torch_dtype
from transformers.models.auto.auto_factory import _get_model_class
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .. import families
from ..errors import CheckpointError, boundary
from ..families.layout import find_decoder_layers, find_layer_prefix
from ..runtime.loading import check_complete, check_config_of, first_line, resolve_base
from ..versions import resolve_commit
from .check import tell_if_presumed
from .memory import rehearse

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The attribute of a model loaded cut that says how many parameters its dropped layers have.
SAVED = "_layer_drop_saved"
# And the one that says where its parameters are mapped from, see `mapped.copy_by_mapping`.
SOURCES = "_layer_drop_sources"

_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_OURS = ("state_dict", "key_mapping", "gguf_file", "output_loading_info", "adapter_kwargs")


def load_pruned(
    base: str | Path,
    drop_layers: Sequence[int] | Callable[[PreTrainedConfig], Sequence[int]],
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model without some of its decoder layers, whose weights are never read.

    Args:
        base (`str` or `Path`): A folder, or a Hub id, with safetensors weights. Of a sharded checkpoint on the Hub,
            only the shards that hold a tensor that stays are downloaded.
        drop_layers (`Sequence[int]` or `Callable`): Base indices of the layers to drop, or a function that picks them
            from the model's config; where the function picks none, the model is loaded whole.
        from_pretrained_kwargs: What `from_pretrained` takes: `dtype`, `device_map` (by the names in the pruned model),
            `attn_implementation`, `quantization_config`, `revision`, `token`, `trust_remote_code`, ...

    Returns:
        `PreTrainedModel`: The pruned model, in evaluation mode.

    Raises:
        CheckpointError: There is no such model, it has no safetensors weights, or they don't fit its config.
        CutError: These layers can't be dropped. No weight was read, and none downloaded.
        UnsupportedModelError: The architecture is not one that is proven to survive a cut.
    """
    kwargs = dict(from_pretrained_kwargs)
    if ours := [name for name in _OURS if kwargs.get(name)]:
        raise CheckpointError(f"{ours[0]} can't be passed when {base} is loaded cut; load it whole, then prune it")
    for name in (*_OURS, "use_safetensors"):  # nothing but safetensors is read
        kwargs.pop(name, None)
    variant, disable_mmap = kwargs.pop("variant", None), kwargs.pop("disable_mmap", None)
    hub = {name: kwargs.pop(name, None) for name in _HUB}
    source = _Source.of(base, {name: value for name, value in hub.items() if value is not None})

    whole, kwargs = _load_config(source, kwargs)
    model_class, config = _model_class(source, whole, kwargs)
    dropped = drop_layers(config) if callable(drop_layers) else drop_layers
    n, saved = families.layer_count(config), None
    if callable(drop_layers) and not dropped:
        cut, pruned = families.Cut(tuple(range(n)), n), config
    else:
        cut = families.make_cut(config, dropped)
        pruned = families.cut_config(config, cut)
        # Refuses, before any weight is read, whatever the cut of a live model would.
        saved = rehearse(model_class, config, pruned, cut).saved
        tell_if_presumed(config)

    with ExitStack() as stack:
        state, origins = _open_slices(source, config, cut, variant, stack, disable_mmap)
        if kwargs.get("dtype", "auto") == "auto" and pruned.dtype is None:
            kwargs["dtype"] = _first_float_dtype(state.values())
        if is_deepspeed_zero3_enabled():  # its loader scatters tensors, and takes no slices
            state = {name: piece[...] for name, piece in state.items()}
        with boundary(f"can't load {base} cut"):
            model, info = model_class.from_pretrained(
                None, config=pruned, state_dict=state, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    # Of a larger model, of which only the text part was asked for, the other parts' weights are left over.
    within = find_decoder_layers(model).path + "." if config is not whole else ""
    check_complete(source.name, info, within=within, remark="names in the pruned model")

    setattr(model, SOURCES, origins)
    model.name_or_path = model.config.name_or_path = source.name
    model.config._commit_hash = source.commit
    if saved is not None:
        setattr(model, SAVED, saved)
        logger.info("loaded %s without layers %s of %d", base, list(cut.drop), n)
    if kwargs.get("generation_config") is None and model.can_generate() and hasattr(model, "adjust_generation_fn"):
        unset = dict.fromkeys(_HUB) | {"force_download": False, "local_files_only": False, "subfolder": ""}
        trust = kwargs.get("trust_remote_code", False)
        model.adjust_generation_fn(None, True, None, source.name, **unset | source.hub, trust_remote_code=trust)
    return model


# --- the base's files -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the files of a base are: a folder or a Hub repository, at one commit."""

    name: str
    hub: dict[str, Any]
    commit: str | None

    @classmethod
    def of(cls, base: str | Path, hub: dict[str, Any]) -> _Source:
        if Path(base).expanduser().is_dir() and hub.get("subfolder"):
            base = Path(base, hub.pop("subfolder"))
        name, gguf_file = resolve_base(base)
        if gguf_file is not None:
            raise CheckpointError(f"{base} is a GGUF file, which is not loaded cut; load it whole, then prune it")
        lookup = {key: hub[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in hub}
        commit = resolve_commit(name, **lookup)
        return cls(name, hub if commit is None else hub | {"revision": commit}, commit)

    def find(self, filename: str) -> str | None:
        """Path of a file, downloaded if need be, or `None` where the base has none of this name."""
        try:
            return cached_file(self.name, filename, _raise_exceptions_for_missing_entries=False, **self.hub)
        except OSError as error:
            raise CheckpointError(f"can't get {filename} of {self.name}: {first_line(error)}") from error


def _load_config(source: _Source, kwargs: dict[str, Any]) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The base's config, and what is left of the keyword arguments, shared out as the auto classes do it."""
    dtype = kwargs.pop("torch_dtype", None)
    dtype = kwargs.pop("dtype", dtype)
    explicit = {"dtype": dtype, "quantization_config": kwargs.pop("quantization_config", None)}
    trust = explicit["trust_remote_code"] = kwargs.pop("trust_remote_code", False)
    code_revision = kwargs.pop("code_revision", None)
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        check_config_of(str(config or source.name), trust_remote_code=trust, **source.hub)
        with boundary(f"no model config at {source.name}"):
            config, kwargs = AutoConfig.from_pretrained(
                config or source.name,
                return_unused_kwargs=True,
                trust_remote_code=trust,
                code_revision=code_revision,
                **source.hub,
                **kwargs,
            )
    kwargs |= {name: value for name, value in explicit.items() if value is not None}
    return copy.deepcopy(config), kwargs


def _model_class(
    source: _Source, config: PreTrainedConfig, kwargs: dict[str, Any]
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that `AutoModelForCausalLM` would pick, and the part of the config that it takes."""
    mapping = AutoModelForCausalLM._model_mapping
    reference = (getattr(config, "auto_map", None) or {}).get(AutoModelForCausalLM.__name__)
    if reference and kwargs.get("trust_remote_code"):
        hub = {key: value for key, value in source.hub.items() if key != "subfolder"}
        return get_class_from_dynamic_module(reference, source.name, **hub), config
    if type(config) not in mapping:
        # The text part of a larger model, saved alone, may have no auto class; its config names its own.
        own = getattr(transformers, (config.architectures or [""])[0], None)
        if getattr(own, "config_class", None) is type(config):
            return own, config
        families.check_supported(config)
        raise CheckpointError(
            f"{source.name} has a {type(config).__name__}, which belongs to no causal language model"
        )
    model_class = _get_model_class(config, mapping)
    text_class = config.sub_configs.get("text_config")
    if text_class is None or getattr(model_class, "config_class", None) is not text_class:
        return model_class, config
    part = config.get_text_config()
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        part.quantization_config = quantization
    return model_class, part


# --- the tensors that stay ------------------------------------------------------------------------------


def _open_slices(
    source: _Source,
    config: PreTrainedConfig,
    cut: families.Cut,
    variant: str | None,
    stack: ExitStack,
    disable_mmap: bool | None,
) -> tuple[dict[str, Any], dict[str, tuple[Path, str]]]:
    """All tensors that stay, by their names in the pruned model, none of them read yet; and where each is stored."""
    # A mapping reserves memory for whole files on Windows, and can't be moved to a Mac's GPU.
    backend = "pread" if disable_mmap or sys.platform in ("win32", "darwin") else "mmap"
    opened: dict[str, Any] = {}
    paths: dict[str, Path] = {}

    def handle(filename: str) -> Any:
        if filename not in opened:
            path = source.find(filename)
            if path is None:
                raise CheckpointError(f"{source.name} has no {filename}, which holds weights that stay")
            paths[filename] = Path(path)
            try:
                opened[filename] = stack.enter_context(safe_open(path, framework="pt", backend=backend))
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{path} can't be read as safetensors: {first_line(error)}") from error
        return opened[filename]

    files = _tensor_files(source, config, variant, handle)
    wide = families.wide_tensors(config)
    state: dict[str, Any] = {}
    origins: dict[str, tuple[Path, str]] = {}
    for name, new_name in _kept_names(files, cut).items():
        try:
            piece = handle(files[name]).get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{files[name]} of {source.name} has no {name}, though the index says so; "
                "the checkpoint is incomplete, download it again"
            ) from error
        for tensor, width in wide:
            if f".{name}".endswith(f".{tensor.suffix}"):
                piece = _WideSlice(name, piece, tensor.dim, width, cut)
        state[new_name] = piece
        if backend == "mmap" and not isinstance(piece, _WideSlice):
            origins[new_name] = (paths[files[name]], name)
    return state, origins


def _tensor_files(
    source: _Source, config: PreTrainedConfig, variant: str | None, handle: Callable[[str], Any]
) -> dict[str, str]:
    """Which file holds which tensor, from the index, or else from the header of the only file."""
    names = [_with_variant(name, variant) for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)]
    names = [explicit] if (explicit := getattr(config, "transformers_weights", None)) else names
    for name in names:
        _check_inside(source, name)
        path = source.find(name)
        if path is None:
            continue
        if not name.endswith(".json"):
            return dict.fromkeys(handle(name).keys(), name)
        try:
            files = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
            shards = set(files.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no index of weights: {first_line(error)}; download it again") from error
        for shard in shards:
            _check_inside(source, shard)
        return files
    pickles = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if os.path.isfile(os.path.join(source.name, name))]
    raise CheckpointError(
        f"{source.name} has no {' and no '.join(names)}"
        + (f", only {pickles[0]}, and pickled weights are not read" if pickles else "")
        + "; convert it with from_pretrained(...).save_pretrained(...), or name a base with safetensors weights"
    )


def _with_variant(filename: str, variant: str | None) -> str:
    stem, _, extension = filename.rpartition(".")
    return f"{stem}.{variant}.{extension}" if variant else filename


def _check_inside(source: _Source, filename: Any) -> None:
    path = PurePosixPath(filename) if isinstance(filename, str) else None
    if path is None or path.is_absolute() or ".." in path.parts or path.suffix not in (".safetensors", ".json"):
        raise CheckpointError(
            f"{source.name} names {filename!r} as a file with weights; it must be a .safetensors file beside the config"
        )


def _kept_names(names: Iterable[str], cut: families.Cut) -> dict[str, str]:
    """The names of all tensors that stay, with their names in the pruned model."""
    names = list(names)
    prefix = find_layer_prefix(names, cut.num_layers)
    kept: dict[str, str] = {}
    for name in names:
        index, _, rest = name.removeprefix(prefix).partition(".")
        if not name.startswith(prefix) or not index.isdecimal():
            kept[name] = name
        elif int(index) in cut.new_index:
            kept[name] = f"{prefix}{cut.new_index[int(index)]}.{rest}"
        # The rest goes: dropped layers, and those behind the last one, which draft further tokens.
    return kept


class _WideSlice:
    """A view, read when it is indexed, of a tensor that holds a piece a layer: the pieces of the kept layers."""

    def __init__(self, name: str, piece: Any, dim: int, width: int, cut: families.Cut) -> None:
        self._piece, self._dim = piece, dim
        self._shape = list(piece.get_shape())
        if self._shape[dim] != width * cut.num_layers:
            raise CheckpointError(f"{name} is {tuple(self._shape)}, not {cut.num_layers} layers of {width} wide")
        self._shape[dim] = width * len(cut.keep)
        runs: list[list[int]] = []
        for i in cut.keep:
            if runs and runs[-1][1] == i * width:
                runs[-1][1] += width
            else:
                runs.append([i * width, (i + 1) * width])
        self._runs = runs

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return self._piece.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        before = (slice(None),) * self._dim
        return torch.cat([self._piece[(*before, slice(*run))] for run in self._runs], dim=self._dim)[index]


def _first_float_dtype(pieces: Iterable[Any]) -> torch.dtype:
    """What `dtype="auto"` means where the config names none: the first dtype that a model can be built in."""
    dtypes = [str_to_torch_dtype.get(piece.get_dtype(), torch.uint8) for piece in pieces]
    usable = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    return next((dtype for dtype in dtypes if dtype in usable), torch.float32)
