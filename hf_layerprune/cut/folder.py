"""The files of a checkpoint: its weight files, the companion files to copy, and the files never to copy."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.json_file import read_object
from ..files.shards import INDEX, MAX_INDEX
from ..records.fingerprints import ADAPTER_CONFIG, CONFIG, TEMPLATES
from .header import Header

SINGLE = "model.safetensors"
# Other files of a model folder are copied unless they are weights, training state, or describe the base alone:
# its card, its measurements, and the settings of a weight format that is not copied.
_NEVER = {"readme.md", "metrics.json", "params.json", "trainer_state.json", "consolidated.safetensors", CONFIG, INDEX}
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot",
    ".tflite", ".npz", ".npy", ".pkl", ".pickle", ".mlmodel", ".distcp", ".index.json",
)  # fmt: skip
_TRAINING = ("optimizer", "scheduler", "rng_state", "training_args", "events.out.tfevents")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        CheckpointError: The file is missing, too large, or not a valid JSON object.
    """
    return read_object(path, max_bytes=MAX_INDEX, non_finite=True)


def find_weights(names: Collection[str], where: str, variant: str | None = None) -> str:
    """Find the weights of a checkpoint in a list of its files.

    Args:
        names (`Collection[str]`): Names of all files.
        where (`str`): The name of the folder, for errors.
        variant (`str`, *optional*): The variant of the weights, such as `"fp16"`.

    Returns:
        `str`: `SINGLE` or `INDEX`, or the name of that file in the given variant.

    Raises:
        CheckpointError: There are no safetensors weights, or more than one set.
    """
    single, index = (
        f"{stem}.{variant}.{suffix}" if variant else f"{stem}.{suffix}"
        for stem, _, suffix in (SINGLE.rpartition("."), INDEX.rpartition("."))
    )
    if index in names:
        if single in names:
            raise CheckpointError(
                f"{where} holds both {single} and {index}, and loaders differ in which they read; remove one of them"
            )
        return index
    if single in names:
        return single
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
    if others:
        raise CheckpointError(
            f"{where} holds only pickled weights ({others[0]}), which can run code when loaded and are never "
            "opened here; convert them to safetensors first (load the model and save_pretrained it)"
        )
    if ADAPTER_CONFIG in names:
        raise CheckpointError(f"{where} holds an adapter, not a model; merge it into its base first")
    stray = sorted(name for name in names if name.endswith(".safetensors"))
    hint = f" ({stray[0]} is not named by an index)" if stray else ""
    raise CheckpointError(f"{where} holds neither {single} nor {index}{hint}; is the download complete?")


def check_index(weight_map: Mapping[str, str], headers: Mapping[str, Header], where: str) -> None:
    """Check that an index, which says in which file each tensor is, fits the headers of these files.

    Raises:
        CheckpointError: A tensor is in a file other than the index says, in no file, in two files, or not in the
            index.
    """
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


def is_companion(name: str) -> bool:
    """Whether the file at a path relative to the model folder should be copied along with the weights."""
    folder, _, name = name.lower().rpartition("/")
    if folder not in ("", TEMPLATES):
        return False
    return not (name.startswith((".", "consolidated", *_TRAINING)) or name in _NEVER or name.endswith(_WEIGHTS))
