"""Overwrite the values of tensors in a checkpoint in place; names, types and shapes stay the same."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CheckpointError, UnsupportedModelError
from ..families import check_trainable, text_config
from ..families.layout import find_decoder_layers
from ..runtime.model_class import layer_prefix_of, model_without_weights, name_in_stack, stored_tensors
from .base import Base, read_headers
from .header import FLOATS, Tensor, read_header

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

    stored: dict[str, tuple[Path, int, Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        header = read_header(path)
        stored |= {tensor.name: (path, header.data_start, tensor) for tensor in header.tensors}
    named = match_layers({name: tensor for name, (*_, tensor) in stored.items()}, config, values, what)
    for name in named:
        path = stored[name][0]
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


def check_repairable_weights(base: Base, config: PreTrainedConfig) -> None:
    """Refuse a checkpoint in which every weight that a repair could change is quantised. Only headers are read.

    Raises:
        UnsupportedModelError: It is such a checkpoint.
    """
    try:
        check_trainable(config)
    except UnsupportedModelError:
        tensors = [tensor for header in read_headers(base).headers.values() for tensor in header.tensors]
        prefix = layer_prefix_of([tensor.name for tensor in tensors], config)
        # Those that write into the hidden states; some types have more, which a repair leaves, such as routers.
        writers = (text_config(config).hidden_size,)
        if not any(
            tensor.dtype in FLOATS and tensor.name.startswith(prefix) and tensor.shape[:-1] == writers
            for tensor in tensors
        ):
            raise


def match_layers(
    stored: Mapping[str, Tensor], config: PreTrainedConfig, values: Mapping[tuple[int, str], torch.Tensor], what: str
) -> dict[str, torch.Tensor]:
    """Check that [`patch_layers`] can overwrite the `stored` tensors of a checkpoint; returns the values by their names.

    Raises:
        CheckpointError: A tensor is not in the checkpoint, or has another type or shape.
    """
    from transformers.modeling_utils import str_to_torch_dtype

    named = _checkpoint_tensors(stored, config, values)
    for name, value in named.items():
        if (tensor := stored.get(name)) is None:
            raise CheckpointError(
                f"{what} has no tensor {name} to repair: the checkpoint stores that weight in another form; "
                "write the model through transformers with --dtype"
            )
        if tensor.shape != tuple(value.shape) or str_to_torch_dtype.get(tensor.dtype) != value.dtype:
            raise CheckpointError(
                f"{name} is {tensor.dtype}{list(tensor.shape)} in the checkpoint, and the repair computed "
                f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}; write the model through transformers "
                "with --dtype"
            )
    return named


def _checkpoint_tensors(
    stored: Mapping[str, Tensor], config: PreTrainedConfig, values: Mapping[tuple[int, str], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The values by the checkpoint's names, which are those of the model, or those that transformers uses on disk."""
    prefix = layer_prefix_of(stored, config)
    own = {f"{prefix}{index}.{name}": value for (index, name), value in values.items()}
    if own.keys() <= stored.keys():
        return own
    path = find_decoder_layers(model_without_weights(config)).path
    full = {
        f"{path}.{index}.{name}": value
        for (index, name), value in values.items()
        if f"{prefix}{index}.{name}" not in stored
    }
    converted = {f"{prefix}{name_in_stack(name)}": value for name, value in stored_tensors(config, full).items()}
    return {name: value for name, value in own.items() if name in stored} | converted
