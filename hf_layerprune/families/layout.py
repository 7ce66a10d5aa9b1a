"""Where a model keeps its decoder layers and the modules around them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import UnsupportedModelError
from ..layer_ranges import LIST_NAMES, NOT_TEXT
from . import layer_count, text_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

_NORM_NAMES = (
    "norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "output_layernorm", "embedding_norm",
    "layer_norm", "layernorm", "out_norm",
)  # fmt: skip


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers of a model, and the full name of their list in it, such as `model.layers`."""

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
    """Find the list of decoder layers, including that of a multimodal model.

    Raises:
        UnsupportedModelError: No list, or more than one, has the length given by the config.
    """
    from torch import nn

    n = layer_count(model.config)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    for root in (decoder, model):
        if not isinstance(root, nn.Module):
            continue
        inside = {id(module) for module in root.modules()}
        lists = [
            (path, module)
            for path, module in model.named_modules()
            if isinstance(module, nn.ModuleList)
            and id(module) in inside
            and path.rpartition(".")[2] in LIST_NAMES
            and len(module) == n
        ]
        if len(lists) > 1:
            lists = [(path, module) for path, module in lists if not NOT_TEXT.search(path)]
        # A list inside a layer of another list is part of that layer.
        lists = [
            (path, module) for path, module in lists if not any(path.startswith(outer + ".") for outer, _ in lists)
        ]
        if len(lists) == 1:
            return DecoderStack(*lists[0])
        if lists:
            raise UnsupportedModelError(
                f"{type(model).__name__} has several lists of {n} layers: {', '.join(path for path, _ in lists)}"
            )
    raise UnsupportedModelError(
        f"{type(model).__name__} has no list of {n} decoder layers, the number in its config; check that the config "
        f"belongs to this model and that it is a {text_config(model.config).model_type} model"
    )


def text_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that runs on text: the decoder of a multimodal model, or else the whole model.

    In a text model, `get_decoder` may return a layer of the head.
    """
    return model if text_config(model.config) is model.config else model.get_decoder()


def find_layer_prefix(names: Iterable[str], num_layers: int) -> str:
    """Find what precedes the layer index in a checkpoint's tensor names, such as `model.layers.`.

    Some families also use it for multi-token prediction layers, with indices from `num_layers` up.

    Raises:
        UnsupportedModelError: No prefix, or more than one, has tensors for all layers.
    """
    indices: dict[str, set[int]] = {}
    for name in names:
        parts = name.split(".")
        for position, part in enumerate(parts[:-1]):
            if part in LIST_NAMES and parts[position + 1].isdecimal():
                indices.setdefault(".".join([*parts[: position + 1], ""]), set()).add(int(parts[position + 1]))
                break  # a nested list is part of a layer
    prefixes = [prefix for prefix, seen in indices.items() if seen >= set(range(num_layers))]
    if len(prefixes) > 1:
        prefixes = [prefix for prefix in prefixes if not NOT_TEXT.search(prefix)]
    if len(prefixes) > 1:  # an encoder and a decoder: the causal language model is the decoder
        prefixes = [prefix for prefix in prefixes if "decoder." in prefix]
    if len(prefixes) != 1:
        have = {prefix: len(seen) for prefix, seen in indices.items()}
        raise UnsupportedModelError(
            f"the config describes {num_layers} decoder layers, but the tensor names give {have or 'no layers'}; "
            "the weights and the config do not belong together, or the checkpoint is incomplete"
        )
    return prefixes[0]


def find_final_norm(model: PreTrainedModel, stack: DecoderStack) -> str | None:
    """Full name of the norm between the last decoder layer and the head, or `None` if there is none."""
    parent = model.get_submodule(stack.parent_path) if stack.parent_path else model
    for name in _NORM_NAMES:
        if hasattr(parent, name) and next(getattr(parent, name).parameters(), None) is not None:
            return f"{stack.parent_path}.{name}".lstrip(".")
    return None


def ties_head(model: PreTrainedModel) -> bool:
    """Whether the output head and the input embeddings share one matrix. A config may say so of its part or as a whole."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", None) is not None


def count_parameters(module: nn.Module) -> int:
    """The number of parameters of a module; a shared one counts once."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_by_layer(layers: Iterable[nn.Module]) -> list[int]:
    """The number of parameters of each layer, without those that layers share."""
    parts = [list(layer.parameters()) for layer in layers]
    uses = Counter(id(parameter) for part in parts for parameter in part)
    return [sum(parameter.numel() for parameter in part if uses[id(parameter)] == 1) for part in parts]


def find_output_head(model: PreTrainedModel) -> str | None:
    """Full name of the module that computes logits from hidden states, or `None` if there is none."""
    head = model.get_output_embeddings()
    return next((path for path, module in model.named_modules() if module is head), None) if head is not None else None
