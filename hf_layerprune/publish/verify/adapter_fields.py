"""Compare the fields of an `adapter_config.json` with those that the last `prune` of its lineage would write."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ...errors import CutError, boundary
from ...families.layout import find_decoder_layers
from ...files.hub import Repo
from ...options import CutOptions
from ...records.fingerprints import CONFIG, fingerprint, is_inert
from ...records.history import History
from ...records.lineage import FILE_NAME as LINEAGE
from ...records.names import last_part
from ...runtime.loading import is_hub_id
from ...runtime.model_class import model_without_weights
from .places import Base

# They don't affect the outputs: layers that are named are not chosen again.
_HARMLESS = {one.name for one in fields(CutOptions)} - {"repair"} | {
    "check_cut", "inference_mode", "keep_dropped", "own_modules_to_save", "peft_version", "untied_lm_head",
}  # fmt: skip
# They are held against the base and the cut of the lineage elsewhere.
_CHECKED = {"auto_mapping", "base_commit", "base_model_name_or_path", "num_base_layers", "peft_type", "revision"}
_TUNED = {"tune_layers", "tune_lm_head", "tune_final_norm"}  # their result is modules_to_save


def adapter_differences(
    told: dict[str, Any], history: History, config: dict[str, Any], names: Collection[str]
) -> list[str]:
    """What in an adapter's config would load otherwise than what the last cut wrote.

    Args:
        told (`dict[str, Any]`): The fields of `adapter_config.json`.
        history (`History`): The stages.
        config (`dict[str, Any]`): The fields of the config of the repeated cut.
        names (`Collection[str]`): The tensors in the adapter's file, by their names in the cut model.

    Returns:
        `list[str]`: One text for each difference, to follow the name of the file.
    """
    from ...adapter.config import LayerDropConfig
    from ...adapter.model import DUMMY_TARGET_MODULES

    last = [stage.entry for stage in history.stages if stage.name == "prune"][-1]
    repair = last.get("repair") or {}
    wanted: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "target_modules": DUMMY_TARGET_MODULES,
        "repair": repair.get("method"),
        "repaired_modules": repair.get("changed_modules"),
    }
    if repair:
        source = last.get("calibration") or {}
        wanted |= {"calibration_samples": source.get("samples"), "calibration_length": source.get("length")}
        wanted |= {"calibration": source.get("source"), "seed": source.get("seed")}
        told = told | {"calibration": last_part(str(told.get("calibration")))}
        wanted["calibration"] = last_part(str(wanted["calibration"]))
    try:
        known = {one.name for one in fields(LayerDropConfig)} - {"peft_type"}
        adapter = LayerDropConfig(**{name: value for name, value in told.items() if name in known})
        wanted["modules_to_save"] = _tuned(adapter, config)
    except (CutError, TypeError) as error:
        return [f"can't be loaded: {error}"]
    if set(wanted["modules_to_save"] or ()) <= set(adapter.modules_to_save or ()):  # more may be tuned
        wanted["modules_to_save"] = adapter.modules_to_save
    ignored = _CHECKED | _TUNED | (_HARMLESS - wanted.keys())
    differ = sorted(name for name in (told.keys() | wanted.keys()) - ignored if told.get(name) != wanted.get(name))
    texts = [f"has {name}={told.get(name)!r}, and the cut writes {wanted.get(name)!r}"[:300] for name in differ]
    prefixes = tuple(f"{name}." for name in wanted["modules_to_save"] or ())
    stray = sorted(name for name in names if not name.startswith(prefixes))
    lacking = [prefix[:-1] for prefix in prefixes if not any(name.startswith(prefix) for name in names)]
    texts += [f"would not load {name}, which is in the weights" for name in stray[:5]]
    return texts + [f"tunes {name}, which is not in the weights" for name in lacking[:5]]


def base_difference(told: dict[str, Any], history: History, compared: Base) -> str | None:
    """How the base that an adapter is put on differs from the one that it was compared with, to follow the file's name.

    Raises:
        CheckpointError: That base is on the Hub and can't be read.
    """
    recorded, name = history.lineage.base, str(told.get("base_model_name_or_path"))
    path, revision = Path(name).expanduser(), told.get("revision")
    if path.exists():
        loaded, where = Base(path, None, fingerprint(path)), name
    elif name != (history.base_on_hub if is_hub_id(name) else recorded.get("id")):
        return f"names the base {name!r}, and {LINEAGE} says {history.base_on_hub or recorded.get('id')!r}"
    elif not is_hub_id(name):
        return None
    else:
        repo, where = Repo.open(name, revision, token=compared.token), f"{name} at {revision or 'the main branch'}"
        if name == compared.source:
            now, then = (_decisive(one) for one in (repo, Repo.open(name, compared.commit, token=compared.token)))
            differ = sorted(file for file in now.keys() | then.keys() if now.get(file) != then.get(file))
            if not differ or repo.commit == compared.commit:
                return None
            changed = f"where {differ[0]} is not as at {compared.commit}"
            return f"names the base {where}, {changed}; make the adapter again with that as --revision"
        repo.get(CONFIG)
        loaded = Base(name, repo.commit, repo.fingerprint())
    differ = loaded.differences(recorded.get("files") or {})
    return f"names the base {where}, where {differ[0]} is not as {LINEAGE} says" if differ else None


def _decisive(repo: Repo) -> dict[str, str | None]:
    return {name: file.sha256 or file.blob_id for name, file in repo.files.items() if not is_inert(name)}


def _tuned(adapter: Any, config: dict[str, Any]) -> list[str] | None:
    """The modules that an adapter of this config saves, of the cut model with the other config."""
    from transformers import CONFIG_MAPPING

    from ...adapter.resolve import cut_of
    from ...adapter.tail import saved_modules, tuned_modules

    told = {name: value for name, value in config.items() if name != "quantization_config"}
    made = CONFIG_MAPPING[config["model_type"]].from_dict(told)
    with boundary("no model can be built from the base's config"):
        model = model_without_weights(made)
    tuned = tuned_modules(model, replace(adapter, modules_to_save=None), cut_of(adapter), find_decoder_layers(model))
    return saved_modules(tuned, adapter.repaired_modules)
