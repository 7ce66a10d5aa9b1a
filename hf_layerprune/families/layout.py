"""Where a model keeps its decoder layers and the modules around them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from . import layer_count, text_config
from .fields import LIST_NAMES, NOT_TEXT

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_NORM_NAMES = (
    "norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "output_layernorm", "embedding_norm",
    "layer_norm", "layernorm", "out_norm",
)  # fmt: skip


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers of a model.

    Args:
        path (`str`): The module list's full name in the model, such as `model.layers`.
        layers (`nn.ModuleList`): The layers.
    """

    path: str
    layers: nn.ModuleList

    @property
    def parent_path(self) -> str:
        """Full name of the module that owns the list; empty for the model itself."""
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The list's attribute name in its parent."""
        return self.path.rpartition(".")[2]


def find_decoder_layers(model: PreTrainedModel) -> DecoderStack:
    """Find the list of decoder layers, also inside a multimodal model.

    Args:
        model (`PreTrainedModel`): A causal language model.

    Returns:
        `DecoderStack`: Where the layers are.

    Raises:
        UnsupportedModelError: No list, or more than one, fits the layer count in the config.
    """
    from torch import nn

    n = layer_count(model.config)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        if not isinstance(root, nn.Module):
            continue
        inside = {id(module) for module in root.modules()}
        found = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and id(module) in inside
            and path.rpartition(".")[2] in LIST_NAMES
            and len(module) == n
        ]
        if len(found) > 1:
            found = [(path, module) for path, module in found if not NOT_TEXT.search(path)]
        # A list inside a layer of another list is a part of that layer.
        found = [
            (path, module) for path, module in found if not any(path.startswith(outer + ".") for outer, _ in found)
        ]
        if len(found) == 1:
            return DecoderStack(*found[0])
        if found:
            raise UnsupportedModelError(
                f"{type(model).__name__} has several lists of {n} layers: {', '.join(path for path, _ in found)}"
            )
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {n} decoder layers, as its config says; is it a "
        f"{text_config(model.config).model_type} model, and do the model and its config belong together?"
    )


def find_layer_prefix(names: Iterable[str], num_layers: int) -> str:
    """Find how a checkpoint names its decoder layers, from the names of its tensors alone.

    Args:
        names (`Iterable[str]`): All tensor names.
        num_layers (`int`): How many decoder layers the config describes.

    Returns:
        `str`: What stands before a layer's index, such as `model.layers.`. Indices of `num_layers` and above, which
            some families use for layers that draft further tokens, may follow it too.

    Raises:
        UnsupportedModelError: No prefix, or more than one, has tensors for every layer.
    """
    indices: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts[:-1]):
            if part in LIST_NAMES and parts[position + 1].isdecimal():
                indices.setdefault(".".join([*parts[: position + 1], ""]), set()).add(int(parts[position + 1]))
                break  # a list further down is a part of a layer
    found = [prefix for prefix, seen in indices.items() if seen >= set(range(num_layers))]
    if len(found) > 1:
        found = [prefix for prefix in found if not NOT_TEXT.search(prefix)]
    if len(found) > 1:  # of an encoder and a decoder, a causal language model is the decoder
        found = [prefix for prefix in found if "decoder." in prefix]
    if len(found) != 1:
        have = {prefix: len(seen) for prefix, seen in indices.items()}
        raise UnsupportedModelError(
            f"the config describes {num_layers} decoder layers, and the tensors are named for {have or 'no layers'}; "
            "the weights and the config do not belong together, or the checkpoint is incomplete"
        )
    return found[0]


def find_final_norm(model: PreTrainedModel, stack: DecoderStack) -> str | None:
    """Full name of the norm between the last decoder layer and the head, or `None` where there is none."""
    parent = model.get_submodule(stack.parent_path) if stack.parent_path else model
    for name in _NORM_NAMES:
        if hasattr(parent, name) and next(getattr(parent, name).parameters(), None) is not None:
            return f"{stack.parent_path}.{name}".lstrip(".")
    return None


def find_output_head(model: PreTrainedModel) -> str | None:
    """Full name of the module that turns hidden states into logits, or `None` where there is none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None
