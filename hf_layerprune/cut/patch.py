"""Overwrite the values of tensors in a checkpoint in place; names, types and shapes stay the same."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError
from ..families import layer_count
from ..families.layout import find_decoder_layers, find_layer_prefix
from ..runtime.model_class import model_without_weights, stored_names
from .header import Tensor, read_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def patch_layers(
    folder: Path, config: PreTrainedConfig, values: Mapping[tuple[int, str], torch.Tensor], what: str
) -> list[str]:
    """Overwrite tensors of decoder layers.

    Args:
        folder (`Path`): A folder of safetensors files that only this run uses: not linked, and not yet under their
            final name.
        config (`PreTrainedConfig`): That of the checkpoint.
        values (`Mapping[tuple[int, str], torch.Tensor]`): The new values, by layer index in this checkpoint and name of
            the parameter within the layer.
        what (`str`): What the checkpoint is called in errors.

    Returns:
        `list[str]`: The names of the tensors in the checkpoint.

    Raises:
        CheckpointError: A tensor is not in the checkpoint, or has another type or shape. Nothing was written.
    """
    import torch
    from transformers.modeling_utils import str_to_torch_dtype

    stored: dict[str, tuple[Path, int, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        stored |= {tensor.name: (path, header.data_start, tensor) for tensor in header.tensors}
    named = {_stored_as(key, stored, config): value for key, value in values.items()}
    for name, value in named.items():
        if name not in stored:
            raise CheckpointError(
                f"{what} has no tensor {name} to repair: the checkpoint stores that weight in another form; "
                "write the model through transformers with --dtype"
            )
        path, _, tensor = stored[name]
        if tensor.shape != tuple(value.shape) or str_to_torch_dtype.get(tensor.dtype) != value.dtype:
            raise CheckpointError(
                f"{name} is {tensor.dtype}{list(tensor.shape)} in the checkpoint, and the repair computed "
                f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}; write the model through transformers "
                "with --dtype"
            )
        if path.stat().st_nlink > 1:
            raise CheckpointError(
                f"{path.name} is a hard link to a file of the base, which is never written to; prune without --link"
            )
    for name, value in named.items():
        path, data_start, tensor = stored[name]
        with path.open("r+b") as file:
            file.seek(data_start + tensor.start)
            file.write(value.contiguous().view(torch.uint8).numpy().tobytes())
    return sorted(named)


def _stored_as(key: tuple[int, str], stored: Collection[str], config: PreTrainedConfig) -> str:
    """How the checkpoint names a parameter of a layer: as the model does, or as transformers names it on disk."""
    index, name = key
    prefix = find_layer_prefix(stored, layer_count(config))
    own = f"{prefix}{index}.{name}"
    if own in stored:
        return own
    path = f"{find_decoder_layers(model_without_weights(config)).path}.{index}.{name}"
    renamed = stored_names(config, [path]).get(path, path)
    return f"{prefix}{index}.{renamed.partition(f'.{index}.')[2]}"
