"""`LayerDropModel`, the PEFT tuner.

What is tuned is wrapped by PEFT's own `ModulesToSaveWrapper`, which copies a module, trains and saves the copy
under the module's plain name, and swaps it in on merge. So this tuner has no layer class of its own: it cuts
the model in `_prepare_model`, names the modules to wrap, and puts the dense model back on request.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from .. import versions
from ..cut.lazy import DROPPED_PARAMETERS
from ..cut.memory import LayerCut, check_plain_model, drop_layers
from ..errors import CutError, LayerPruneError
from ..families.layout import find_decoder_layers, find_output_head, ties_head
from ..options.kinds import quoted
from ..repair.frozen import apply_to_adapter, freeze, repaired_module_names, unfreeze
from ..runtime.devices import has_lost_weights, is_offloaded
from .config import LayerDropConfig
from .prepare import CUT, PREPARED, needs_dense_model, prepare
from .resolve import is_already_cut, resolve_drop, resolved_cut
from .tail import check_not_nested, kept_modules, saved_modules, share_configs, tuned_modules
from .tied import TIED, check_counted, retie_head, tunes_tied_matrix, untie_head, warn_about_untying

logger = logging.getLogger(__name__)


class LayerDropModel(BaseTuner):
    """Drops decoder layers of a causal language model, then tunes some of the rest.

    Args:
        model ([`~transformers.PreTrainedModel`]): The dense model. It is pruned in place, and stays cut after `unload()` and
            `delete_adapter()`.
        config ([`LayerDropConfig`]): What to drop and what to tune.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.

    An adapter that transformers loaded (by its `load_adapter`, or by `from_pretrained` with an adapter's name) can be run. To
    disable, save or merge it, load it with [`~peft.PeftModel.from_pretrained`].

    To load an adapter with other settings, such as `keep_dropped`, change those of `PeftConfig.from_pretrained(adapter)`, and
    pass the result as `config`. A new config is refused, or with `is_trainable=True`, makes a cut of its own, which the
    adapter's weights do not fit. Weights that replace an adapter's (`load_adapter` with its name,
    `set_peft_model_state_dict`) must come from the same cut: PEFT loads them without their config.

    Attributes:
        prepared (`Prepared`, *optional*): The choice of layers and the repair, as computed from the dense model.

    Example:
        ```py
        >>> from transformers import AutoModelForCausalLM
        >>> from peft import get_peft_model
        >>> from hf_layerprune import LayerDropConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(model, LayerDropConfig(drop=0.25))
        >>> model.print_trainable_parameters()
        ```
    """

    prefix: str = "layerdrop_"
    tuner_layer_cls = BaseTunerLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares it so)

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        adapters = getattr(model, "peft_config", {})
        others = any(not isinstance(config, LayerDropConfig) for config in adapters.values())
        if isinstance(model, PeftModel) or adapter_name in adapters or others:
            check_plain_model(model)  # an adapter of the same name would keep what this one doesn't tune
        if getattr(model, "_hf_peft_config_loaded", False) and not adapters:
            model._hf_peft_config_loaded = False  # as it was, for get_peft_model
            raise CutError(
                "the add_adapter of transformers is for adapters of another kind: it could neither save nor disable this "
                "one; use model = get_peft_model(model, config)"
            )
        # A PeftModel passes a dictionary.
        if getattr(peft_config, "is_saved", False) and not versions.transformers_loads_whole_modules():
            raise CutError(
                "transformers before 5.18, or PEFT before 0.20, would leave out this adapter's weights; use "
                "PeftModel.from_pretrained or AutoPeftModelForCausalLM, or update them"
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        if not isinstance(config, LayerDropConfig):
            raise LayerPruneError(f"a LayerDropConfig is needed, not a {type(config).__name__}")
        config.check_again()
        if config.inference_mode and config.num_base_layers is None:
            raise CutError(
                "weights would be loaded with a config that was not saved with them, and may be of another cut; leave config out, "
                "or change that of PeftConfig.from_pretrained(ADAPTER) and pass it"
            )
        # `PeftModel.from_pretrained` has taken off the hooks by which accelerate would fetch the weights.
        if hasattr(self.model, "hf_device_map") and has_lost_weights(self.model):
            raise CutError(
                "the base is offloaded, and PEFT would look for its weights under the names of its layers before the cut; load the "
                "adapter with AutoModelForCausalLM.from_pretrained(ADAPTER, device_map=...), or load the base without device_map"
            )
        if not hasattr(self.model, "prepare_inputs_for_generation"):
            raise CutError(
                f"{type(self.model).__name__} is not a causal language model, and only these are tuned; drop its layers "
                "with drop_layers(model, [...]) instead, and tune it by other means"
            )
        cut: LayerCut | None = getattr(self.model, CUT, None)
        if config.keep_dropped and cut is not None and not cut.dropped and config.is_new:
            raise CutError(
                "keep_dropped=True, but the layers were dropped by an earlier adapter that did not keep them; leave it out, "
                "or load the base again"
            )
        if needs_dense_model(config) and not hasattr(self.model, PREPARED):
            setattr(self.model, PREPARED, prepare(config, self.model, cut))
        resolve_drop(config, self.model.config, cut)
        others: dict[str, Any] = self.peft_config
        for name, other in others.items():
            if other is not config and other.drop_layers != config.drop_layers:
                raise CutError(
                    f"adapter {name!r} drops layers {other.drop_layers}, and the new one {config.drop_layers}: "
                    "adapters on one base must share the cut; load the base again for another one"
                )

    # PEFT's base class declares any config and any module where this class is given its own kind of config and a
    # transformers model, hence `Any`.

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> PeftConfig:
        model, stack = self.model, find_decoder_layers(self.model)
        if peft_config.tune_lm_head is None:
            tied = ties_head(model) or hasattr(model, TIED)  # in the base, whatever other adapters tune
            peft_config.tune_lm_head = find_output_head(model) is not None and not tied
        cut = resolved_cut(peft_config)
        tuned = tuned_modules(model, peft_config, cut, stack)
        if needs_dense_model(peft_config):
            peft_config.repaired_modules = repaired_module_names(getattr(model, PREPARED).repair, stack, cut)
        if peft_config.own_modules_to_save is None:
            peft_config.own_modules_to_save = peft_config.modules_to_save or []
        peft_config.modules_to_save = saved_modules(tuned, peft_config.repaired_modules)
        check_not_nested(peft_config, self.peft_config)
        check_counted(peft_config, model)
        modules = kept_modules(model, cut, stack)
        for name in peft_config.modules_to_save or ():
            # Its copy would stay as it is, and nothing would say so. Inside another adapter's module, it was checked before.
            if name in modules and is_offloaded(modules[name]):
                raise CutError(
                    f"{name} of the pruned model is offloaded, so it can't be tuned or repaired: what an adapter changes must "
                    "stay in memory; load the base without device_map, with one that offloads other modules, or prune it to a "
                    "folder (hf-layerprune prune)"
                )
        if peft_config.keep_dropped and peft_config.is_new and not peft_config.modules_to_save:
            raise CutError(
                "keep_dropped=True is for disable_adapter(), and PEFT can't disable an adapter that tunes nothing; tune something "
                "(tune_final_norm=True), or use drop_layers(model, [...], keep_dropped=True), whose restore() and reapply() do "
                "the same"
            )
        peft_config.target_modules = DUMMY_TARGET_MODULES
        # A cut in memory takes the name from the model, and all adapters here have the same base.
        configs: Any = [peft_config, *self.peft_config.values()]
        bases = [config.base_model_name_or_path for config in configs] + [model.name_or_path]
        peft_config.base_model_name_or_path = next(filter(None, bases), None)
        peft_config.base_commit = peft_config.base_commit or getattr(model.config, "_commit_hash", None)
        return peft_config

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        """Cut, unless this very cut was made before: by another adapter, or in the checkpoint."""
        saved = getattr(model, DROPPED_PARAMETERS, None)
        if not is_already_cut(peft_config, model.config):
            before = model.num_parameters()
            how = {"keep_dropped": peft_config.keep_dropped, "check": peft_config.check_cut}
            setattr(model, CUT, drop_layers(model, peft_config.drop_layers, **how))
            saved = before - model.num_parameters()
            logger.info("%d of %d parameters remain", before - saved, before)
        unties = tunes_tied_matrix(model, peft_config.modules_to_save or ())
        if unties and not hasattr(model, TIED):
            added = untie_head(model)
            if not peft_config.untied_lm_head:  # for a saved config, the warning was given when it was made
                warn_about_untying(added, saved)
        peft_config.untied_lm_head |= unties
        for name in set(peft_config.repaired_modules or ()) & set(peft_config.modules_to_save or ()):
            module = model.get_submodule(name)
            freeze(module.original_module if isinstance(module, ModulesToSaveWrapper) else module)

    def inject_adapter(self, model: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Wrap what is tuned, then give the copies what the repair fitted."""
        self._check_enabled()
        original: Any = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = copy.copy(original)  # the caller's may make further adapters
        if isinstance(config, LayerDropConfig) and config.is_new:
            # Others are made from the first, such as TRL's reference.
            config.clear_records(repair=len(self.peft_config) == 1)
        others = [(p, p.requires_grad) for p in model.parameters()] if len(self.peft_config) > 1 else []
        try:
            _check_adapter_name(adapter_name, model)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException:  # leave nothing that the next adapter on this model would take for its own
            model.__dict__.pop(PREPARED, None)
            self.peft_config.pop(adapter_name, None)
            raise
        share_configs(model, adapter_name)
        for parameter, requires_grad in others:  # PEFT does so only for layers of its own
            parameter.requires_grad_(requires_grad)
        if adapter_name in self.active_adapters:  # PEFT leaves all inactive where another adapter was before
            self.set_adapter(adapter_name, inference_mode=bool(config.inference_mode))
        config.is_saved = False  # from here on, its weights are in this model, and another adapter of it is a new one
        original.take_cut(config)
        if (cut := getattr(model, CUT, None)) is not None:
            cut.inactive_modules().requires_grad_(False)
        prepared = model.__dict__.pop(PREPARED, None)
        if prepared is not None and prepared.repair is not None:
            path = find_decoder_layers(model).path
            apply_to_adapter(prepared.repair, model, path, resolved_cut(config), adapter_name)
        self.prepared = prepared or getattr(self, "prepared", None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. The active one stays active; if it is the one deleted, the first of the others follows."""
        self._check_enabled()
        active = self.active_adapters
        super().delete_adapter(adapter_name)
        # PEFT looks for the next one in layers of its own, of which there are none here.
        for name in sorted(self.peft_config, key=lambda name: name not in active)[:1]:
            self.set_adapter(name, inference_mode=self.peft_config[name].inference_mode)
        # PEFT leaves wrappers without a copy, in which it could not save what another adapter has there.
        self._unwrap_where(lambda wrapper: not wrapper.modules_to_save)

    def _unwrap_where(self, condition: Callable[[ModulesToSaveWrapper], bool]) -> None:
        for name, module in list(self.model.named_modules()):
            if isinstance(module, ModulesToSaveWrapper) and condition(module):
                self.model.set_submodule(name, module.original_module)

    @property
    def name_or_path(self) -> str | None:
        """The base's name, which PEFT puts into the card. A model that was cut in memory has none of its own."""
        configs: Any = self.peft_config.values()
        return next((config.base_model_name_or_path for config in configs), None)

    def _check_tied_modules(self, model: nn.Module, peft_config: PeftConfig) -> None:
        """Skip PEFT's warning: a tied head is untied on purpose, see `tied.untie_head`."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise LayerPruneError("LayerDropConfig takes no target modules; leave target_modules out")

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own expects a layer with one weight

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the base's dtype: what is tuned are copies of its own modules, not new ones."""

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        cut: LayerCut | None = getattr(self.model, CUT, None)
        if not enabled and (cut is None or not cut.dropped):
            raise CutError(
                "the dropped layers were not kept, so the dense model can't be restored; prune with keep_dropped=True, or load the "
                "base again; for a trainer whose reference is the pruned model, pass it prune_with(config, model), not peft_config"
            )
        if cut is not None:
            cut.reapply() if enabled else cut.restore()
        super()._enable_adapter_layers(enabled)

    def _check_enabled(self) -> None:
        cut: LayerCut | None = getattr(self.model, CUT, None)
        if cut is not None and not cut.active:
            raise CutError(
                "while its adapter is disabled, this is the dense model, on which adapters can't be added, loaded, saved, "
                "chosen or deleted; leave disable_adapter() first"
            )

    def set_adapter(self, adapter_name: Any, inference_mode: bool = False) -> None:
        self._check_enabled()
        if adapter_name:  # PEFT passes on an empty list when the only adapter was deleted and another one is added
            super().set_adapter(self._only_name(adapter_name), inference_mode)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        self._check_enabled()
        return super().state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._check_enabled()
        super()._load_from_state_dict(*args, **kwargs)

    # What a cut has put aside is in no module tree, so moves, casts and modes must be passed on to it.

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        if (cut := getattr(self.model, CUT, None)) is not None:
            cut.inactive_modules()._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Self:
        if (cut := getattr(self.model, CUT, None)) is not None:
            cut.inactive_modules().train(mode)
        return super().train(mode)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise CutError(
                "adapter_names: an adapter is whole layers, so one batch can't mix several; choose one with set_adapter"
            )
        yield

    def _only_name(self, names: str | Sequence[str]) -> str:
        """The name of the adapter that is to be the active one."""
        listed = [names] if isinstance(names, str) else names
        if len(listed) != 1 or listed[0] not in self.peft_config:
            raise CutError(
                f"{quoted(names)} must be the name of one adapter, of {list(self.peft_config)}: each consists of whole layers, so only one "
                "can be active"
            )
        return listed[0]

    def _activate_for_merge(self, adapter_names: str | Sequence[str] | None) -> None:
        """Make the adapter that is to be merged the active one."""
        if adapter_names is not None:
            name = self._only_name(adapter_names)
            self.set_adapter(name, inference_mode=self.peft_config[name].inference_mode)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Only make the named adapter active: tuned modules are whole copies, which already replace the originals."""
        self._activate_for_merge(adapter_names)

    def unload(self) -> Any:
        """Return the cut model without what was tuned. For the dense model, load the base again."""
        return super().unload()

    def _unload_and_optionally_merge(
        self, merge: bool = True, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any
    ) -> Any:
        cut: LayerCut | None = getattr(self.model, CUT, None)
        if cut is not None:
            cut.reapply()
        self._activate_for_merge(adapter_names)
        # PEFT would keep the tuned copies when unloading as well, which means the untuned cut. And PEFT 0.19 fails on
        # modules that only other adapters tune.
        self._unwrap_where(lambda wrapper: not (merge and wrapper.active_adapters))
        model: Any = super()._unload_and_optionally_merge(merge, *args, **kwargs)  # type: ignore[func-returns-value]
        if hasattr(model, TIED) and ties_head(model):  # what was merged, if anything, is not what untied it
            retie_head(model)
        for name in (CUT, TIED, DROPPED_PARAMETERS):
            if hasattr(model, name):
                delattr(model, name)
        model.name_or_path = None  # another model than its base, which PEFT would record as an adapter's
        unfreeze(model)
        return model


def _check_adapter_name(name: str, model: nn.Module) -> None:
    """Refuse a name under which PEFT can't save weights: it removes the name where it ends that of a module or a parameter."""
    parts = {part for parameter, _ in model.named_parameters() for part in parameter.split(".")[-2:]}
    if name in parts or "." in name or hasattr(nn.ModuleDict(), name) or not name:
        raise CutError(
            f"adapter_name={quoted(name)} can't be saved by PEFT: it is empty, has a dot, or is also the name of a part of the "
            "model or of torch's ModuleDict; choose another name"
        )
