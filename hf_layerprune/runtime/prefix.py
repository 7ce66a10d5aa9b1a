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
from .mapped import release

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
        self._hidden: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._device = model.get_input_embeddings().weight.device
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
        wrappers = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        # Copies, such as of what a repair changed, are what the adapter saves.
        copies = {id(module) for wrapper in wrappers for module in wrapper.modules_to_save.modules()}
        parts = [*self._layers, *(wrapper.original_module for wrapper in wrappers)]
        gone = {id(module): module for part in parts for module in part.modules() if id(module) not in copies}
        embeddings = self.model.get_input_embeddings()
        needed = {
            id(parameter)
            for module in self.model.modules()
            if id(module) not in gone and module is not embeddings
            for parameter in module._parameters.values()
        }
        if not self.needs_ids and not any(id(p) in needed for p in embeddings._parameters.values()):
            gone[id(embeddings)] = embeddings
        for module in gone.values():
            self._hidden.append((module, module._parameters, module._buffers))
            module._parameters, module._buffers = {}, {}
        self._move("cpu")
        every = nn.Module()
        hidden = [p for _, parameters, _ in self._hidden for p in parameters.values() if p is not None]
        every._parameters = {str(i): parameter for i, parameter in enumerate(hidden)}
        release(every)  # weights that are mapped from a file come back when they are used again

    def restore(self) -> None:
        """Make the model what it was, with what was trained since."""
        if self._skipping:
            for layer in self._layers:
                del layer.forward
            self._skipping = False
        self._move(self._device)
        for module, parameters, buffers in self._hidden:
            module._parameters, module._buffers = parameters, buffers
        self._hidden.clear()
        self._state = None

    def _move(self, device: torch.device | str) -> None:
        """Move what is hidden."""
        for _, parameters, buffers in self._hidden:
            for parameter in parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(device)
            buffers.update({name: buffer.to(device) for name, buffer in buffers.items() if buffer is not None})
