"""The layers below the first trained one: find them, take what leaves them, and train without them.

In a model whose first layers are frozen, what leaves them depends on the row alone. `Prefix` can record it, and put it
back in later: every frozen layer then hands its input on, the last of them hands on what was recorded, and the weights
of all of them, with the embeddings, are out of the model and off its device. Names and indices stay as they are, so
that what is trained is saved and loaded as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn

from ..families.layout import find_decoder_layers, find_final_norm, find_output_head
from ..walk import release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def first_trained_layer(model: PreTrainedModel) -> int:
    """The first layer that anything trained is in.

    Args:
        model (`PreTrainedModel`): A model, with or without PEFT's layers in it, whose parameters say whether they are
            trained.

    Returns:
        `int`: The index of a layer; the number of layers if only what follows them is trained; 0 if something before
            them is.
    """
    stack = find_decoder_layers(model)
    behind = tuple(f"{name}." for name in (find_final_norm(model, stack), find_output_head(model)) if name)
    first = len(stack.layers)
    for name, parameter in model.named_parameters():  # a tied head goes by the name of the embeddings
        if not parameter.requires_grad:
            continue
        if name.startswith(f"{stack.path}."):
            first = min(first, int(name[len(stack.path) + 1 :].partition(".")[0]))
        elif not name.startswith(behind):
            return 0
    return first


class _Enough(Exception):
    """Raised to end a forward pass early."""


class Prefix:
    """The first layers of a model.

    Args:
        model (`PreTrainedModel`): The model, plain or inside a PEFT model.
        depth (`int`): How many of its layers; at least 1.
        needs_ids (`bool`, defaults to `False`): Whether the rest of the model looks at token ids too, so that the
            embeddings have to stay.
    """

    def __init__(self, model: PreTrainedModel, depth: int, *, needs_ids: bool = False) -> None:
        self.model = model
        self.depth = depth
        self.needs_ids = needs_ids
        self._layers = list(find_decoder_layers(model).layers[:depth])
        # `None` for a layer that returns a tensor, else how many values it returns.
        self._returns: list[int | None] = [None] * depth
        self._hidden: list[tuple[nn.Module, dict, dict, torch.device]] = []
        self._state: torch.Tensor | None = None
        self._skipping = False

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights and buffers that decide what leaves the prefix, by name."""
        stack = find_decoder_layers(self.model)
        after = tuple(f"{stack.path}.{i}." for i in range(self.depth, len(stack.layers)))
        behind = tuple(
            f"{name}." for name in (find_final_norm(self.model, stack), find_output_head(self.model)) if name
        )
        embeddings = self.model.get_input_embeddings().weight
        yield "embeddings", embeddings
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor is not embeddings and not name.startswith((*after, *behind)):
                yield name, tensor

    @contextmanager
    def recorded(self, depths: tuple[int, ...] = (), stop: bool = False) -> Iterator[dict[int, torch.Tensor]]:
        """Record what leaves some of the layers.

        Args:
            depths (`tuple[int, ...]`, *optional*): After so many layers each; the whole prefix where none is named.
            stop (`bool`, defaults to `False`): Whether the forward pass may end after the deepest; see [`run`].

        Yields:
            `dict[int, torch.Tensor]`: Filled by each forward pass: hidden states `[batch, seq, hidden]` by depth.
        """
        depths = depths or (self.depth,)
        states: dict[int, torch.Tensor] = {}

        def note(depth: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                several = isinstance(output, tuple | list)
                self._returns[depth - 1] = len(output) if several else None
                if depth in depths:
                    states[depth] = output[0] if several else output
                    if stop and depth == max(depths):
                        raise _Enough

            return hook

        handles = [
            layer.register_forward_hook(note(depth))
            for depth, layer in enumerate(self._layers, 1)
            if depth <= max(depths)
        ]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()

    def run(self, depths: tuple[int, ...] = (), **inputs: Any) -> dict[int, torch.Tensor]:
        """Run the prefix alone.

        Args:
            depths (`tuple[int, ...]`, *optional*): See [`recorded`].
            inputs: What the model takes.

        Returns:
            `dict[int, torch.Tensor]`: See [`recorded`].
        """
        with self.recorded(depths, stop=True) as states, suppress(_Enough):
            self.model(**inputs, use_cache=False)
        return states

    # --- without it --------------------------------------------------------------------------------------

    def skip(self) -> None:
        """From now on, what [`put`] was given leaves the prefix. Run the prefix once before, for what its layers return."""

        def stub(index: int) -> Callable[..., Any]:
            last, returns = index == self.depth - 1, self._returns[index]

            def forward(*args: Any, **kwargs: Any) -> Any:
                state = self._state if last else (args[0] if args else kwargs["hidden_states"])
                return state if returns is None else (state, *[None] * (returns - 1))

            return forward

        for index, layer in enumerate(self._layers):
            layer.forward = stub(index)
        self._skipping = True

    def put(self, state: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Say what leaves the prefix in the next forward pass.

        Args:
            state (`torch.Tensor`): `[batch, seq, hidden]`.
            inputs (`dict[str, Any]`): What the model would be called with.

        Returns:
            `dict[str, Any]`: What to call it with.
        """
        self._state = state
        if self.needs_ids:
            return inputs
        # Of no use to the layers; it spares the embeddings, and their memory.
        return {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": state}

    def unload(self) -> None:
        """Take what the tail does without out of the model and off its device.

        That is the weights of the skipped layers, the embeddings, and what trained copies stand in for. What the rest
        of the model shares with them stays.
        """
        model = self.model
        originals = [m.original_module for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
        parts = [*self._layers, *originals]
        embeddings = model.get_input_embeddings()
        elsewhere = {
            id(parameter)
            for module in model.modules()
            if module is not embeddings and not any(module is part for part in originals)
            for parameter in module._parameters.values()
            if parameter is not None
        }
        if not self.needs_ids and not any(id(parameter) in elsewhere for parameter in embeddings.parameters()):
            parts.append(embeddings)
        for part in parts:
            self._hide(part)

    def _hide(self, part: nn.Module) -> None:
        tensor = next((t for t in (*part.parameters(), *part.buffers())), None)
        device = tensor.device if tensor is not None else torch.device("cpu")
        holder = nn.Module()
        holder._modules, holder._parameters = dict(part._modules), dict(part._parameters)
        if device.type == "cpu":
            release(holder)  # weights that are mapped from a file come back when they are used again
        elif device.type != "meta":
            holder.to("cpu")
        self._hidden.append((part, holder._modules, holder._parameters, device))
        part._modules, part._parameters = {}, {}

    def restore(self) -> None:
        """Make the model what it was, with what was trained since."""
        if self._skipping:
            for layer in self._layers:
                del layer.forward
            self._skipping = False
        for part, modules, parameters, device in reversed(self._hidden):
            part._modules, part._parameters = modules, parameters
            part.to(device)
        self._hidden.clear()
        self._state = None
