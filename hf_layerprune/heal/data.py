"""Training rows: read them from the Hub or from a file, and convert them to TRL's formats.

Known shapes: `prompt` and `completion`; `messages` or `conversations`; `instruction`, `input` and `output` (Alpaca), or
`instruction`, `context` and `response` (Dolly); `text`; and `input_ids`, which are used as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, boundary

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase
    from trl import DatasetMixtureConfig

logger = logging.getLogger(__name__)

TEMPLATES = ("auto", "chat", "alpaca")
_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
# Columns of an instruction, of its context, and of its answer.
_INSTRUCTIONS = (("instruction", "input", "output"), ("instruction", "context", "response"))
_ROLES = {"human": "user", "gpt": "assistant"}
_SHAPES = (
    "prompt and completion, messages, conversations, instruction and output (input is optional), instruction and "
    "response (context is optional), or text"
)

# The template of Stanford Alpaca, with which the paper trains.
_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
)
_ALPACA_INPUT = ", paired with an input that provides further context"


def load_rows(name: str, *, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """Read a data set.

    Args:
        name (`str`): A Hub id; a folder; or a `.json`, `.jsonl`, `.parquet` or `.csv` file, which becomes the split
            `train`.
        config (`str`, *optional*): The configuration of a data set on the Hub.
        streaming (`bool`, defaults to `False`): Whether to read rows only when they are needed.

    Returns:
        `DatasetDict`: Its splits.

    Raises:
        CheckpointError: There is no such data set, or it can't be read.
    """
    from datasets import load_dataset

    path = Path(name).expanduser()
    with boundary(f"can't read data set {name}"):
        if path.suffix in _BUILDERS:
            if not path.is_file():
                raise CheckpointError(f"data file {path} does not exist")
            files = {"train": str(path)}
            kind = _BUILDERS[path.suffix]
            return load_dataset(kind, data_files=files, streaming=streaming, trust_remote_code=False)
        source = str(path) if path.is_dir() else name
        return load_dataset(source, name=config, streaming=streaming, trust_remote_code=False)


def load_mixture(mixture: DatasetMixtureConfig, seed: int = 42) -> DatasetDict:
    """Read a mixture of data sets, as TRL does, but hold rows out with a seed, so that all processes agree.

    Args:
        mixture (`DatasetMixtureConfig`): The data sets, and how much of each.
        seed (`int`, defaults to 42): Seed that decides which rows are held out.

    Returns:
        `DatasetDict`: Its splits: `train` and, if rows are held out, `test`.

    Raises:
        CheckpointError: A data set can't be read, or they can't be combined.
    """
    from trl import get_dataset

    names = ", ".join(part.path for part in mixture.datasets)
    with boundary(f"can't read the mixture of {names}"):
        splits = get_dataset(replace(mixture, test_split_size=None))  # TRL draws the held-out rows without a seed
        if mixture.test_split_size is None:
            return splits
        (rows,) = splits.values()
        return rows.train_test_split(test_size=mixture.test_split_size, seed=seed)


def pick_split(rows: DatasetDict, split: str, name: str) -> Dataset:
    """Pick one split of a data set.

    Args:
        rows (`DatasetDict`): All its splits.
        split (`str`): Name of the split.
        name (`str`): The data set's name in error messages.

    Returns:
        `Dataset`: The rows of the split.

    Raises:
        CheckpointError: There is no such split.
    """
    if split not in rows:
        raise CheckpointError(f"data set {name} has no split {split!r}; it has {', '.join(rows)}")
    return rows[split]


def shape_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: str = "auto",
    name: str = "the data set",
    text_field: str = "text",
) -> Dataset:
    """Convert rows to `prompt` and `completion`, or leave them unchanged if TRL accepts them.

    Args:
        rows (`Dataset`): In one of the shapes that this module's docstring lists.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which may have a chat template.
        template (`str`, defaults to `"auto"`): For instructions: `"chat"` for the tokenizer's chat template,
            `"alpaca"` for the paper's template, `"auto"` for the chat template if there is one, otherwise Alpaca's.
            Messages always use the chat template.
        name (`str`, *optional*): The data set's name in error messages.
        text_field (`str`, *optional*): The column that holds plain text, where there is one.

    Returns:
        `Dataset`: With `prompt` and `completion`, `messages`, `text` or `input_ids`.

    Raises:
        CheckpointError: The rows have none of these shapes, or need a chat template that the tokenizer lacks.
    """
    with boundary(f"can't read data set {name}"):
        columns = rows.column_names or list(next(iter(rows)))
    if template not in TEMPLATES:
        raise CheckpointError(f"template={template!r} is unknown; it may be {', '.join(TEMPLATES)}")
    chats = tokenizer.chat_template is not None
    if "input_ids" in columns or {"prompt", "completion"} <= set(columns):
        return rows
    for conversation in ("messages", "conversations"):
        if conversation in columns:
            if not chats:
                raise CheckpointError(f"{name} has {conversation}, but the tokenizer has no chat template for them")
            with _rows_of(name):
                return _split_conversations(rows, conversation, columns)
    for question, about, answer in _INSTRUCTIONS:
        if {question, answer} <= set(columns):
            if template == "chat" and not chats:
                raise CheckpointError("template=chat, but the tokenizer has no chat template; use template=alpaca")
            make = _chat_row if template == "chat" or (template == "auto" and chats) else _alpaca_row
            names = {"question": question, "about": about, "answer": answer}
            with _rows_of(name):
                return rows.map(_from_columns, fn_kwargs={"make": make, **names}, remove_columns=columns)
    if text_field in columns:
        return rows
    raise CheckpointError(f"{name} has the columns {', '.join(columns)}, but training needs {_SHAPES}")


def _rows_of(name: str) -> AbstractContextManager[None]:
    return boundary(f"can't use the rows of {name}", "each needs all its columns, and each message a role and content")


def _from_columns(row: dict[str, Any], make: Callable, question: str, about: str, answer: str) -> dict[str, Any]:
    return make(row[question], row.get(about) or "", row[answer])


def _chat_row(instruction: str, about: str, answer: str) -> dict[str, Any]:
    question = f"{instruction}\n\n{about}" if about else instruction
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _alpaca_row(instruction: str, about: str, answer: str) -> dict[str, Any]:
    head = _ALPACA.format(_ALPACA_INPUT if about else "") + f"### Instruction:\n{instruction}\n\n"
    return {"prompt": head + (f"### Input:\n{about}\n\n" if about else "") + "### Response:\n", "completion": answer}


def _message(part: dict[str, Any]) -> dict[str, Any]:
    """A message in the format of chat templates, converted from ShareGPT's `{from, value}` if necessary."""
    if "from" not in part:
        return part
    return {"role": _ROLES.get(part["from"], part["from"]), "content": part["value"]}


def _split_conversations(rows: Dataset, column: str, columns: list[str]) -> Dataset:
    """Make the last answer the completion, and everything before it the prompt."""

    def split(row: dict[str, Any]) -> dict[str, Any]:
        messages = [_message(part) for part in row[column]]
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        return {"prompt": messages[:last], "completion": messages[last : last + 1]}

    def answers(row: dict[str, Any]) -> bool:
        return bool(row["prompt"]) and row["completion"][0]["role"] == "assistant"

    logger.info("only the last answer of each conversation is learned; everything before it is the prompt")
    shaped = rows.map(split, remove_columns=columns).filter(answers)
    if hasattr(shaped, "__len__") and not len(shaped):
        raise CheckpointError(f"no row of {column} has an answer of the assistant after another message")
    return shaped
