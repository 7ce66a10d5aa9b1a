"""What the history says of a healing run: its settings, its data, and the command that repeats it."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import sanitize
from ..options import option_fields
from ..records.names import strip_local_path
from .data import has_images
from .options import HealOptions, RowOptions
from .store import hash_rows

if TYPE_CHECKING:
    from datasets import Dataset

    from .config import HealConfig

# Options that don't affect the trained weights, or that the history records elsewhere: whole names, then prefixes.
_IRRELEVANT = (
    "teacher", "teacher_revision", "cache", "cache_dir", "keep_cache",
    "output_dir", "run_name", "project", "debug", "use_cpu", "use_cache", "local_rank", "resume_from_checkpoint",
    "accelerator_config", "parallelism_config", "deepspeed", "fsdp", "fsdp_config", "pad_to_multiple_of",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing", "activation_offloading",
    "activation_checkpointing_kwargs", "dataset_num_proc", "dataset_test_split", "torch_empty_cache_steps",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context", "remove_unused_columns", "skip_memory_metrics", "prediction_loss_only",
    "enable_jit_checkpoint", "trust_remote_code", "model_name_or_path", "model_revision", "dataset_name", "datasets",
)  # fmt: skip
_IRRELEVANT_PREFIXES = (
    "log_", "logging_", "report_", "disable_", "trackio_", "hub_", "push_", "include_", "do_", "ddp_", "bf16_full_",
    "fp16_full_", "per_device_eval_", "batch_eval_",
)  # fmt: skip
_CHECKPOINTS = ("eval_", "save_")  # these matter only if the best checkpoint is kept
# The options that are recorded even at their defaults.
_ALWAYS_RECORDED = (
    *(name for name in option_fields(HealOptions) if name not in _IRRELEVANT),
    "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "num_train_epochs", "max_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "world_size", "max_length", "packing",
    "completion_only_loss", "bf16", "fp16", "seed", "data_seed",
)  # fmt: skip
_LORA_SETTINGS = ("lora_r", "lora_alpha", "lora_dropout")
# What decides which rows of a source are read, apart from its config.
_SOURCE_OPTIONS = ("split", "columns", "fraction")
# Prefixes of options that are no part of a command that others repeat: tokens, where it was pushed, where it went on.
_NOT_REPEATED = ("hub_", "push_to_hub", "resume_from_checkpoint")


def training_settings(args: HealConfig, *others: Any) -> dict[str, Any]:
    """All settings that decide the result, by name, as JSON: those of training, and other dataclasses of settings.

    The most important ones are always recorded; any other one only if it differs from its default and is not listed
    above as irrelevant.
    """
    found = {name: getattr(args, name) for name in _ALWAYS_RECORDED if args.distils or not name.startswith("kd_")}
    idle = _IRRELEVANT_PREFIXES + (() if args.load_best_model_at_end else _CHECKPOINTS)
    always = _LORA_SETTINGS if args.method in ("lora", "qlora") else ()
    for one in (args, *others):
        for field in fields(one):
            name, default = field.name, field.default
            if not field.init or name in (*found, *_ALWAYS_RECORDED, *_IRRELEVANT) or name.startswith(idle):
                continue
            if default is MISSING:
                default = field.default_factory() if field.default_factory is not MISSING else None
            # None, False, 0 and empty all mean "off".
            if name in always or (getattr(one, name) or None) != (default or None):
                found[name] = getattr(one, name)
    return {name: _to_json(value) for name, value in found.items()}


def _to_json(value: Any) -> Any:
    value = getattr(value, "value", value)
    return strip_local_path(value) if isinstance(value, str) else json.loads(json.dumps(value, default=str))


def row_settings(rows: RowOptions, written: bool) -> dict[str, Any]:
    """The options that made the training rows; `written` if the dense model wrote all of them."""
    if written:
        return {"self_rows": rows.self_rows, "self_length": rows.self_length}
    names = [name for name in option_fields(RowOptions) if name.startswith("rewrite_") and rows.rewrite_answers]
    return {name: getattr(rows, name) for name in ("template", *names)}


def describe_rows(
    datasets: Sequence[Dataset], sources: Sequence[Mapping[str, Any]], rewritten: bool = False
) -> list[dict[str, Any]]:
    """Describe the training data.

    Args:
        datasets (`Sequence[Dataset]`): Prepared rows, the training set first; empty if the data were streamed.
        sources (`Sequence[Mapping[str, Any]]`): Where they come from: for each source its `path`, which is a Hub id, a
            file, or `"self"`, and what else TRL's `DatasetConfig` has.
        rewritten (`bool`, defaults to `False`): Whether the dense model rewrote the answers.

    Returns:
        `list[dict]`: One entry for each source; the first holds the counts and the hash of all rows.
    """
    records: list[dict[str, Any]] = []
    for source in sources:
        name = str(source["path"])
        local = Path(name).expanduser().exists()
        known: dict[str, Any] = {"name": Path(name).name} if local else {"name": name}
        if not local and "/" in name:
            known["id"] = name
        how = {"config": source.get("name")} | {key: source.get(key) for key in _SOURCE_OPTIONS}
        known |= {key: _to_json(value) for key, value in how.items() if value not in (None, "train", 1)}
        records.append(known | ({"answers": "rewritten by the dense model"} if rewritten else {}))
    if datasets and has_images(datasets[0]):
        records[0] |= {"rows": len(datasets[0]), "images": True}
    elif datasets:
        ids = datasets[0]["input_ids"]
        records[0] |= {"rows": len(ids), "tokens": sum(map(len, ids)), "sha256": hash_rows(datasets[0])}
    return records


def describe_command(script: Path, words: Sequence[str]) -> str:
    """The command that repeats a run on one line, without a push, and without the folders of paths outside this one.

    Files of the recipes are named as `hf-layerprune recipes` copies them, wherever the command was run. The words are
    options as `--name value` or `--name=value`, none of them abbreviated; each becomes `--name value`.
    """
    options: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            name, joined, value = word.partition("=")
            options.append([name[2:].replace("-", "_"), *([value] if joined else [])])
        else:
            options[-1].append(word)
    repeated = [option for option in options[1:] if not option[0].startswith(_NOT_REPEATED)]
    kept = [word for name, *values in repeated for word in (f"--{name}", *values)]
    recipes = script.resolve().parent

    def displayed(word: str) -> str:
        path = Path(word).resolve()
        inside = recipes.name == "recipes" and path.is_relative_to(recipes) and os.path.isfile(path)
        return path.relative_to(recipes.parent).as_posix() if inside else strip_local_path(word)

    shown_words = [",".join(map(displayed, word.split(","))) for word in (*options[0], *kept)]
    return sanitize(shlex.join(["accelerate", "launch", f"recipes/{script.name}", *shown_words]))
