"""Local JSON files as data sets of `datasets`.

pyarrow's JSON reader, which `datasets` uses, ends the process with a segmentation fault on some files; a first line
`null` is enough. So local files are read by the reader of this package, and only their rows are handed to `datasets`.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .json_file import JSON_TYPES
from .json_rows import read_rows
from .row_types import RowTypes

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDatasetDict

SUFFIXES = (".json", ".jsonl", ".ndjson")
_VERSION = "1"  # part of the cache key; to be changed when the same bytes are read differently


def find_json_files(path: str, **where: Any) -> dict[str, list[Path]] | None:
    """The local files that `datasets` would give to pyarrow's reader of JSON.

    Args:
        path (`str`): A file; a folder; or `"json"`, together with `data_files` or `data_dir`.
        where (`Any`): Other arguments of `load_dataset` that choose files: `name`, `data_dir`, `data_files`.

    Returns:
        `dict[str, list[Path]]` or `None`: The files of each split; `None` if this is not a data set of local JSON files.

    Raises:
        CheckpointError: A file is packed, or only a field of it is the data set; no file matches; or a folder is a model's,
            or its path a pattern.
    """
    from datasets import load_dataset_builder
    from datasets.packaged_modules.json.json import Json

    if Path(path).suffix.lower() in SUFFIXES and Path(path).is_file():
        return {"train": [Path(path)]}
    for folder in filter(None, (path, where.get("data_dir"))):
        real = os.path.realpath(os.path.expanduser(folder))
        if os.path.isdir(real) and glob.has_magic(real):  # `datasets` would read the folders that match
            raise CheckpointError(f"the path {real} has one of *?[ in it; rename the folder")
    if path != "json" and not Path(path).is_dir():
        return None
    if Path(path, "config.json").is_file() and any(Path(path).glob("*.safetensors")):
        raise CheckpointError(f"{path} is a model folder; specify a data set, or a file with text")
    builder = load_dataset_builder(path, **where)
    names: Mapping[str, Sequence[str]] = builder.config.data_files or {}
    files = {str(split): [Path(name) for name in of_split] for split, of_split in names.items()}
    if not isinstance(builder, Json) or not all(path.is_file() for paths in files.values() for path in paths):
        return None
    if not all(files.values()):
        raise CheckpointError(f"no file matches {where.get('data_files')}; *, ? and [ in it are those of a pattern")
    for path_of_rows in (path for paths in files.values() for path in paths):
        if path_of_rows.suffix.lower() not in SUFFIXES:
            raise CheckpointError(f"{path_of_rows} is not a .json or .jsonl file; unpack or rename it")
    if builder.config.field is not None:
        raise CheckpointError(f"the field {builder.config.field!r} of a JSON file can't be read; make it a file")
    return files


def read_json_files(
    files: Mapping[str, Sequence[Path]], *, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Read the rows of JSON files, given by split.

    With `streaming`, rows are only read when they are needed. Otherwise all rows are checked, and then stored in the
    cache of `datasets`.

    Raises:
        CheckpointError: A file can't be read, a row is not an object or not strict JSON, or a column has several types.
    """
    from datasets import DatasetDict, IterableDataset, IterableDatasetDict, NamedSplit

    named = {split: tuple(map(str, paths)) for split, paths in files.items()}
    if streaming:
        return IterableDatasetDict(
            {
                split: IterableDataset.from_generator(_rows, gen_kwargs={"paths": paths}, split=NamedSplit(split))
                for split, paths in named.items()
            }
        )
    types = RowTypes()  # one for all splits, so that they can be joined
    for paths in named.values():
        for where, row in _located_rows(paths):
            types.add_row(row, where)
    return DatasetDict({split: _to_dataset(split, paths, types) for split, paths in named.items()})


def _to_dataset(split: str, paths: tuple[str, ...], types: RowTypes) -> Dataset:
    from datasets import Dataset, NamedSplit

    if not types.columns:
        raise CheckpointError(f"{', '.join(paths)} has only empty rows; specify a file with data")
    digest = hashlib.sha256(f"{_VERSION} {split} {types.features()}".encode())
    for path in paths:
        with Path(path).open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return Dataset.from_generator(
        _rows,
        features=types.features(),
        gen_kwargs={"paths": paths, "as_json": types.json_columns()},
        split=NamedSplit(split),
        fingerprint=digest.hexdigest()[:32],
    )


def _rows(paths: tuple[str, ...], as_json: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    for _, row in _located_rows(paths):
        for name in as_json:
            if row.get(name) is not None:
                row[name] = json.dumps(row[name])
        yield row


def _located_rows(paths: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Any]]]:
    where = ""
    for path in paths:
        for where, row in read_rows(Path(path)):
            if isinstance(row, str):  # a list of texts
                row = {"text": row}
            if not isinstance(row, dict):
                what = JSON_TYPES[type(row)]
                raise CheckpointError(f'{where} is {what}, but a row is an object, such as {{"text": "..."}}')
            yield where, row
    if not where:
        raise CheckpointError(f"{', '.join(paths)} has no rows; specify a file with data")
