"""Training rows, sampled and formatted as in the paper's code, in files that `recipes/sft_tail.py` reads.

prepare_rows({"name": "yahma/alpaca-cleaned", "test_rows": 2000}, Path("data/alpaca"), tokenizer)
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_layerprune.errors import CheckpointError
from hf_layerprune.files.folders import new_folder
from hf_layerprune.heal.data import load_rows, pick_split, shape_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_SEED = 42


def prepare_rows(data: dict[str, Any], folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write `train.jsonl` and `test.jsonl` to a new folder, atomically.

    Args:
        data (`dict[str, Any]`): `name`, and optionally `config`, `split` and `test_split`; `test_rows` to hold out;
            `longest`, the most tokens of a row; `shape`, `"choices"` for multiple-choice questions; `whole_sequence`,
            to train on prompts too.
        folder (`Path`): The folder to create.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Raises:
        CheckpointError: The data set can't be loaded, or lacks required columns.
    """
    splits = load_rows(data["name"], config=None if Path(data["name"]).exists() else data.get("config"))
    name = Path(data["name"]).name
    is_file = Path(data["name"]).is_file()
    train = pick_split(splits, "train" if is_file else data.get("split", "train"), name)
    if not is_file and "test_split" in data:
        test = pick_split(splits, data["test_split"], name)
    else:
        held_out = min(data.get("test_rows", len(train) // 10), len(train) // 10)
        parts = train.train_test_split(test_size=held_out, shuffle=True, seed=_SEED)
        train, test = parts["train"], parts["test"]
    with new_folder(folder) as new:
        for split, rows in {"train": train, "test": test}.items():
            _shape(rows, data, tokenizer, name).to_json(new / f"{split}.jsonl")


def _shape(rows: Dataset, data: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str) -> Dataset:
    if data.get("shape") == "choices":
        missing = {"question", "choices", "answer"} - set(rows.column_names)
        if missing:
            raise CheckpointError(f"{name} has no {', '.join(sorted(missing))}, which multiple-choice rows need")
        rows = rows.map(_question, remove_columns=rows.column_names)
    rows = shape_rows(rows, tokenizer, "alpaca", name)
    if not ("longest" in data or data.get("whole_sequence")):
        return rows

    def tokenise(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids
        # Where the marker of the paper's code is the first token of a text, every token but padding is trained on,
        # and every token with the id of padding, 0, counts as padding.
        return {"input_ids": ids, "completion_mask": [int(i not in (0, tokenizer.bos_token_id)) for i in ids]}

    long = rows.map(tokenise)
    kept = [i for i, ids in enumerate(long["input_ids"]) if len(ids) <= data.get("longest", len(ids))]
    if data.get("whole_sequence"):
        return long.select(kept).select_columns(["input_ids", "completion_mask"])
    return rows.select(kept)


def _question(row: dict[str, Any]) -> dict[str, str]:
    letters = [chr(ord("A") + i) for i in range(len(row["choices"]))]
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(letters, row["choices"], strict=True))
    return {"prompt": f"{row['question']} {choices}\nAnswer:", "completion": f" ({letters[row['answer']]})"}
