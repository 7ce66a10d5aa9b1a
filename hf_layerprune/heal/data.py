"""Training rows: read them from the Hub or from a file, and convert them to TRL's formats.

Known shapes: `prompt` and `completion`; `messages` or `conversations`; `instruction`, `input` and `output` (Alpaca), or
`instruction`, `context` and `response` (Dolly); `text`; and `input_ids`, which are used as they are. A model that reads
images takes a column `image` or `images` beside all but the last two.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.documents import IMAGE_COLUMNS, refuse_postscript
from ..errors import CheckpointError, CutError, boundary
from ..files.data_sets import SUFFIXES, find_json_files, read_json_files
from ..runtime.loading import has_chat_template
from ..screen import progress_bar
from .row_checks import check_text

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from trl import DatasetMixtureConfig
    from trl.scripts.utils import DatasetConfig

logger = logging.getLogger(__name__)

FILES = (*SUFFIXES, ".parquet", ".csv", ".txt")
TEXT = "text"
_TOKENS = ("input_ids",)
_PAIR = ("prompt", "completion")
_CONVERSATIONS = (("messages",), ("conversations",))
# Columns of an instruction, of its context, and of its answer.
_INSTRUCTIONS = (("instruction", "input", "output"), ("instruction", "context", "response"))
# Columns in which data sets hold what is neither text nor images.
OTHER_MEDIA = ("audio", "audios", "video", "videos")
# Columns that TRL passes on to the chat template.
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
_ROLES = {"human": "user", "gpt": "assistant"}
_KNOWN = (
    "prompt and completion, messages, conversations, instruction and output (input is optional), or instruction and "
    "response (context is optional)"
)


def load_rows(name: str, *, config: str | None = None, streaming: bool = False) -> DatasetDict:
    """Read the splits of a data set.

    `name` is a Hub id; a folder, such as one that `save_to_disk` wrote; or a `.json`, `.jsonl`, `.parquet`, `.csv` or
    `.txt` file, which becomes the split `train`. Each line of a `.txt` file is a row, unless it is blank. With
    `streaming`, rows are only read when they are needed.

    Raises:
        CheckpointError: There is no such data set, or it can't be read.
        CutError: It has no configurations.
    """
    from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    path = Path(os.path.expanduser(name))
    kind = path.suffix.lower()
    with _read_errors(f"data set {name}"):
        if kind in FILES and not path.is_file():
            raise CheckpointError(
                f"data file {path} does not exist; specify a file, a folder, or a data set on the Hub"
            )
        if path.is_file() and kind not in FILES:
            raise CheckpointError(f"{path} is not a {', '.join(FILES)} file; convert or unpack it")
        saved = any((path / record).is_file() for record in ("dataset_dict.json", "state.json"))
        if config is not None and (saved or path.is_file()):
            raise CutError(f"--dataset_config has no effect on {path}, which has no configurations; leave it out")
        if saved:  # by `save_to_disk`; `load_dataset` would also read what `map` has cached there
            stored = load_from_disk(path)
            splits = stored if isinstance(stored, DatasetDict) else {"train": stored}
            if streaming:
                return IterableDatasetDict({split: rows.to_iterable_dataset() for split, rows in splits.items()})
            return DatasetDict(splits)
        if files := find_json_files(str(path), name=config):
            return read_json_files(files, streaming=streaming)
        if kind in FILES:
            reader, more = ("text", {"encoding": "utf-8-sig"}) if kind == ".txt" else (kind[1:], {})
            where = {"train": glob.escape(str(path))}
            rows = load_dataset(reader, data_files=where, streaming=streaming, trust_remote_code=False, **more)
            if kind != ".txt":
                return rows
            logger.info("each line of %s is a row; texts of several lines need a .jsonl file", path)
            return rows.filter(str.strip, input_columns=[TEXT])
        source = str(path) if path.is_dir() else name
        return load_dataset(source, name=config, streaming=streaming, trust_remote_code=False)


@contextmanager
def _read_errors(what: str) -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError

    with boundary(f"can't read {what}"):
        try:
            yield
        except DatasetGenerationError as error:  # says nothing of its cause
            raise error.__cause__ or error from None


def load_mixture(mixture: DatasetMixtureConfig, seed: int = 42) -> DatasetDict:
    """Read a mixture of data sets.

    The splits are `train` and, if rows are held out, `test`; the seed decides which, so that all processes agree.

    Raises:
        CheckpointError: A data set can't be read, or they can't be combined.
    """
    from transformers import set_seed
    from trl import get_dataset

    with _read_errors(f"the mixture of {', '.join(part.path for part in mixture.datasets)}"):
        mixture = replace(mixture, datasets=[_json_to_arrow(part) for part in mixture.datasets])
        set_seed(seed)  # TRL draws the held-out rows without a seed of its own
        return get_dataset(mixture)


def _json_to_arrow(part: DatasetConfig) -> DatasetConfig:
    """A part of a mixture; if it is of local JSON files, with the same rows in Arrow's format."""
    from datasets.utils.py_utils import map_nested

    part = replace(part, path=os.path.expanduser(part.path))
    if part.data_files:
        part = replace(part, data_files=map_nested(os.path.expanduser, part.data_files))
    files = find_json_files(part.path, name=part.name, data_dir=part.data_dir, data_files=part.data_files)
    if files is None:
        return part
    splits = read_json_files(files)
    stored: Any = {name: [file["filename"] for file in rows.cache_files] for name, rows in splits.items()}
    return replace(part, path="arrow", name=None, data_dir=None, data_files=stored)


def pick_split(rows: DatasetDict, split: str, name: str) -> Dataset:
    """One split of a data set; `name` is the data set's name in errors.

    Raises:
        CutError: The data set does not have this split.
    """
    if split not in rows:
        part = "; a part of a split is named under `datasets` in a settings file" if "[" in split else ""
        raise CutError(f"data set {name} has no split {split!r}; it has {', '.join(rows)}{part}")
    return rows[split]


def shape_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    template: str = "auto",
    name: str = "the data set",
    text_field: str = TEXT,
    load_processor: Callable[[], ProcessorMixin] | None = None,
    whole: bool = False,
    folder: Path = Path(),
) -> Dataset:
    """Convert rows to `prompt` and `completion`, or leave them unchanged if TRL accepts them.

    Args:
        rows (`Dataset`): In one of the shapes that this module's docstring lists.
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer, which may have a chat template.
        template (`str`, defaults to `"auto"`): For instructions: `"chat"` for the tokenizer's chat template,
            `"alpaca"` for the paper's template, `"auto"` for the chat template if there is one, otherwise Alpaca's.
            Messages always use the chat template.
        name (`str`, *optional*): The data set's name in error messages.
        text_field (`str`, *optional*): The column that holds plain text, where there is one. A name other than `"text"`
            was chosen by the user, so no other column is used then.
        load_processor (`Callable`, *optional*): Loads the processor of a model that reads images; `None` for one that
            reads text alone.
        whole (`bool`, defaults to `False`): Leave conversations whole, so that all their answers can be trained on.
        folder (`Path`, *optional*): The folder that paths of images are relative to.

    Returns:
        `Dataset`: With `prompt` and `completion`, `messages`, `text` or `input_ids`, and the images if there are any.

    Raises:
        CutError: The rows have none of these shapes, need a chat template that the tokenizer lacks, or lack an answer.
        CheckpointError: They can't be read.
    """
    with boundary(f"can't read data set {name}"):
        columns = rows.column_names or list(next(iter(rows), ()))
    if not columns:
        raise CutError(f"{name} has no rows; specify a set with rows to train on")
    images = _find_images(columns, name, load_processor is not None)
    if images:
        rows = _open_images(rows, images, folder, name)
        columns = [column for column in columns if column not in images]
    chatting = has_chat_template(load_processor() if images and load_processor else tokenizer)
    shape = _find_shape(columns, images, text_field, name)
    if template != "auto" and shape not in _INSTRUCTIONS:
        logger.info("template=%s has no effect on %s, whose rows are no instructions", template, name)
    if shape == _TOKENS:
        return rows
    _log_unused_columns(columns, *shape)
    if shape == (text_field,):
        return rows.select_columns([text_field])
    if shape in _CONVERSATIONS:
        if not chatting:
            other = "prompt and completion" if images else "plain text"
            raise CutError(
                f"{name} has {shape[0]}, but the tokenizer has no chat template for them; specify a set with {other}"
            )
        with _row_errors(name):
            return _split_conversations(rows, shape[0], columns, whole)
    if shape in _INSTRUCTIONS:
        if template == "chat" and not chatting:
            raise CutError("template=chat, but the tokenizer has no chat template; use template=alpaca")
        make = _chat_row if template != "alpaca" and chatting else alpaca_row
        check_text(rows, name, (shape[0], shape[-1]))
        with _row_errors(name):
            return rows.map(lambda row: make(*(row.get(key) or "" for key in shape)), remove_columns=columns)
    return rows


def _find_shape(columns: list[str], images: list[str], text_field: str, name: str) -> tuple[str, ...]:
    """The columns to train on: those of the first shape that the rows have, or the one that the user chose.

    Raises:
        CutError: There are none.
    """
    chosen = text_field != TEXT and not images
    shapes = [_TOKENS, _PAIR, *_CONVERSATIONS, *_INSTRUCTIONS, *([] if images else [(TEXT,)])]
    for shape in [(text_field,)] if chosen else shapes:
        if {shape[0], shape[-1]} <= set(columns):  # the context of an instruction is optional
            return shape
    if chosen:
        raise CutError(
            f"{name} has no column {text_field}, which --dataset_text_field names; it has {', '.join(columns)}"
        )
    if images:
        raise CutError(f"{name} has {', '.join(images)}, and training on images needs {_KNOWN} as well")
    raise CutError(f"{name} has the columns {', '.join(columns)}, but training needs {_KNOWN}, or text")


def _log_unused_columns(columns: list[str], *used: str) -> None:
    """Say which columns are not trained on, such as one of system prompts, or the text of an instruction."""
    read = [column for column in columns if column in (*used, *TEMPLATE_COLUMNS)]
    if len(read) < len(columns):
        logger.info("used columns: %s; not used: %s", ", ".join(read), ", ".join(c for c in columns if c not in read))


def _find_images(columns: list[str], name: str, reads_images: bool) -> list[str]:
    """The columns of images; refuse them for a model that reads text alone, and any other media."""
    if media := [column for column in OTHER_MEDIA if column in columns]:
        raise CutError(f"{name} has {', '.join(media)}, and healing trains on text and images; leave it out")
    images = [column for column in IMAGE_COLUMNS if column in columns]
    if images and not reads_images:
        raise CutError(f"{name} has {', '.join(images)}, and the model reads only text; leave that column out")
    return images


def has_images(rows: Any) -> bool:
    """Whether shaped rows have images, which TRL's own path for them trains on."""
    return any(column in IMAGE_COLUMNS for column in getattr(rows, "column_names", None) or ())


def _open_images(rows: Dataset, columns: list[str], folder: Path, name: str) -> Dataset:
    """Make images of the paths of images, which are relative to a folder, and read every image once.

    Training may come to a damaged one only after hours. Streamed rows are not read.
    """
    from datasets import Image, Sequence

    refuse_postscript()

    def found(path: str) -> str:
        if not (folder / path).is_file():
            raise CheckpointError(
                f"the rows name the image {path}, and {folder / path} is not a file; write paths relative to the data, or where "
                "data sets of several folders are mixed, absolute ones"
            )
        return str(folder / path)

    for column in columns:
        feature: Any = (rows.features or {}).get(column)
        each = getattr(feature, "feature", None)
        if getattr(each or feature, "dtype", None) not in ("string", "large_string"):
            continue
        with _row_errors(name):
            if each is None:
                rows = rows.map(lambda row, column=column: {column: found(row[column])}).cast_column(column, Image())
            else:
                rows = rows.map(lambda row, column=column: {column: [found(path) for path in row[column]]})
                rows = rows.cast_column(column, Sequence(Image()))
    images = rows.select_columns(columns)
    for number in progress_bar(range(len(images)), desc="reading images") if hasattr(rows, "__len__") else ():
        with boundary(f"an image in row {number + 1} of {name} can't be read", "replace it, or leave the row out"):
            images[number]
    return rows


def _row_errors(name: str) -> AbstractContextManager[None]:
    return boundary(f"can't use the rows of {name}", "each needs all its columns, and each message a role and content")


def _chat_row(instruction: str, context: str, answer: str) -> dict[str, Any]:
    question = f"{instruction}\n\n{context}" if context else instruction
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def alpaca_row(instruction: str, context: str, answer: str) -> dict[str, Any]:
    """The template of Stanford Alpaca, with which the paper trains."""
    paired = ", paired with an input that provides further context" if context else ""
    task = f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the"
    prompt = f"{task} request.\n\n### Instruction:\n{instruction}\n\n"
    return {"prompt": prompt + f"### Input:\n{context}\n\n" * bool(context) + "### Response:\n", "completion": answer}


def _split_conversations(rows: Dataset, column: str, columns: list[str], whole: bool) -> Dataset:
    """Make the last answer the completion, and everything before it the prompt; or `messages` of all, if `whole`."""

    def message(part: dict[str, Any]) -> dict[str, Any]:
        if "from" not in part:
            return part
        return {"role": _ROLES.get(part["from"], part["from"]), "content": part["value"]}  # ShareGPT

    def split(row: dict[str, Any]) -> dict[str, Any]:
        messages = list(map(message, row[column]))
        last = max((i for i, turn in enumerate(messages) if turn["role"] == "assistant"), default=0)
        if whole:
            return {"messages": messages[: last + 1] if last else []}
        return {"prompt": messages[:last], "completion": messages[last : last + 1]}

    if not whole:
        logger.info("only the last answer of each conversation is learned; everything before it is the prompt")
    kept = "messages" if whole else "prompt"
    others = [column for column in columns if column not in TEMPLATE_COLUMNS]
    shaped = rows.map(split, remove_columns=others).filter(bool, input_columns=[kept])
    if hasattr(shaped, "__len__") and len(shaped) < len(rows):
        why = "has an assistant's answer after another message (roles: assistant, or gpt after human)"
        if not len(shaped):
            raise CutError(f"no row of {column} {why}; specify a set with such rows")
        logger.warning("left out: %d of %d rows, since not each %s", len(rows) - len(shaped), len(rows), why)
    return shaped
