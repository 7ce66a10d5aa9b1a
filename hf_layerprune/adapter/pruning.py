"""`prune_with`, the short way from a config to a pruned model, and loading a base for it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from .. import families
from ..calibration.documents import check_source
from ..cut.lazy import DROPPED_PARAMETERS, load_pruned
from ..cut.memory import LayerCut, check_plain_model
from ..errors import CheckpointError, LayerPruneError, boundary
from ..families.layout import find_decoder_layers
from ..runtime.loading import LOCATION_ARGUMENTS, as_path, is_hub_id, load_base, load_config, resolve_base
from ..runtime.mapping import load_mapped
from ..runtime.precision import to_fast_precision
from ..select.targets import Target
from .config import LayerDropConfig
from .prepare import CUT, PREPARED, Prepared, needs_dense_model, needs_text, prepare
from .reading import find_adapter, load_adapter
from .resolve import is_already_cut, resolve_drop, resolved_cut

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The arguments of `from_pretrained` that say where a model is put; the dense one is put where it can be run by layers.
_PLACEMENT = ("device_map", "max_memory", "offload_folder", "offload_buffers")


def prune_with(
    config: LayerDropConfig,
    model: PreTrainedModel | None = None,
    *,
    adapter_name: str = "default",
    **from_pretrained_kwargs: Any,
) -> PeftModel:
    """Prune a model, and make the layers that the config names trainable.

    Args:
        config ([`LayerDropConfig`]): What to drop and what to tune. Its `drop_layers` is filled in.
        model ([`~transformers.PreTrainedModel`], *optional*): The dense model, which is pruned in place; it stays cut
            after `unload()`. To try several cuts of one model, use `drop_layers(model, layers, keep_dropped=True)`, whose
            result has a method `restore()`. Without a model, the base named in `config.base_model_name_or_path` is loaded,
            and the dropped layers are never read unless `keep_dropped`, a repair or a criterion needs them or the base is
            a GGUF file. A base that is an adapter of this method is merged with its own base first.
        adapter_name (`str`, defaults to `"default"`): The adapter's name in the `PeftModel`.
        from_pretrained_kwargs: For loading the base: `dtype`, `device_map`, `attn_implementation`, ...; `subfolder` and
            `gguf_file` only for a folder, since a saved adapter can't name a part of a repository as its base.

    Returns:
        [`~peft.PeftModel`]: The pruned model.

    Raises:
        CheckpointError: The base can't be loaded.
        CutError: These layers can't be dropped from this model, it has adapters, or what would be read, tuned or repaired
            is offloaded.
        LayerPruneError: Neither a model nor a base is given, or the config is not a `LayerDropConfig`.
        TypeError: Arguments for loading a base are passed together with a model.
        UnsupportedModelError: The architecture is not proven to survive a cut.
    """
    if not isinstance(config, LayerDropConfig):
        raise LayerPruneError(f"a LayerDropConfig is needed, not a {type(config).__name__}")
    if model is not None:
        check_plain_model(model)
    original, config = config, copy.copy(config)
    config.clear_records()
    config.check_again()
    if model is None:
        if not config.base_model_name_or_path:
            raise LayerPruneError(
                "there is nothing to prune: pass a model, or specify one in LayerDropConfig(base_model_name_or_path=...)"
            )
        if "torch_dtype" in from_pretrained_kwargs:  # its older name
            from_pretrained_kwargs.setdefault("dtype", from_pretrained_kwargs.pop("torch_dtype"))
        model = _load_base_for(config, from_pretrained_kwargs)
    elif from_pretrained_kwargs:
        raise TypeError(
            f"{', '.join(sorted(from_pretrained_kwargs))}: for loading a base, but a model was passed; leave out one or the other"
        )
    pruned: Any = get_peft_model(model, config, adapter_name=adapter_name)
    original.take_cut(config)
    return pruned


def prune_prepared(
    config: LayerDropConfig, prepared: Prepared | None, *, whole: bool = False, **from_pretrained_kwargs: Any
) -> PeftModel:
    """As `prune_with`, for a config whose layers and repair have been computed before, by `prepare_from_base`.

    With `whole`, the dropped layers are read as well and the base is cut in memory, which checks the cut.
    """
    return get_peft_model(_load_base_for(config, from_pretrained_kwargs, prepared, whole), config)


def _load_base_for(
    config: LayerDropConfig, kwargs: dict[str, Any], prepared: Prepared | None = None, whole: bool = False
) -> PreTrainedModel:
    """Load the base named in a config, already cut where possible."""
    kwargs = _enter_subfolder(config, kwargs)
    base = config.base_model_name_or_path or ""
    if revision := kwargs.get("revision") or config.revision:
        config.revision = revision  # saved with the adapter, which would otherwise be put on the main branch
        kwargs = kwargs | {"revision": revision}
    if (adapter := find_adapter(base, **kwargs)) is not None:
        if not isinstance(adapter, LayerDropConfig):
            raise CheckpointError(f"{base} is an adapter of another method ({adapter.peft_type}); merge it first")
        return load_merged(base, adapter, kwargs)
    if whole or config.keep_dropped or resolve_base(base)[1] is not None:
        if config.drop_layers is not None:  # what can't be dropped is refused before a weight is read
            where = {name: kwargs[name] for name in LOCATION_ARGUMENTS if kwargs.get(name)}
            resolve_drop(config, load_config(base, **where))
        model = load_base(base, **kwargs)
    else:

        def layers_to_drop(model_config: PreTrainedConfig) -> list[int]:
            resolve_drop(config, model_config)
            return [] if is_already_cut(config, model_config) else list(resolved_cut(config).drop)

        if prepared is None and needs_dense_model(config):
            prepared = prepare_from_base(config, kwargs)
        model = load_pruned(base, layers_to_drop, **kwargs)
        if hasattr(model, DROPPED_PARAMETERS):
            setattr(model, CUT, LayerCut(resolved_cut(config), [], []))
    if prepared is not None:
        setattr(model, PREPARED, prepared)
    return model


def _enter_subfolder(config: LayerDropConfig, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Name a part of a folder as the config's base; returns the arguments without it.

    Raises:
        CheckpointError: The base is on the Hub.
    """
    base = config.base_model_name_or_path or ""
    for part in ("subfolder", "gguf_file"):
        if not (inside := kwargs.get(part)):
            continue
        if is_hub_id(base):
            files = inside if part == "gguf_file" else f"--include '{inside}/*'"
            raise CheckpointError(
                f"{part}={inside!r}: PEFT's configs can't say where in a repository a base is, so a saved adapter would be put on "
                f"another model; download it (hf download {base} {files} --local-dir FOLDER), then specify FOLDER/{inside} as the base"
            )
        if as_path(base).is_dir():
            base = config.base_model_name_or_path = str(as_path(base) / inside)
            kwargs = {name: value for name, value in kwargs.items() if name != part}
    return kwargs


def prepare_from_base(config: LayerDropConfig, kwargs: dict[str, Any]) -> Prepared:
    """Choose the layers and fit the repair on a config's base, of which only a layer at a time has to be in memory.

    A GGUF file is in memory as a whole, unpacked to the `dtype` in `kwargs`. A float16 base also computes in that type,
    since float16 may overflow where the pruned model will not. The config's `drop_layers` is filled in.

    Raises:
        CutError: The base is cut already, or the repair is impossible.
    """
    if needs_text(config):
        check_source(config.calibration)
    base = config.base_model_name_or_path or ""
    others = {name: value for name, value in kwargs.items() if name not in (*_PLACEMENT, "dtype")}
    packed = resolve_base(base)[1] is not None
    model = load_mapped(base, dtype=kwargs.get("dtype", "auto") if packed else "auto", **others)
    families.check_supported(model.config)
    device = torch.accelerator.current_accelerator(check_available=True)
    target = None
    if config.drop_layers is None:  # sizes and times are those of the type in which the base is
        revision = others.get("revision")
        target = Target.from_options(config, model.config, base, revision=revision, model=model, device=device)
    dtype = kwargs.get("dtype")
    dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    in_float16 = model.dtype == torch.float16 and not getattr(model, "is_quantized", False)
    if in_float16 and dtype not in (None, torch.float16):
        del model  # before it is read again; converting it in place would put it into memory, and round its buffers
        model = load_mapped(base, dtype=dtype, **others)
    # The new weights are stored in the types of the old ones, whatever they are computed in.
    types = [{name: p.dtype for name, p in layer.named_parameters()} for layer in find_decoder_layers(model).layers]
    if device is None and needs_text(config):
        to_fast_precision(model)
    prepared = prepare(config, model, target=target, device=device)
    if prepared.repair is not None:
        new = prepared.repair.tensors
        new |= {(i, name): value.to(types[i].get(name, value.dtype)) for (i, name), value in new.items()}
    return prepared


def load_merged(name: str, adapter: PeftConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load an adapter of any PEFT method with its base, as one plain model."""
    if not adapter.base_model_name_or_path:
        raise CheckpointError(f"{name} is an adapter that does not name its base; merge it first")
    if adapter.is_prompt_learning:
        raise CheckpointError(
            f"{name} is an adapter that adds virtual tokens ({adapter.peft_type}), which no plain model can hold; specify its "
            f"base instead: {adapter.base_model_name_or_path}"
        )
    where = {name: kwargs[name] for name in LOCATION_ARGUMENTS if kwargs.get(name)}
    others = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    if isinstance(adapter, LayerDropConfig):
        base = _load_base_for(adapter, others)
    else:
        base = load_base(adapter.base_model_name_or_path, revision=adapter.revision, **others)
    adapted = load_adapter(base, name, **where)
    with boundary(f"can't merge the adapter {name} into its base"):
        model = adapted.merge_and_unload()
    model.name_or_path = model.config.name_or_path = name
    return model
