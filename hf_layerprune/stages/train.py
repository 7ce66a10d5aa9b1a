"""The train stage: record that another program trained a pruned model.

trainer = DPOTrainer("pruned", args, train_dataset=pairs)
trainer.train()
trainer.save_model("dpo")
record_trained("pruned", "dpo", "preferred", settings={"method": "DPO"}, data=["pairs.jsonl"])
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..options.quantities import join_words
from ..records.fingerprints import ADAPTER_CONFIG, CONFIG, fingerprint, weights_hash
from ..records.history import TRAIN
from ..records.lineage import FILE_NAME, Lineage
from ..records.names import is_hub_name, strip_local_path

if TYPE_CHECKING:
    from ..heal.student import Student

# Trainers set these for their own use.
_TRAINERS_OWN = ("dtype", "pad_token_id")
_TOKENIZER = "tokenizer_config.json"


def record_trained(
    source: str | Path,
    trained: str | Path,
    output: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    data: Sequence[str] = (),
) -> None:
    """Write a model that another program trained, with its history, so that `verify`, the card and `push` understand it.

    Only the trained weights are taken. The output has the config, tokenizer, chat template, generation settings, licence
    and data type of the source. Its history says which tensors training changed; how it was trained, it says in your
    words.

    Args:
        source (`str` or `Path`): The pruned model from before the training: a Hub id, or a folder with its
            `lineage.json`.
        trained (`str` or `Path`): What the trainer saved: a folder with a whole model, or with a PEFT adapter, which is
            merged.
        output (`str` or `Path`): The folder to write.
        settings (`Mapping[str, Any]`, *optional*): How it was trained, for the history and the card, as JSON:
            `{"method": "DPO", "learning_rate": 5e-7}`. Nothing checks it.
        data (`Sequence[str]`, *optional*): The data sets that it was trained on: Hub ids, or other names.

    Raises:
        CheckpointError: A folder is not such a model folder, the output exists, or the model was trained with another
            config, vocabulary or chat template than the source's.
        LayerPruneError: Training changed nothing.
    """
    from ..heal.stage import write_healed
    from ..heal.student import Student

    student, after = Student.load(source), Path(trained).expanduser()
    lineage = Lineage.load_required(student.folder, str(source))
    if not lineage.entries or lineage.entries[-1].get("weights") != weights_hash(fingerprint(student.folder)):
        raise CheckpointError(
            f"the weights of {source} are not those that its {FILE_NAME} names; specify the folder that they belong to"
        )
    _check_trained(student, after)
    entry = {
        "stage": TRAIN,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": _to_json(settings or {}),
        "data": [_describe_data(name) for name in data],
    }
    write_healed(student, after, Path(output).expanduser(), entry)


def _check_trained(student: Student, folder: Path) -> None:
    """Refuse a model that is more than other weights for the source: the output would lack the rest."""
    from ..publish.verify.fields import differences
    from ..runtime.loading import load_config, load_tokenizer

    adapter, name = (folder / ADAPTER_CONFIG).is_file(), student.folder
    if not adapter and not (folder / CONFIG).is_file():
        raise CheckpointError(
            f"{folder} is not a model folder; specify one that has a {CONFIG} or an {ADAPTER_CONFIG}"
        )
    differ = set()
    if not adapter:
        was, has = (load_config(one).to_dict() for one in (name, folder))
        differ = {".".join(path) for path in differences(was, has) if path[-1] not in _TRAINERS_OWN}
    if (folder / _TOKENIZER).is_file() and (name / _TOKENIZER).is_file():
        old, new = load_tokenizer(name), load_tokenizer(folder)
        parts = {"the chat template": "chat_template", "the end token": "eos_token"}
        differ |= {what for what, part in parts.items() if getattr(old, part) != getattr(new, part)}
        differ |= {"the vocabulary"} if old.get_vocab() != new.get_vocab() else set()
    if differ:
        raise CheckpointError(
            f"{folder} is not {name} with other weights alone: {join_words(sorted(differ))} differ; change these in a copy of "
            "the base, prune that, and train the result"
        )


def _to_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(dict(settings), default=str))
    return {name: strip_local_path(value) if isinstance(value, str) else value for name, value in plain.items()}


def _describe_data(name: str) -> dict[str, str]:
    on_hub = is_hub_name(name) and "/" in name and not Path(name).expanduser().exists()
    return {"name": name, "id": name} if on_hub else {"name": strip_local_path(name)}
