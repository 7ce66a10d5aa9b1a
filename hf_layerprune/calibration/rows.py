"""Calibration sets: the rows of tokens that criteria and repairs use.

    calibration = load_calibration("self", tokenizer, model=model)             # text written by the dense model
    calibration = load_calibration("notes.txt", tokenizer, samples=64)         # a local text file
    calibration = load_calibration("rows.jsonl:output", tokenizer)             # a column of a local file
    calibration = load_calibration("allenai/c4@en:train:text", tokenizer)      # a column of a data set on the Hub

Rows are windows without padding: documents are concatenated, separated by an end-of-text token, and a seeded random
sample of the windows is used.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, CutError, LayerPruneError, boundary
from ..files.json_file import parse_json
from ..files.text_file import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SELF = "self"
_HELD_BACK = ("test", "validation", "valid", "dev")
# How many times the required number of tokens is read, so that rows don't all come from the first documents.
_POOL = 4
# Characters of a text file that are tokenised at once; size of the shuffle buffer for streamed data sets, in rows.
_PIECE = 1 << 16
_BUFFER = 1000


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of tokens.

    Args:
        input_ids (`torch.Tensor`): `[samples, length]`, int64, without padding.
        source (`str`): Where they come from, as given by the user.
        fingerprint (`str`): sha256 of the tokens and their shape.
        seed (`int`, defaults to 42): The seed that the rows were sampled with.
    """

    input_ids: torch.Tensor
    source: str
    fingerprint: str
    seed: int = 42

    @classmethod
    def of(cls, input_ids: torch.Tensor, source: str, seed: int = 42) -> CalibrationSet:
        """Make a set of rows of tokens `[samples, length]`."""
        input_ids = input_ids.to(torch.int64).cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(input_ids.shape)}".encode() + input_ids.numpy().astype("<i8").tobytes())
        return cls(input_ids, source, digest.hexdigest(), seed)

    def __len__(self) -> int:
        return len(self.input_ids)

    def batches(self, size: int) -> Iterator[torch.Tensor]:
        """The rows, `size` at a time."""
        yield from self.input_ids.split(size)

    def split(self, held_out: float) -> tuple[CalibrationSet, CalibrationSet]:
        """Hold out a share of the rows.

        Args:
            held_out (`float`): The share, between 0 and 1; both parts have at least one row.

        Returns:
            `tuple[CalibrationSet, CalibrationSet]`: The remaining rows, and the held-out ones.

        Raises:
            CutError: There are fewer than two rows.
        """
        if len(self) < 2:
            raise CutError("one calibration row can't be split; raise calibration_samples")
        count = min(len(self) - 1, max(1, round(held_out * len(self))))
        first, second = self.input_ids.split([len(self) - count, count])
        return CalibrationSet.of(first, self.source, self.seed), CalibrationSet.of(second, self.source, self.seed)

    def record(self) -> dict[str, Any]:
        """The entry for `lineage.json`."""
        samples, length = self.input_ids.shape
        shape = {"source": self.source, "samples": samples, "length": length}
        return shape | {"seed": self.seed, "fingerprint": self.fingerprint}


def load_calibration(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 42,
    model: PreTrainedModel | None = None,
) -> CalibrationSet:
    """Load a calibration set.

    Args:
        source (`str`): `"self"`, a `.txt`, `.json` or `.jsonl` file (`rows.jsonl:column`, `text` by default), or
            `id[@config][:split[:column]]` of a data set on the Hub (split `train` and column `text` by default). A
            column holds text, or chats as lists of messages.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The model's tokenizer. Optional for `"self"`, where text
            then starts from the beginning-of-text token instead of an empty chat turn.
        samples (`int`, defaults to 128): How many rows.
        length (`int`, defaults to 512): How many tokens per row.
        seed (`int`, defaults to 42): For sampling the rows, or the text.
        model (`PreTrainedModel`, *optional*): The dense model. It writes the text for `"self"`; otherwise every token
            is checked against its vocabulary.

    Returns:
        `CalibrationSet`: The rows.

    Raises:
        CheckpointError: The text can't be read, is empty, or too short.
        CutError: A setting is out of range, or the model or tokenizer it needs is missing.
    """
    for name, value, least in (("calibration_samples", samples, 1), ("calibration_length", length, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise CutError(f"{name}={value!r} must be a whole number, {least} or more")
    config = None if model is None else model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if isinstance(limit, int) and 0 < limit < length:
        raise CutError(
            f"calibration_length={length} is more than the {limit} positions of the model; use {limit} or less"
        )
    if source == SELF:
        if model is None:
            raise CutError('calibration="self" is text written by the dense model; pass the model')
        from .self_text import write_text_with

        return CalibrationSet.of(write_text_with(model, tokenizer, samples, length, seed), source, seed)
    if tokenizer is None:
        raise CutError(f"calibration={source!r} needs the model's tokenizer")
    ids = _tokens(_documents(source, seed), tokenizer, samples * length * _POOL)
    rows = len(ids) // length
    if rows < samples:
        raise CheckpointError(
            f"calibration {source} is too short: {len(ids):,} tokens make {rows} rows of {length}, not "
            f"{samples}; use calibration_samples={rows or 1}, a smaller calibration_length, or more text"
        )
    chosen = sorted(Random(seed).sample(range(rows), samples))
    calibration = CalibrationSet.of(torch.tensor(ids[: rows * length]).view(rows, length)[chosen], source, seed)
    check_vocabulary(calibration, model)
    return calibration


def check_vocabulary(calibration: CalibrationSet, model: PreTrainedModel | None) -> None:
    """Refuse tokens outside a model's vocabulary.

    Raises:
        CheckpointError: A token is outside the model's embeddings.
    """
    if model is None:
        return
    embeddings: Any = model.get_input_embeddings()
    size, largest = embeddings.weight.shape[0], int(calibration.input_ids.max())
    if largest >= size:
        raise CheckpointError(
            f"the calibration set has token {largest}, but the model's vocabulary ends at {size - 1}; use the "
            "tokenizer of this model"
        )


# --- text from files and data sets ----------------------------------------------------------------------


def _documents(source: str, seed: int) -> Iterator[str | list[dict[str, Any]]]:
    name, _, column = source.partition(":")
    path = Path(name).expanduser()
    named = path.suffix in (".txt", ".json", ".jsonl") or (name.startswith((".", "/", "~")) and not path.is_dir())
    if path.is_file():
        documents = _rows(path, column or "text") if path.suffix in (".json", ".jsonl") else _text(path)
        Random(seed).shuffle(documents)
        yield from documents
    elif named:
        raise CheckpointError(
            f"calibration file {path} does not exist; name a .txt or .jsonl file, a data set on the Hub, or self"
        )
    else:
        yield from _data_set(source, seed)


def _read(path: Path) -> str:
    text = read_text(path)
    if "\0" in text:
        raise CheckpointError(f"calibration file {path} is binary; name a text file")
    if not text.strip():
        raise CheckpointError(f"calibration file {path} is empty; name one with text")
    return text


def _text(path: Path) -> list[str]:
    """The text in large pieces, so that their boundaries matter little."""
    text = _read(path)
    return [text[start : start + _PIECE] for start in range(0, len(text), _PIECE)]


def _rows(path: Path, column: str) -> list[str | list[dict[str, Any]]]:
    text = _read(path)
    if path.suffix == ".json":
        try:
            rows = parse_json(text, str(path))
        except CheckpointError as error:
            raise CheckpointError(f"{error}; is it JSON lines? Then name it .jsonl") from error
        if not isinstance(rows, list):
            raise CheckpointError(f"{path} is not a list of rows; write one row per line and name it .jsonl")
        found = {f"row {number}": row for number, row in enumerate(rows)}
    else:
        lines = {f"line {number}": line for number, line in enumerate(text.split("\n"), 1) if line.strip()}
        found = {where: parse_json(line, f"{where} of {path}") for where, line in lines.items()}
    return [_document(row, column, f"{where} of {path}", str(path)) for where, row in found.items()]


def _document(row: Any, column: str, where: str, source: str) -> str | list[dict[str, Any]]:
    """The text or the chat, a list of messages, in a column of a row."""
    value = row.get(column) if isinstance(row, dict) else None
    is_chat = isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
    if isinstance(value, str) or is_chat:
        return value  # type: ignore[return-value]
    has = ", ".join(row) if isinstance(row, dict) else f"a {type(row).__name__}"
    raise CheckpointError(f"{where} has no text in {column!r}, only {has}; name the column: {source}:COLUMN")


def _data_set(source: str, seed: int) -> Iterator[str | list[dict[str, Any]]]:
    try:
        from datasets import load_dataset
    except ImportError:
        need = 'data sets on the Hub need the package datasets; pip install "hf-layerprune[eval]"'
        raise LayerPruneError(need) from None
    name, _, rest = source.partition(":")
    split, _, column = rest.partition(":")
    name, _, config = name.partition("@")
    split, column = split or "train", column or "text"
    if split.partition("[")[0] in _HELD_BACK:
        logger.warning("calibration uses the %s split of %s; don't evaluate on it afterwards", split, name)
    with boundary(f"can't read calibration {source}"):
        # Streamed, so that only the rows that are used are downloaded.
        rows = load_dataset(name, config or None, split=split, streaming=True, trust_remote_code=False)
        for row in rows.shuffle(seed, buffer_size=_BUFFER):
            yield _document(row, column, name, f"{name}:{split}")


def _tokens(
    documents: Iterator[str | list[dict[str, Any]]], tokenizer: PreTrainedTokenizerBase, enough: int
) -> list[int]:
    ids: list[int] = []
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if isinstance(document, str):
            with boundary("the tokenizer can't read the calibration set"):
                ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids + between
        elif tokenizer.chat_template is None:
            raise CheckpointError(
                "the calibration set has chats, but the tokenizer has no chat template; name a set with plain text"
            )
        else:
            with boundary("the tokenizer's chat template can't render the calibration set", "name plain text instead"):
                chat: Any = tokenizer.apply_chat_template(document, return_dict=True)
            ids += chat.input_ids
        if len(ids) >= enough:
            break
    return ids
