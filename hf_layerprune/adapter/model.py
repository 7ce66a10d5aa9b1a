"""`LayerDropModel`, the PEFT tuner, and `prune_with`, the short way to it.

What is tuned is wrapped by PEFT's own `ModulesToSaveWrapper`, which copies a module, trains and saves the copy
under the module's plain name, and swaps it in on merge. So this tuner has no layer class of its own: it cuts
the model in `_prepare_model`, names the modules to wrap, and puts the dense model back on request.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .. import families
from ..cut.lazy import SAVED, SOURCES, load_pruned
from ..cut.memory import LayerCut, drop_layers
from ..errors import CheckpointError, CutError, LayerPruneError
from ..families.layout import find_decoder_layers, find_output_head
from ..options import check
from ..repair.frozen import freeze, module_names, put, thaw
from ..runtime.loading import load_base, resolve_base
from ..runtime.mapped import copy_by_mapping
from ..runtime.precision import in_fast_precision
from ..select import select_layers
from .config import LayerDropConfig
from .prepare import Prepared, chooses, needs_dense, prepare, runs_dense
from .reading import WHERE, find_adapter, load_adapter
from .tail import tuned_modules

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# Where a pruned base keeps what was done to it.
_CUT = "_layer_drop_cut"
_TIED = "_layer_drop_tied"
_PREPARED = "_layer_drop_prepared"


class LayerDropModel(BaseTuner):
    """Drops decoder layers of a causal language model, then tunes the tail of what is left.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model. It is pruned in place.
        config ([`LayerDropConfig`]): What to drop and what to tune.
        adapter_name (`str`): The name of the adapter, defaults to `"default"`.

    Attributes:
        prepared (`Prepared`, *optional*): What was computed from the dense model (which layers and why, the repair),
            for the record.

    Example:
        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from hf_layerprune import LayerDropConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, LayerDropConfig(drop=0.25, tune_lm_head=False))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix: str = "layerdrop_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    # --- resolving the config ----------------------------------------------------------------------------

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, LayerDropConfig):
            raise LayerPruneError(f"a LayerDropConfig is needed, not a {type(config).__name__}")
        check(config)  # again: its fields may have been set since it was made
        cut = getattr(self.model, _CUT, None)
        if chooses(config) and not hasattr(self.model, _PREPARED):
            setattr(self.model, _PREPARED, _choose(config, self.model, cut))
        _resolve_drop(config, self.model.config, cut)
        for name, other in self.peft_config.items():
            if other is not config and other.drop_layers != config.drop_layers:
                raise CutError(
                    f"adapter {name!r} drops layers {other.drop_layers}, and the new one {config.drop_layers}: "
                    "adapters on one base must share the cut; load the base again for another one"
                )
        if needs_dense(config) and not hasattr(self.model, _PREPARED):
            if families.is_cut(self.model.config, config.drop_layers, config.num_base_layers):
                raise CutError(
                    f"repair={config.repair!r} is fitted to the dense model, and this one is cut already; load the "
                    "base again, or use repair=None"
                )
            setattr(self.model, _PREPARED, prepare(config, self.model))

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        model, stack = self.model, find_decoder_layers(self.model)
        tuned = tuned_modules(model, peft_config, _cut_of(peft_config), stack)
        if needs_dense(peft_config):
            peft_config.repaired_modules = module_names(getattr(model, _PREPARED).repair, stack, _cut_of(peft_config))
        # What a repair changed is saved as well; inside a tuned layer it is saved with the layer.
        repaired = [name for name in peft_config.repaired_modules or () if not _inside(name, tuned)]
        peft_config.modules_to_save = [*tuned, *repaired] or None
        peft_config.target_modules = DUMMY_TARGET_MODULES
        peft_config.base_commit = peft_config.base_commit or getattr(model.config, "_commit_hash", None)
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """Cut, unless this very cut was made before: by another adapter, or in the checkpoint."""
        saved = getattr(model, SAVED, None)
        if not families.is_cut(model.config, peft_config.drop_layers, peft_config.num_base_layers):
            before = _count(model)
            how = {"keep_dropped": peft_config.keep_dropped, "check": peft_config.check_cut}
            setattr(model, _CUT, drop_layers(model, peft_config.drop_layers, **how))
            saved = before - _count(model)
            logger.info("%d of %d parameters remain", _count(model), before)
        if peft_config.tune_lm_head and _is_tied(model):
            added = _untie(model)
            if not peft_config.untied_lm_head:  # a saved config was told so when it was made
                _tell_of_untying(added, saved)
            peft_config.untied_lm_head = True
        for name in set(peft_config.repaired_modules or ()) & set(peft_config.modules_to_save or ()):
            module = model.get_submodule(name)
            freeze(module.original_module if isinstance(module, ModulesToSaveWrapper) else module)
        # PEFT copies what is tuned. Of a model that was loaded cut and not touched since, a copy costs nothing.
        sources = model.__dict__.pop(SOURCES, {})
        for name in peft_config.modules_to_save or () if sources else ():
            copy_by_mapping(model.get_submodule(name), name, sources)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap what is tuned, then give the copies what the repair fitted."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        prepared = model.__dict__.pop(_PREPARED, None)
        if prepared is not None and prepared.repair is not None:
            cut = _cut_of(self.peft_config[adapter_name])
            put(prepared.repair, model, find_decoder_layers(model).path, cut, adapter_name)
        self.prepared = prepared or getattr(self, "prepared", None)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Say nothing: a tied head is untied on purpose, see `_untie`."""

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise LayerPruneError("LayerDropConfig wraps no target modules; leave target_modules out")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own expects a layer with one weight

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the base's dtype: what is tuned are copies of its own modules, not new ones."""

    # --- the dense model and back ------------------------------------------------------------------------

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        cut: LayerCut | None = getattr(self.model, _CUT, None)
        if cut is None and not enabled:
            raise CutError("this model was loaded without its dropped layers, so there is no dense model to return to")
        if cut is not None:
            cut.reapply() if enabled else cut.restore()
        super()._enable_adapter_layers(enabled)

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # Dropped layers that are kept are in no module tree, so moves and casts must be passed on to them.
        cut: LayerCut | None = getattr(self.model, _CUT, None)
        for layer in cut.dropped if cut is not None and cut.active else ():
            layer._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def _unload_and_optionally_merge(self, *args: Any, merge: bool = True, **kwargs: Any) -> nn.Module:
        cut: LayerCut | None = getattr(self.model, _CUT, None)
        if cut is not None:
            cut.reapply()
        if not merge:
            # PEFT would keep the tuned copies here as well; unloading means the untuned cut.
            for name, module in list(self.model.named_modules()):
                if isinstance(module, ModulesToSaveWrapper):
                    parent = self.model.get_submodule(name.rpartition(".")[0])
                    setattr(parent, name.rpartition(".")[2], module.original_module)
            if hasattr(self.model, _TIED):
                _tie_again(self.model)
        model = super()._unload_and_optionally_merge(*args, merge=merge, **kwargs)
        for name in (_CUT, _TIED, SAVED):
            if hasattr(model, name):
                delattr(model, name)
        thaw(model)
        return model


def _choose(config: LayerDropConfig, model: PreTrainedModel, cut: LayerCut | None = None, **how: Any) -> Prepared:
    """Fill in `drop_layers` by a criterion that looks at the dense model."""
    families.check_supported(model.config)
    if cut is not None:
        raise CutError(
            f"criterion {config.criterion!r} looks at the dense model, and this one is cut already; name its layers "
            f"with drop_layers={sorted(set(range(cut.cut.num_layers)) - set(cut.cut.keep))}, or load the base again"
        )
    prepared = prepare(config, model, **how)
    config.drop_layers = prepared.drop_layers
    return prepared


def _resolve_drop(config: LayerDropConfig, model_config: PreTrainedConfig, cut: LayerCut | None = None) -> None:
    """Fill in `drop_layers` and `num_base_layers`, and refuse a config that was resolved for another base."""
    families.check_supported(model_config)
    n = families.layer_count(model_config)
    if cut is not None:  # a second adapter: its settings are about the dense base
        n = cut.cut.num_layers
    if config.drop_layers is None:
        config.drop_layers = select_layers(n, config, families.protected_layers(model_config) if cut is None else ())
    if config.num_base_layers is None:
        config.num_base_layers = n
    elif config.num_base_layers != n and not families.is_cut(model_config, config.drop_layers, config.num_base_layers):
        raise CutError(
            f"this config drops layers {config.drop_layers} of a base with {config.num_base_layers} layers, and the "
            f"model has {n}; use it with its base ({config.base_model_name_or_path}), or make a new config"
        )
    if cut is None and config.num_base_layers == n:
        families.make_cut(model_config, config.drop_layers)


def _cut_of(config: LayerDropConfig) -> families.Cut:
    """The cut that a resolved config describes."""
    gone, n = set(config.drop_layers), config.num_base_layers
    return families.Cut(tuple(i for i in range(n) if i not in gone), n)


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- tied heads -----------------------------------------------------------------------------------------


def _tied_configs(model: PreTrainedModel) -> list[Any]:
    parts = {id(part): part for part in (model.config, families.text_config(model.config))}
    return [part for part in parts.values() if getattr(part, "tie_word_embeddings", False)]


def _is_tied(model: PreTrainedModel) -> bool:
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", None) is not None


def _untie(model: PreTrainedModel) -> int:
    """Stop transformers from tying the head again. The tuned copy that PEFT makes has a weight of its own.

    Returns:
        `int`: How many parameters that adds.
    """
    configs = _tied_configs(model)
    for config in configs:
        config.tie_word_embeddings = False
    head = find_output_head(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    forgotten = {name: tied.pop(name) for name in list(tied) if name == f"{head}.weight"}
    setattr(model, _TIED, (configs, forgotten))
    return model.get_output_embeddings().weight.numel()


def _tell_of_untying(added: int, saved: int | None) -> None:
    message = f"lm_head is tied to the embeddings; tuning it unties it, which adds {added:,} parameters"
    if saved is not None and added >= saved:
        logger.warning(
            "%s, more than the %s that the dropped layers save: the pruned model is larger than its base. "
            "Use tune_lm_head=False to keep the head tied.",
            message,
            f"{saved:,}",
        )
    else:
        logger.warning("%s. Use tune_lm_head=False to keep it tied.", message)


def _tie_again(model: PreTrainedModel) -> None:
    configs, forgotten = getattr(model, _TIED)
    for config in configs:
        config.tie_word_embeddings = True
    model.all_tied_weights_keys.update(forgotten)


# --- the short way --------------------------------------------------------------------------------------


def prune_with(
    config: LayerDropConfig, model: PreTrainedModel | None = None, **from_pretrained_kwargs: Any
) -> PeftModel:
    """Prune a model and make its tail trainable.

    Args:
        config ([`LayerDropConfig`]): What to drop and what to tune. Its `drop_layers` is filled in.
        model ([`~transformers.PreTrainedModel`], *optional*): The dense model, pruned in place. Without one, the base
            named in `config.base_model_name_or_path` is loaded, without ever reading the layers that go, unless
            `keep_dropped` asks for them or the base is a GGUF file. A base that is an adapter of this method is
            merged with its own base first.
        from_pretrained_kwargs: For loading the base: `dtype`, `device_map`, `attn_implementation`, `gguf_file`, ...

    Returns:
        [`~peft.PeftModel`]: The pruned model.

    Raises:
        CheckpointError: The base can't be loaded.
        CutError: These layers can't be dropped from this model.
        UnsupportedModelError: The architecture is not one that is proven to survive a cut.
    """
    if model is None:
        if not config.base_model_name_or_path:
            raise LayerPruneError(
                "there is nothing to prune: pass a model, or name one in LayerDropConfig(base_model_name_or_path=...)"
            )
        model = _load(config, from_pretrained_kwargs)
    elif from_pretrained_kwargs:
        raise TypeError(f"{sorted(from_pretrained_kwargs)} are for loading a base, but a model was passed")
    return get_peft_model(model, config)


def prune_prepared(
    config: LayerDropConfig, prepared: Prepared | None, *, whole: bool = False, **from_pretrained_kwargs: Any
) -> PeftModel:
    """As `prune_with`, for a config whose layers and repair have been computed before, by `look_at_dense`.

    With `whole`, the dropped layers are read as well and the base is cut in memory, which checks the cut.
    """
    return get_peft_model(_load(config, from_pretrained_kwargs, prepared, whole), config)


def _load(
    config: LayerDropConfig, kwargs: dict[str, Any], prepared: Prepared | None = None, whole: bool = False
) -> PreTrainedModel:
    """Load the base named in a config, already cut where possible."""
    base = config.base_model_name_or_path
    if config.revision is not None:
        kwargs = {"revision": config.revision} | kwargs
    if (adapter := find_adapter(base, **kwargs)) is not None:
        return load_merged(base, adapter, kwargs)
    if whole or config.keep_dropped or resolve_base(base, kwargs.get("gguf_file"))[1] is not None:
        model = load_base(base, **kwargs)
        if prepared is not None:
            setattr(model, _PREPARED, prepared)
        return model

    def still_to_drop(model_config: PreTrainedConfig) -> list[int]:
        _resolve_drop(config, model_config)
        done = families.is_cut(model_config, config.drop_layers, config.num_base_layers)
        return [] if done else config.drop_layers

    if prepared is None and needs_dense(config):
        prepared = look_at_dense(config, kwargs)
    model = load_pruned(base, still_to_drop, **kwargs)
    if hasattr(model, SAVED):
        setattr(model, _CUT, LayerCut(_cut_of(config), [], []))
    if prepared is not None:
        setattr(model, _PREPARED, prepared)
    return model


def look_at_dense(config: LayerDropConfig, kwargs: dict[str, Any]) -> Prepared:
    """Fit what a config asks for to its base, of which only a layer at a time is in memory.

    Args:
        config ([`LayerDropConfig`]): What to do. Its `drop_layers` is filled in.
        kwargs (`dict[str, Any]`): For loading the base.

    Returns:
        `Prepared`: The layers, the repair, and the record of both.

    Raises:
        CutError: The base is cut already, or the repair is impossible.
    """
    base = config.base_model_name_or_path
    others = {name: value for name, value in kwargs.items() if name not in ("device_map", "dtype", "torch_dtype")}
    model = load_base(base, dtype="auto", **others)
    families.check_supported(model.config)
    choosing = chooses(config)
    if not choosing:
        _resolve_drop(config, model.config)
        if families.is_cut(model.config, config.drop_layers, config.num_base_layers):
            raise CutError(f"repair={config.repair!r} is fitted to the dense model, and {base} is cut already")
    # The new weights are stored in the types of the old ones, whatever they are computed in.
    types = [{name: p.dtype for name, p in layer.named_parameters()} for layer in find_decoder_layers(model).layers]
    how = {"device": _accelerator(), "let_go": True}
    if how["device"] is None and runs_dense(config):
        in_fast_precision(model)
    prepared = (_choose if choosing else prepare)(config, model, **how)
    if prepared.repair is not None:
        new = prepared.repair.tensors
        new |= {(i, name): value.to(types[i].get(name, value.dtype)) for (i, name), value in new.items()}
    return prepared


def _accelerator() -> str | None:
    """The device that layers run on, one at a time, if there is one."""
    import torch

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return str(found) if found is not None else None


def load_merged(base: str, adapter: PeftConfig, kwargs: dict[str, Any]) -> PreTrainedModel:
    """Load an adapter of this method with its base, as one plain model."""
    if not isinstance(adapter, LayerDropConfig):
        raise CheckpointError(f"{base} is an adapter of another method ({adapter.peft_type}); merge it first")
    where = {name: kwargs[name] for name in WHERE if kwargs.get(name)}
    others = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    model = load_adapter(_load(adapter, others), base, **where).merge_and_unload()
    model.name_or_path = model.config.name_or_path = base
    return model
