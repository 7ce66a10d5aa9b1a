"""Check that an adapter loads what the last cut of its lineage wrote, on the base with which it was compared."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CutError, boundary
from ...families.layout import find_decoder_layers
from ...options import CutOptions
from ...records.history import History
from ...records.lineage import FILE_NAME as LINEAGE
from ...runtime.loading import is_hub_id
from ...runtime.model_class import layer_modules, model_without_weights
from .places import Base
from .rebuild import Expected

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...adapter.config import LayerDropConfig

# They don't affect the outputs: layers that are named are not chosen again, nor modules that are listed repaired again.
_HARMLESS = {one.name for one in fields(CutOptions)} - {"repair"} | {
    "check_cut", "keep_dropped", "own_modules_to_save", "peft_version", "untied_lm_head",
}  # fmt: skip
# They are held against the base and the cut of the lineage elsewhere.
_CHECKED = {"base_commit", "base_model_name_or_path", "num_base_layers", "revision"}
_TUNED = {"tune_layers", "tune_lm_head", "tune_final_norm"}  # their result is modules_to_save


def adapter_differences(
    config: dict[str, Any], history: History, expected: Expected, names: Collection[str]
) -> list[str]:
    """Where an adapter's config would load something other than the last cut wrote: texts to follow the file's name.

    `config` has the fields of `adapter_config.json`, and `names` the tensors in the adapter's file, by their names in
    the cut model.
    """
    from ...adapter.config import LayerDropConfig

    known = {one.name for one in fields(LayerDropConfig)}
    try:
        adapter = LayerDropConfig(**{name: value for name, value in config.items() if name in known})
        with boundary("no model can be built from the base's config"):
            model = model_without_weights(expected.model_config)
        wanted = _wanted_fields(adapter, model, history, expected)
    except (CutError, ValueError) as error:  # PEFT's own, too
        return [f"can't be loaded: {error}"]
    if adapter.repaired_modules:
        config = config | {"repaired_modules": sorted(adapter.repaired_modules)}
    ignored = _CHECKED | _TUNED | _HARMLESS
    differ = sorted(name for name in (config.keys() | wanted.keys()) - ignored if config.get(name) != wanted.get(name))
    texts = [f"has {name}={config.get(name)!r}, and the cut writes {wanted.get(name)!r}"[:300] for name in differ]
    own, prefixes = model.state_dict(), tuple(f"{name}." for name in wanted["modules_to_save"] or ())
    stray = sorted(name for name in names if not name.startswith(prefixes))
    missing = [name for name in own if name.startswith(prefixes) and name not in names]
    missing += [prefix[:-1] for prefix in prefixes if not any(name.startswith(prefix) for name in own)]
    texts += [f"would not load {name}, which is in the weights" for name in stray[:5]]
    return texts + [f"tunes {name}, which is not in the weights" for name in missing[:5]]


def _wanted_fields(
    adapter: LayerDropConfig, model: PreTrainedModel, history: History, expected: Expected
) -> dict[str, Any]:
    """The fields that decide what is loaded, as the last cut writes them; `model` is the cut model without weights."""
    from ...adapter.model import DUMMY_TARGET_MODULES
    from ...adapter.resolve import resolved_cut
    from ...adapter.tail import tuned_modules

    repair = history.since_last_cut[0].entry.get("repair")
    with boundary("no model can be built from the base's config"):
        # Without a list, even an empty one, loading would repair again.
        repaired = layer_modules(expected.model_config, repair.get("changed_tensors") or ()) if repair else None
    plain = replace(adapter, modules_to_save=None)
    tuned = tuned_modules(model, plain, resolved_cut(adapter), find_decoder_layers(model))
    saved = adapter.modules_to_save  # what was repaired, too, and more may be tuned
    return {
        "auto_mapping": None,  # custom classes for loading the base
        "inference_mode": True,  # false marks a new adapter, whose modules are chosen again
        "modules_to_save": saved if set(tuned) <= set(saved or ()) else tuned,
        "peft_type": "LAYER_DROP",
        "repair": repair.get("method") if repair else None,
        "repaired_modules": repaired,
        "target_modules": DUMMY_TARGET_MODULES,
        "task_type": "CAUSAL_LM",
    }


def base_difference(config: dict[str, Any], history: History, compared: Base) -> str | None:
    """How the base that an adapter is applied to differs from the one that it was compared with, to follow the file's name.

    Raises:
        CheckpointError: That base can't be read.
    """
    recorded = history.lineage.base
    name, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    commit = config.get("base_commit") or revision
    where = name
    if not Path(name).expanduser().exists():
        if name != (history.base_on_hub if is_hub_id(name) else recorded.get("id")):
            return f"names the base {name!r}, and {LINEAGE} says {history.base_on_hub or recorded.get('id')!r}"
        if not is_hub_id(name):
            return None
        where = f"{name} at {revision or 'the main branch'}"
    if file := compared.first_difference(name, revision):
        there = f"at {compared.commit}" if name == compared.source else f"in {compared}"
        return f"names the base {where}, where {file} is not as {there}; make the adapter again with that as its base"
    if commit != recorded.get("commit"):
        return f"names the base's commit {commit!r}, and {LINEAGE} says {recorded.get('commit')!r}"
    return None
