"""What a cut leaves: parameters, bytes of the weight files, and memory with a key-value cache. Nothing is loaded.

    sizes = Sizes(config, "org/base")
    sizes.parameters([12, 13]), sizes.file_bytes([12, 13]), sizes.memory_bytes([12, 13], context=8192, batch=1)

Parameters are counted on a model without weights, and bytes follow from the headers of the weight files, which are all
that is fetched of a base on the Hub. The cache is that of a model without weights, filled by its own forward pass: the
shapes are the library's own, whatever the attention (grouped heads, sliding windows, latent attention, state spaces).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import str_to_torch_dtype

from .. import families
from ..errors import CutError, boundary, cause_of
from ..families.layout import (
    count_by_layer,
    count_parameters,
    find_decoder_layers,
    text_model,
    ties_head,
)
from ..records.names import is_gguf_name
from ..runtime.loading import UNPACKED_DTYPE, is_hub_id
from ..runtime.model_class import layer_prefix_of, model_without_weights
from ..runtime.parts import cache_of
from ..runtime.windows import resolve_length
from .base import Base, Weights, read_headers
from .header import FLOATS, Tensor, write_header
from .plan import WeightsPlan, plan_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_CONTEXT = 4096
_STORED_NAMES = {dtype: name for name, dtype in str_to_torch_dtype.items()}


class Sizes:
    """The sizes of a model without some of its layers.

    Args:
        config (`PreTrainedConfig`): The base's config.
        base (`str`, *optional*): Its folder or Hub id. Without safetensors files, bytes are those that saving the
            model would write.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.
        dtype (`str`, defaults to `"auto"`): The type of weights and cache; `auto` is the base's.
        untie (`bool`, defaults to `False`): Whether the head gets its own matrix where it is tied to the embeddings.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        base: str | None = None,
        *,
        revision: str | None = None,
        dtype: str = "auto",
        untie: bool = False,
    ) -> None:
        self.config = copy.deepcopy(config)  # a model that computes in another type says so in its own
        self._base, self._revision, self._dtype, self._untie = base, revision, dtype, untie
        self.num_layers = families.layer_count(config)
        self._models: dict[tuple[int, ...], PreTrainedModel] = {}

    def parameters(self, drop: Sequence[int] = ()) -> int:
        """Parameters that are left without some layers, a shared one counted once.

        Raises:
            CutError: These layers can't be dropped from this model.
        """
        model = self._empty_model(drop)
        return count_parameters(model) + self._head_elements

    def file_bytes(self, drop: Sequence[int] = ()) -> int:
        """Bytes of the safetensors files that are left: headers and tensors.

        They are the files that `cut.disk` writes or, for another data type or a base without safetensors files, the one that
        `save_pretrained` would write.

        Raises:
            CheckpointError: The headers can't be read, or do not fit the config.
            CutError: These layers can't be dropped from this model.
        """
        if self._weights is None or self._dtype != "auto":
            return self._saved_bytes(drop)
        files = self._plan_weights(drop).shards if drop else self._weights.headers.values()
        return sum(file.size for file in files) + self._head_elements * self.dtype.itemsize

    def weight_bytes(self, drop: Sequence[int] = ()) -> int:
        """Bytes of the tensors that are left, without headers."""
        if self._weights is None:
            return self.parameters(drop) * self.dtype.itemsize
        kept = sum(self._kept_bytes(tensor, elements) for tensor, elements in self._kept_tensors(drop))
        return kept + self._head_elements * self.dtype.itemsize

    def memory_bytes(self, drop: Sequence[int] = (), *, context: int | None = None, batch: int = 1) -> int:
        """Bytes of the weights that are left, and of a full key-value cache for `batch` sequences.

        The context is 4096 tokens by default, or what the model has room for.

        Raises:
            CutError: The context is too long for the model, or its cache is not known without running it.
        """
        return self.weight_bytes(drop) + sum(self._cache_bytes(drop, self.resolve_context(context), batch))

    def per_layer(self, what: str, *, context: int | None = None, batch: int = 1) -> list[float]:
        """What each layer adds to a size (`"params"`, `"size"` or `"memory"`), without what it shares with others."""
        layers = count_by_layer(find_decoder_layers(self._empty_model(())).layers)
        if what == "params":
            return [float(count) for count in layers]
        sizes = [float(count * self.dtype.itemsize) for count in layers]
        if self._weights is not None:
            prefix, sizes = layer_prefix_of(self._weights.tensor_names, self.config), [0.0] * self.num_layers
            for tensor, _ in self._kept_tensors(()):
                index = tensor.name.removeprefix(prefix).partition(".")[0]
                if tensor.name.startswith(prefix) and index.isdecimal() and int(index) < self.num_layers:
                    sizes[int(index)] += self._kept_bytes(tensor, tensor.elements)
        if what == "memory":
            cache: list[float] = [*self._cache_bytes((), self.resolve_context(context), batch)]
            if len(cache) != self.num_layers:
                cache = [sum(cache) / self.num_layers] * self.num_layers
            sizes = [size + more for size, more in zip(sizes, cache, strict=True)]
        return sizes

    def resolve_context(self, requested: int | None, default: int = _CONTEXT) -> int:
        """The number of tokens in the cache: as requested, or the default, unless the model's context is shorter.

        Raises:
            CutError: More is requested than the model's context.
        """
        return resolve_length(self.config, requested, default, "context")

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        kept = getattr(self.config, "dtype", None) or getattr(families.text_config(self.config), "dtype", None)
        kept = kept or (UNPACKED_DTYPE if is_gguf_name(self._base or "") else "float32")
        name = self._dtype if self._dtype != "auto" else str(kept).removeprefix("torch.")
        return getattr(torch, name)

    # --- internals ---------------------------------------------------------------------------------------

    @cached_property
    def _weights(self) -> Weights | None:
        base = self._base
        if not base or not (is_hub_id(base) or Path(base).expanduser().is_dir()):
            return None
        return read_headers(Base.open(base, self._revision))

    def _kept_tensors(self, drop: Sequence[int]) -> list[tuple[Tensor, int]]:
        """The tensors that are kept, each with how many of its elements."""
        assert self._weights is not None
        tensors = [tensor for header in self._weights.headers.values() for tensor in header.tensors]
        if not drop:
            return [(tensor, tensor.elements) for tensor in tensors]
        plan = self._plan_weights(drop)
        names = plan.tensor_names
        return [(tensor, plan.tensors[names[tensor.name]].elements) for tensor in tensors if tensor.name in names]

    def _kept_bytes(self, tensor: Tensor, elements: int) -> int:
        if self._dtype != "auto" and tensor.dtype in FLOATS:
            return elements * self.dtype.itemsize
        if self._dtype != "auto" and getattr(self.config, "quantization_config", None) is not None:
            raise CutError(
                f"the base is quantised (it has {tensor.dtype} tensors), so its size as {self._dtype} can't be computed; leave "
                'the data type at auto (target_dtype="auto", dtype="auto")'
            )
        return tensor.size * elements // max(1, tensor.elements)

    def _saved_bytes(self, drop: Sequence[int]) -> int:
        """Bytes of the file that saving the model would write: some classes keep some tensors in float32."""
        model = self._empty_model(drop)
        tied = () if self._untie else model.all_tied_weights_keys
        state = revert_weight_conversion(model, {k: v for k, v in model.state_dict().items() if k not in tied})
        placed: list[Tensor] = []
        end = 0
        for name, tensor in sorted(state.items(), key=lambda item: (-item[1].itemsize, item[0])):
            start, end = end, end + tensor.nbytes
            placed.append(Tensor(name, _STORED_NAMES[tensor.dtype], tuple(tensor.shape), start, end))
        return len(write_header(placed, {"format": "pt"})) + end

    def _plan_weights(self, drop: Sequence[int]) -> WeightsPlan:
        assert self._weights is not None
        return plan_weights(self._weights, self.config, families.make_cut(self.config, drop))

    @cached_property
    def _head_elements(self) -> int:
        """Elements that untying the head adds."""
        model = self._empty_model(())
        return count_parameters(model.get_input_embeddings()) if self._untie and ties_head(model) else 0

    def _empty_model(self, drop: Sequence[int]) -> PreTrainedModel:
        """The model without weights."""
        key = tuple(sorted(drop))
        if key not in self._models:
            config = families.cut_config(self.config, families.make_cut(self.config, key)) if key else self.config
            self._models = {k: v for k, v in self._models.items() if not k} | {key: _build_empty(config, self.dtype)}
        return self._models[key]

    def _cache_bytes(self, drop: Sequence[int], context: int, batch: int) -> list[int]:
        """Bytes of the cache, by its layers."""
        model = self._empty_model(drop)
        set_experts: Any = getattr(model, "set_experts_implementation", None)
        try:
            if set_experts is not None:
                set_experts("batched_mm")  # the kernel whose shapes don't depend on the data
            if model._is_stateful:  # long texts are scanned token by token, for minutes, but states don't grow
                few, more = (_filled_bytes(model, min(tokens, context), batch) for tokens in (4, 5))
                if few == more:
                    return few
            return _filled_bytes(model, context, batch)
        except Exception as error:
            raise CutError(
                f"the key-value cache of a {families.text_config(self.config).model_type} model is not known without "
                f"running it ({cause_of(error)[:120]}); use target_size or drop=N instead of target_memory"
            ) from error


def _filled_bytes(model: PreTrainedModel, context: int, batch: int) -> list[int]:
    """Bytes of the cache of a model without weights behind so many tokens, by its layers."""
    ids = torch.ones(batch, context, dtype=torch.long, device="meta")
    with torch.no_grad():
        # Without the code that looks for the places of images in a text, since there are no real tokens.
        cache = cache_of(text_model(model)(input_ids=ids, use_cache=True))
    if cache is None and any(
        isinstance(value, torch.Tensor) for part in model.modules() for value in vars(part).values()
    ):
        raise NotImplementedError("its layers keep it to themselves")
    layers = getattr(cache, "layers", None)
    return [_tensor_bytes(part, set()) for part in (layers if layers is not None else [cache])]


def _build_empty(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with boundary("no model can be built from the config"):
        model = model_without_weights(config, dtype=dtype, attn_implementation="eager").eval()
    # Loaded in float16, though not if only built, some classes keep further tensors in float32.
    kept = (model._keep_in_fp32_modules or ()) if dtype == torch.float16 else ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if any(re.search(part.replace("*", ".*"), name) for part in kept):
            tensor.data = tensor.data.float()
    return model


def _tensor_bytes(value: Any, seen: set[int]) -> int:
    """Bytes of the tensors that an object holds."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, list | tuple):
        return sum(_tensor_bytes(part, seen) for part in value)
    if isinstance(value, dict):
        return sum(_tensor_bytes(part, seen) for part in value.values())
    return _tensor_bytes(vars(value), seen) if hasattr(value, "__dict__") and not isinstance(value, type) else 0
