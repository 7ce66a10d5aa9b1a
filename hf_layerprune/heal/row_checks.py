"""Whether rows hold what training can use: text, or ids of tokens that the model knows, with a label for each.

Columns are read as Arrow tables, so that a million rows take seconds. The chat template, which takes longer, is tried on
the first rows. Rows that are streamed are not checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import CutError, boundary

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_TABLE_ROWS = 1000
_MAX_CHATS = 10_000  # conversations that are tried, which takes some 2 seconds
_UNLABELLED = -100
# Columns with a value for each token.
_TOKEN_COLUMNS = ("labels", "completion_mask", "assistant_masks")


def check_rows(rows: Dataset, name: str, text_field: str, vocab_size: int | None) -> None:
    """Check rows in the shapes that TRL takes; if there is plain text, it is in the column `text_field`.

    Raises:
        CutError: A value is not text, or not the id of a token, or a token has no label; or text and messages are mixed.
    """
    columns = rows.column_names or ()
    if "input_ids" in columns:
        _check_ids(rows, name, [column for column in ("input_ids", *_TOKEN_COLUMNS) if column in columns], vocab_size)
    elif {"prompt", "completion"} <= set(columns):
        first = next(iter(rows), {"prompt": "", "completion": ""})
        if isinstance(first["prompt"], list) != isinstance(first["completion"], list):
            raise CutError(
                f"{name} has text and messages side by side; make prompt and completion both text, or both messages"
            )
        check_text(rows, name, ("prompt", "completion"), messages=True)
    elif text_field in columns:
        check_text(rows, name, (text_field,))


def check_chats(rows: Dataset, name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse conversations, in a shape that TRL takes, that the chat template does not; the first 10,000 are tried."""
    from datasets import Dataset
    from trl import is_conversational

    if not isinstance(rows, Dataset) or not rows or "input_ids" in rows.column_names or not is_conversational(rows[0]):
        return
    for index, row in enumerate(rows.select(range(min(len(rows), _MAX_CHATS)))):
        tools, more = row.get("tools"), row.get("chat_template_kwargs", {})
        with boundary(f"the chat template can't take row {index} of {name}", "correct it, or leave it out", CutError):
            messages = row["messages"] if "messages" in row else row["prompt"] + row["completion"]
            tools = json.loads(tools) if isinstance(tools, str) else tools
            tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **more)


def check_text(rows: Dataset, name: str, columns: Sequence[str], *, messages: bool = False) -> None:
    """Refuse columns that hold anything but text or, with `messages`, text or messages."""
    from pyarrow import compute, types

    for first, table in _tables(rows, columns):
        for column in columns:
            values, row = table[column], 0
            if values.null_count:
                row = compute.index(values.is_null(), True).as_py()
            elif not types.is_primitive(values.type) and (messages or not types.is_nested(values.type)):
                continue
            raise _error(name, first + row, column, values[row].as_py(), "text")


def _check_ids(rows: Dataset, name: str, columns: Sequence[str], vocab_size: int | None) -> None:
    for first, table in _tables(rows, columns):
        if not _are_ids(table, vocab_size):
            row = next(row for row in range(len(table)) if not _are_ids(table.slice(row, 1), vocab_size))
            most = "" if vocab_size is None else f" below {vocab_size}"
            needs = f"token ids{most}, as many in each column, or -100 for no label"
            raise _error(name, first + row, " and ".join(columns), table.slice(row, 1).to_pylist()[0], needs)


def _are_ids(table: Any, vocab_size: int | None) -> bool:
    """Whether every row has lists of ids of the same length, checked column by column, which is fast."""
    from pyarrow import compute, types

    lengths = None
    for column in table.column_names:
        lists = table[column].combine_chunks()
        are_lists = (types.is_list, types.is_large_list, types.is_fixed_size_list)
        if not any(check(lists.type) for check in are_lists) or lists.null_count:
            return False
        values, own = compute.list_flatten(lists), compute.list_value_length(lists).cast("int64")
        whole = types.is_integer(values.type) or (types.is_boolean(values.type) and column.endswith(("mask", "masks")))
        if not own.equals(lengths or own) or (len(values) and not whole) or values.null_count:
            return False
        lengths = own
        if not len(values):  # of lists that are all empty, the type is not known
            continue
        if column == "labels":
            values = values.filter(compute.not_equal(values, _UNLABELLED))
        least, most = compute.min_max(values).as_py().values()
        if least is not None and (least < 0 or (vocab_size is not None and most >= vocab_size)):
            return False
    return True


def _tables(rows: Dataset, columns: Sequence[str]) -> Iterator[tuple[int, Any]]:
    """Arrow tables of some columns, each with the number of its first row."""
    from datasets import Dataset

    if isinstance(rows, Dataset):
        tables = rows.select_columns(list(columns)).with_format("arrow").iter(_TABLE_ROWS)
        yield from zip(range(0, len(rows), _TABLE_ROWS), tables, strict=True)


def _error(name: str, row: int, column: str, value: Any, needs: str) -> CutError:
    seen = repr(value)
    seen = seen if len(seen) <= 60 else f"{seen[:57]}..."
    return CutError(
        f"row {row} of {name} has {seen} in column {column}, which needs {needs}; correct it, or leave that row out"
    )
