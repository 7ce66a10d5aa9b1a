"""The train stage: record that another program trained a pruned model.

trainer = DPOTrainer("pruned", args, train_dataset=pairs)
trainer.train()
trainer.save_model("dpo")
record_trained("pruned", "dpo", "preferred", settings={"method": "DPO"}, data=["pairs.jsonl"])
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, LayerPruneError, boundary
from ..families import MARKER
from ..layer_ranges import describe_layers
from ..options.quantities import join_words
from ..records.fingerprints import ADAPTER_CONFIG, CONFIG
from ..records.history import TRAIN
from ..records.lineage import FILE_NAME, Lineage
from ..records.names import is_hub_name, strip_local_path
from ..runtime.tokenizer_version import TOKENIZER
from .provenance import as_folder, load_lineage_of_weights

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..heal.student import Student

# Fields that trainers set for their own use, and that change nothing of what a trained model computes.
_TRAINERS_OWN = re.compile(
    r"dtype|(bos|pad)_token_id|output_(router_logits|attentions|hidden_states)|\w*(aux|z)_loss_\w+|initializer_range"
    r"|\w*(dropout|pdrop|layerdrop)|unsloth_\w+|_attn_implementation\w*"
)


def record_trained(
    source: str | Path,
    trained: str | Path,
    output: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    data: str | Sequence[str] = (),
) -> None:
    """Write a model that another program trained, with its history, so that `verify`, the card and `push` understand it.

    Only the trained weights are taken; config, tokenizer, chat template, generation settings, licence and data type are
    those of the source. The history lists the tensors that training changed, found by comparison. How the model was
    trained is recorded as you state it.

    Args:
        source (`str` or `Path`): The pruned model from before the training: a Hub id, or a folder with its
            `lineage.json`.
        trained (`str` or `Path`): What the trainer saved: a folder with a whole model, or with a PEFT adapter, which is
            merged.
        output (`str` or `Path`): The folder to write.
        settings (`Mapping[str, Any]`, *optional*): How it was trained, for the history and the card, as JSON:
            `{"method": "DPO", "learning_rate": 5e-7}`. Nothing checks it.
        data (`str` or `Sequence[str]`, *optional*): The data sets that it was trained on: Hub ids, or other names.

    Raises:
        CheckpointError: A folder is not such a model folder, the source is quantised, the output exists, or the model was
            trained with a config, vocabulary or chat template other than the source's, or has a history that the source lacks.
        LayerPruneError: Training changed nothing, a trained weight is not finite, or `settings` or `data` is something else.
    """
    from ..heal.stage import write_healed
    from ..heal.student import Student

    if settings is not None and not isinstance(settings, Mapping):
        raise LayerPruneError(
            f"settings is a {type(settings).__name__}; pass a dict of what to record, such as {{'learning_rate': 5e-7}}"
        )
    names = [data] if isinstance(data, str | Path) else [*data]
    if not all(isinstance(name, str | Path) for name in names):
        raise LayerPruneError("data must be the names of data sets, such as ['org/name']")
    before, after, target = as_folder(source), as_folder(trained), as_folder(output)
    if (before / ADAPTER_CONFIG).is_file() and not (before / CONFIG).is_file():
        raise CheckpointError(
            f"{source} is an adapter, and the source must be a whole model; prune the base in the same way without adapter=True, "
            "specify that as the source, and the adapter as what was trained"
        )
    student = Student.load(source)
    lineage = load_lineage_of_weights(student.folder, str(source))
    _check_trained(student, after)
    own = Lineage.load(after)
    if own is not None and _stages(own) != _stages(lineage):
        raise CheckpointError(
            f"the {FILE_NAME} of {after} has another history than that of {source}, and the output would lack it; specify the "
            "model that this training began with as the source"
        )
    entry = {
        "stage": TRAIN,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": _to_json(dict(settings or {})),
        "data": [_describe_data(name) for name in names],
    }
    write_healed(student, after, target, entry)


def _stages(lineage: Lineage) -> list[Any]:
    """What was done, whenever that was, and whether an adapter or the whole model was written."""
    only_of_adapters = dict.fromkeys(("form", "tune_layers", "tune_lm_head"))
    return [(one["stage"], one.get("settings", {}) | only_of_adapters) for one in lineage.entries]


def _check_trained(student: Student, folder: Path) -> None:
    """Refuse a model that is more than other weights for the source: the output would lack the rest."""
    from ..publish.verify.fields import differences, unties
    from ..runtime.loading import load_config, load_tokenizer

    before = student.folder
    adapter = (folder / ADAPTER_CONFIG).is_file()
    if not adapter and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is not a model folder; specify one that has a {CONFIG} or an {ADAPTER_CONFIG}"
        )
    began = _check_adapter(student, folder) if adapter else folder  # whose layers were trained
    was, has = (load_config(one).to_dict() if (one / CONFIG).is_file() else {} for one in (before, began))
    for one, fields in ((before, was), (folder, {} if adapter else has)):
        if fields.get("quantization_config"):
            raise CheckpointError(
                f"{one} is quantised, and what was trained must not be; specify the model from before that"
            )
    if has.get(MARKER, was[MARKER]) != was[MARKER]:
        raise CheckpointError(
            f"{began} lacks other layers than {before}; specify the pruned model that training began with"
        )
    old, new = (load_tokenizer(one) if (one / TOKENIZER).is_file() else None for one in (before, folder))
    differ = {
        ".".join(path)
        for path, (one, other) in ({} if adapter else differences(was, has)).items()
        if not (_TRAINERS_OWN.fullmatch(path[-1]) or unties(path, one, other) or _is_end(path[-1], one, other, old))
    }
    if old is not None and new is not None:
        parts = {"the chat template": "chat_template", "the end token": "eos_token"}
        differ |= {what for what, part in parts.items() if getattr(old, part) != getattr(new, part)}
        differ |= {"the vocabulary"} if old.get_vocab() != new.get_vocab() else set()
    if differ:
        raise CheckpointError(
            f"{folder} differs from {before} in more than its weights: {join_words(sorted(differ))}; change that in a copy of the "
            "base, prune the copy, and train the result"
        )


def _check_adapter(student: Student, folder: Path) -> Path:
    """Refuse an adapter that can't be merged into the source; returns the folder of the cut model that it names, if any."""
    from peft import PeftConfig

    from ..adapter.config import LayerDropConfig
    from ..runtime.loading import load_config
    from ..runtime.model_class import layer_modules

    with boundary(f"can't read the adapter {folder}"):
        config = PeftConfig.from_pretrained(str(folder))
    if config.is_prompt_learning:
        raise CheckpointError(
            f"{folder} is an adapter that adds virtual tokens ({config.peft_type.value}), which no plain model can hold"
        )
    if not isinstance(config, LayerDropConfig):
        return Path(str(config.base_model_name_or_path)).expanduser()
    if config.base_model_name_or_path == student.base:
        began = load_config(student.folder)
        lacks, drops = getattr(began, MARKER), config.drop_layers
        if drops and config.num_base_layers == lacks["num_base_layers"] and sorted(drops) != lacks["drop_layers"]:
            raise CheckpointError(
                f"{folder} drops {describe_layers(drops)} of {student.base}, and {student.folder} lacks "
                f"{describe_layers(lacks['drop_layers'])}; specify a pruned model with the same cut"
            )
        repaired = layer_modules(began, student.repaired)
        if student.whole_only or set(repaired) - {*(config.repaired_modules or ())}:
            raise CheckpointError(
                f"{folder} was trained on {student.base}, without what was done to {student.folder}; specify the pruned model "
                "that training began with"
            )
    return folder  # the cut is its own, and is compared when it is loaded


def _is_end(field: str, was: Any, has: Any, tokenizer: PreTrainedTokenizerBase | None) -> bool:
    """Whether a field names no other end tokens than the model and its tokenizer did, to which trainers align configs."""
    known = [*(was if isinstance(was, list) else [was]), getattr(tokenizer, "eos_token_id", None)]
    return field == "eos_token_id" and all(one in known for one in (has if isinstance(has, list) else [has]))


def _to_json(value: Any) -> Any:
    """A setting as JSON, without local paths."""
    if isinstance(value, Mapping):
        return {str(name): _to_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple | set):
        return [_to_json(part) for part in value]
    if value is None or isinstance(value, bool | int) or (isinstance(value, float) and isfinite(value)):
        return value
    return strip_local_path(str(value))


def _describe_data(name: str | Path) -> dict[str, str]:
    name = str(name)
    on_hub = is_hub_name(name) and "/" in name and not Path(name).expanduser().exists()
    return {"name": name, "id": name} if on_hub else {"name": strip_local_path(name)}
