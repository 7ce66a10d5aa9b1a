"""What lies in a checkpoint folder: which weight files, which other files go along, and which never do."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.copy import LocalFile, Source
from .header import Header, parse_json, read_header

logger = logging.getLogger(__name__)

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_JSON = 200_000_000
_MAX_SHARDS = 10_000
# Other files of a model folder go along unless they are weights, state of a training, or about the base alone:
# its card, its measurements, and the settings of a weight format that is not copied.
_NEVER = {"readme.md", "metrics.json", "params.json", "trainer_state.json", "consolidated.safetensors", CONFIG, INDEX}
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot",
    ".tflite", ".npz", ".npy", ".pkl", ".pickle", ".mlmodel", ".distcp", ".index.json",
)  # fmt: skip
_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args", "events.out.tfevents")
_SUBFOLDERS = ("additional_chat_templates",)
_LARGE = 512 << 20


@dataclass(frozen=True, slots=True)
class Weights:
    """The weight files of a checkpoint.

    Args:
        headers (`dict[str, Header]`): The header of each file, by file name.
        index (`dict`, *optional*): The parsed index of a sharded checkpoint, or `None` for a single file.
        skipped (`dict[str, int]`): Size of each file that was not opened, because the index says that it holds
            nothing that stays.
    """

    headers: dict[str, Header]
    index: dict[str, Any] | None
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def skipped_tensors(self) -> list[str]:
        """Names of the tensors in the files that were not opened."""
        weight_map = self.index["weight_map"] if self.index is not None and self.skipped else {}
        return [name for name, file in weight_map.items() if file in self.skipped]

    @property
    def size(self) -> int:
        """Size of all the files."""
        return sum(header.source.size for header in self.headers.values()) + sum(self.skipped.values())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: It is missing, too long, or no JSON object.
    """
    with LocalFile(path) as file:
        if file.size > _MAX_JSON:
            raise CheckpointError(f"{path} has {file.size} bytes, far more than such a file needs; download it again")
        raw = file.read(0, file.size)
    try:
        value = parse_json(raw)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no sound JSON: {error}; download or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object; download or save it again")
    return value


@contextmanager
def open_weights(folder: Path) -> Iterator[Weights]:
    """Open the weight files of a folder and read their headers.

    Args:
        folder (`Path`): A model folder.

    Yields:
        `Weights`: Checked headers, and an index that agrees with them.

    Raises:
        CheckpointError: There are no safetensors weights, more than one set, or they are damaged or incomplete.
    """
    names, index = _weight_files(folder)
    with ExitStack() as stack:
        sources: dict[str, Source] = {name: stack.enter_context(LocalFile(folder / name)) for name in names}
        headers = {name: read_header(source) for name, source in sources.items()}
        if index is not None:
            check_index(index, headers, str(folder / INDEX))
        yield Weights(headers, index)


def _weight_files(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
    if find_weights(os.listdir(folder), str(folder)) == SINGLE:
        return [SINGLE], None
    value = read_json(folder / INDEX)
    return shard_names(value, str(folder / INDEX)), value


def find_weights(names: Collection[str], where: str) -> str:
    """Tell from a list of files where a checkpoint keeps its weights.

    Args:
        names (`Collection[str]`): All files.
        where (`str`): What to call their folder in errors.

    Returns:
        `str`: `SINGLE` or `INDEX`.

    Raises:
        CheckpointError: There are no safetensors weights, or more than one set.
    """
    if INDEX in names:
        if SINGLE in names:
            raise CheckpointError(
                f"{where} holds both {SINGLE} and {INDEX}, and loaders differ in which they read; remove one of them"
            )
        return INDEX
    if SINGLE in names:
        return SINGLE
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if others:
        raise CheckpointError(
            f"{where} holds only pickled weights ({others[0]}), which can run code when they are read and are never "
            "opened here; convert them to safetensors first (load the model and save_pretrained it)"
        )
    if "adapter_config.json" in names:
        raise CheckpointError(f"{where} holds an adapter, not a model; merge it into its base first")
    stray = sorted(name for name in names if name.endswith(".safetensors"))
    hint = f" ({stray[0]} is not named by an index)" if stray else ""
    raise CheckpointError(f"{where} holds neither {SINGLE} nor {INDEX}{hint}; is the download complete?")


def shard_names(index: dict[str, Any], where: str) -> list[str]:
    """The files that an index names, each proven to be a plain name.

    Args:
        index (`dict`): The parsed index.
        where (`str`): What to call it in errors.

    Returns:
        `list[str]`: File names, sorted.

    Raises:
        CheckpointError: The index is not shaped as one, or names something outside its folder.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where} has no weight_map; download or save the checkpoint again")
    names = set()
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{where}: weight_map[{tensor[:100]!r}] is {str(name)[:100]!r}, not a file name")
        names.add(name)
    for name in names:
        if "/" in name or "\\" in name or "\0" in name or not name.endswith(".safetensors") or len(name) > 200:
            raise CheckpointError(
                f"{where} names {name[:100]!r}, which is no plain .safetensors file beside it; do not trust this folder"
            )
    if len(names) > _MAX_SHARDS:
        raise CheckpointError(f"{where} names {len(names)} files; at most {_MAX_SHARDS} are supported")
    if not isinstance(index.get("metadata", {}), dict):
        raise CheckpointError(f"{where}: metadata is no JSON object; download or save the checkpoint again")
    return sorted(names)


def check_index(index: dict[str, Any], headers: dict[str, Header], where: str) -> None:
    """Hold an index against the files that it names.

    Args:
        index (`dict`): The parsed index.
        headers (`dict[str, Header]`): The header of each file.
        where (`str`): What to call the index in errors.

    Raises:
        CheckpointError: A tensor is in another file than the index says, in none, in two, or not in the index.
    """
    weight_map = index["weight_map"]
    seen: dict[str, str] = {}
    for file, header in headers.items():
        for tensor in header.tensors:
            if tensor.name in seen:
                raise CheckpointError(
                    f"tensor {tensor.name!r} is in both {seen[tensor.name]} and {file}; save the checkpoint again"
                )
            seen[tensor.name] = file
            if weight_map.get(tensor.name) != file:
                says = weight_map.get(tensor.name)
                raise CheckpointError(
                    f"tensor {tensor.name!r} is in {file}, and {where} "
                    + (f"places it in {says}" if says else "does not list it")
                    + "; the index and the files do not belong together, so download them again"
                )
    for name, file in weight_map.items():
        if name not in seen:
            raise CheckpointError(f"{where} places tensor {name!r} in {file}, which lacks it; download both again")


def companions(folder: Path) -> list[tuple[str, int]]:
    """The other files that belong to the model: tokenizer, chat templates, generation settings, licence.

    Args:
        folder (`Path`): A model folder.

    Returns:
        `list[tuple[str, int]]`: Path relative to the folder, and size.

    Raises:
        CheckpointError: One is a broken link.
    """
    found = []
    for path in sorted(folder.iterdir()):
        if path.name in _SUBFOLDERS and path.is_dir():
            found += [file for file in sorted(path.iterdir()) if _goes_along(file)]
        elif _goes_along(path):
            found.append(path)
    return [(str(path.relative_to(folder)), path.stat().st_size) for path in found]


def is_companion(name: str) -> bool:
    """Whether a file, by its path relative to the model folder, is one that belongs to the model."""
    folder, _, name = name.lower().rpartition("/")
    if folder not in ("", *_SUBFOLDERS):
        return False
    return not (name.startswith((".", "consolidated", *_TRAINING)) or name in _NEVER or name.endswith(_WEIGHTS))


def is_too_large(name: str, size: int) -> bool:
    """Whether a companion is too large to be one; it is logged then."""
    if size > _LARGE:
        logger.warning("%s is left out: it has %d bytes, too many for a side file", name, size)
    return size > _LARGE


def _goes_along(path: Path) -> bool:
    if not is_companion(path.name):
        return False
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a link to nothing; is the download complete?")
    if not path.is_file():
        return False
    return not is_too_large(str(path), path.stat().st_size)
