"""Text for calibration, and images that go with it: from files, folders and data sets on the Hub."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from ..errors import CheckpointError, LayerPruneError, boundary
from ..files.data_sets import SUFFIXES, find_json_files, read_json_files
from ..files.json_file import JSON_TYPES
from ..files.json_rows import read_rows
from ..files.text_file import MAX_TEXT, read_text

logger = logging.getLogger(__name__)

_EVAL_SPLITS = ("test", "validation", "valid", "dev")
# Characters of a text file that are tokenised at once; size of the shuffle buffer for streamed data sets, in rows.
_PIECE_CHARACTERS = 1 << 16
_BUFFER = 1000
# Columns in which data sets have images.
IMAGE_COLUMNS = ("image", "images")


@dataclass(frozen=True)
class Document:
    """One row of a file or a data set.

    Args:
        text (`str` or `list[dict]`): Text, or a chat as a list of messages.
        images (`tuple`, *optional*): Its images, as the data set stores them; `None` if the data set has no images at all.
        where (`str`): Its name in messages.
        folder (`Path`): The folder that image paths are relative to.
    """

    text: str | list[dict[str, Any]]
    images: tuple[Any, ...] | None = None
    where: str = ""
    folder: Path = Path()


def split_source(source: str) -> tuple[str, str]:
    """The file or data set that a source names, and what follows its colon; Windows has another one after a drive."""
    drive, path = os.path.splitdrive(source)
    name, _, part = path.partition(":")
    return drive + name, part


def check_source(source: str) -> None:
    """Refuse a file that does not exist; called before a model is loaded.

    Raises:
        CheckpointError: The file does not exist.
    """
    name, _ = split_source(source)
    path = Path(os.path.expanduser(name))
    # A name that can't be a data set's id is a path or a glob pattern, which may contain spaces, or else literal text.
    no_id = name.startswith((".", "/", "~")) or len(name.split()) > 1
    named = path.suffix.lower() in (".txt", *SUFFIXES) or (
        no_id and not os.path.isdir(_split_config(name)[0]) and not glob.glob(str(path))
    )
    if named and not os.path.isfile(path):
        raise CheckpointError(
            f"calibration file {str(path)[:200]} does not exist; specify a .txt, .jsonl or .parquet file, a data set, or self"
        )


def read_documents(source: str, seed: int) -> Iterator[Document]:
    """Read the rows of a file or data set, or the pieces of a text, in an order that the seed determines.

    Raises:
        CheckpointError: It can't be read, or a row has no text.
        LayerPruneError: A data set needs a package that is missing.
    """
    check_source(source)
    name, column = split_source(source)
    path = Path(os.path.expanduser(name))
    kind = path.suffix.lower()
    if path.is_file() and kind != ".parquet":
        if column and kind not in SUFFIXES:
            raise CheckpointError(f"calibration file {path} is read as one text, without columns; omit :{column}")
        documents = _read_rows(path, column or "text") if kind in SUFFIXES else _read_text(path)
        Random(seed).shuffle(documents)
        yield from documents
    else:
        yield from _read_data_set(source, seed)


def _read_text(path: Path) -> list[Document]:
    """Large pieces of a text, so that their boundaries matter little."""
    text = read_text(path)
    if "\0" in text:
        raise CheckpointError(f"calibration file {path} is binary; specify a text file")
    return [Document(text[start : start + _PIECE_CHARACTERS]) for start in range(0, len(text), _PIECE_CHARACTERS)]


def _read_rows(path: Path, column: str) -> list[Document]:
    return [_to_document(row, column, where, str(path), path.parent) for where, row in read_rows(path, MAX_TEXT)]


def _to_document(row: Any, column: str, where: str, source: str, folder: Path = Path()) -> Document:
    """The text or the chat, a list of messages, in a column of a row, and the images that go with it."""
    value: Any = row.get(column) if isinstance(row, dict) else None
    is_chat = isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)
    if not (isinstance(value, str) or is_chat):
        others = [name for name in row if name != column] if isinstance(row, dict) else [_type_name(row)]
        has = f"only {', '.join(others)}" if others else f"but {_type_name(value)}"
        raise CheckpointError(f"{where} has no text in {column!r}, {has}; specify the column: {source}:COLUMN")
    images: Any = (
        () if is_chat and any(is_image(part) for message in value for part in message_parts(message)) else None
    )
    if image_column := next((name for name in IMAGE_COLUMNS if name in row and name != column), None):
        given = row[image_column] if isinstance(row[image_column], list | tuple) else [row[image_column]]
        images = tuple(image for image in given if image)
    return Document(value, images, where, folder)


def _type_name(value: Any) -> str:
    return JSON_TYPES.get(type(value), type(value).__name__)  # data sets hold values of other types, too


def message_parts(message: dict[str, Any]) -> list[Any]:
    """The parts of a message of a chat; plain text has none."""
    content = message.get("content")
    return content if isinstance(content, list) else []


def is_image(part: Any) -> bool:
    """Whether a part of a message is an image or its placeholder."""
    return isinstance(part, dict) and part.get("type") == "image"


def open_image(source: Any) -> Any:
    """Read a whole image in RGB, from what PIL opens, or from an image that is open already."""
    from PIL import Image

    refuse_postscript()
    return (source if isinstance(source, Image.Image) else Image.open(source)).convert("RGB")


def refuse_postscript() -> None:
    """Refuse images in PostScript, which are programs: to read one, PIL would start Ghostscript.

    Called before a data set is read, since reading a row decodes its images.
    """
    try:
        from PIL import EpsImagePlugin
    except ImportError:  # then no image is read either
        return

    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("it is PostScript, a program, which is not run")

    EpsImagePlugin.Ghostscript = refuse


def _read_data_set(source: str, seed: int) -> Iterator[Document]:
    try:
        from datasets import load_dataset
    except ImportError:
        need = 'data sets on the Hub need the package datasets; pip install "hf-layerprune[eval]"'
        raise LayerPruneError(need) from None
    refuse_postscript()
    name, rest = split_source(source)
    name, config = _split_config(name)
    if is_file := name.lower().endswith(".parquet"):  # whose only split is `train`
        split, column = "train", rest.removeprefix("train:")
    else:
        split, _, column = rest.partition(":")
    split, column = split or "train", column or "text"
    if split.partition("[")[0] in _EVAL_SPLITS:
        logger.warning("calibration uses the %s split of %s; don't evaluate on it afterwards", split, name)
    streamed: dict[str, Any] = {"split": split, "streaming": True}  # only the rows that are used are downloaded
    with boundary(f"can't read calibration {source}", "specify another data set, a file, or self"):
        if is_file:
            file = glob.escape(name) if Path(name).is_file() else name  # or a pattern
            rows = load_dataset("parquet", data_files=file, trust_remote_code=False, **streamed)
        elif files := find_json_files(name, name=config or None):
            splits = read_json_files(files, streaming=True)
            if split not in splits:
                raise CheckpointError(f"data set {name} has no split {split!r}; it has {', '.join(splits)}")
            rows = splits[split]
        else:
            rows = load_dataset(name, config or None, trust_remote_code=False, **streamed)
        for row in rows.shuffle(seed, buffer_size=_BUFFER):
            yield _to_document(row, column, name, name if is_file else f"{name}:{split}")


def _split_config(name: str) -> tuple[str, str]:
    """A data set and its configuration, such as `id@config`; the name of an existing folder or of a file may have an @."""
    name = os.path.expanduser(name)
    if os.path.isdir(name) or name.lower().endswith(".parquet"):
        return name, ""
    name, _, config = name.partition("@")
    return name, config
