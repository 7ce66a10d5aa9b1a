"""The first layers of a model: record their output, and run the rest of the model from it.

When the first layers are frozen, or the same in two models, their output depends on the row alone. `Prefix` records it
and feeds it back later: every layer of the prefix then passes its input through, and the last one returns the recorded
states. The weights of the prefix, with the embeddings, can be taken out of the model and off its device. Module names
and indices do not change, so trained weights are saved and loaded as usual.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..families.layout import DecoderStack, find_decoder_layers, find_final_norm, find_output_head
from .parts import hidden_of, hook_scope, input_device, layer_stub, num_values, replace_forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def first_trained_layer(model: PreTrainedModel) -> int:
    """The index of the first layer with a parameter that requires gradients, with or without PEFT's layers in it.

    It is the number of layers if only the final norm or the head is trained, and 0 if anything before the layers is.
    """
    stack = find_decoder_layers(model)
    following = tuple(f"{name}." for name in _modules_after_layers(model, stack))
    first = len(stack.layers)
    for name, parameter in model.named_parameters():  # a tied head has the name of the embeddings
        if not parameter.requires_grad:
            continue
        if name.startswith(f"{stack.path}."):
            first = min(first, int(name[len(stack.path) + 1 :].partition(".")[0]))
        elif not name.startswith(following):
            return 0
    return first


def _modules_after_layers(model: PreTrainedModel, stack: DecoderStack) -> list[str]:
    """Names of the modules that follow the layers."""
    return [name for name in (find_final_norm(model, stack), find_output_head(model)) if name]


class _StopForward(Exception):
    """Raised to end a forward pass early."""


class Prefix:
    """The first layers of a model.

    Args:
        model (`PreTrainedModel`): The model, plain or inside a PEFT model.
        depth (`int`): How many of its layers; at least 1.
        needs_ids (`bool`, defaults to `False`): Whether the rest of the model needs token ids too, so that the
            embeddings have to stay.
    """

    def __init__(self, model: PreTrainedModel, depth: int, *, needs_ids: bool = False) -> None:
        self.model = model
        self.depth = depth
        self.needs_ids = needs_ids
        self._layers = list(find_decoder_layers(model).layers[:depth])
        # How many values each layer returns, see [`num_values`]; known once the prefix has run.
        self.returns: list[int | None] = [None] * depth
        self._hidden: list[tuple[nn.Module, dict[str, Any], dict[str, Any]]] = []
        self._device = input_device(model)
        self._state: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None  # those of the state
        self._skipping = ExitStack()

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and values of all weights and buffers that decide the prefix's output."""
        stack = find_decoder_layers(self.model)
        after = tuple(f"{stack.path}.{i}." for i in range(self.depth, len(stack.layers)))
        following = tuple(f"{name}." for name in _modules_after_layers(self.model, stack))
        table: Any = self.model.get_input_embeddings()
        embeddings = table.weight
        yield "embeddings", embeddings
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor is not embeddings and not name.startswith((*after, *following)):
                yield name, tensor

    @contextmanager
    def record(self, depths: tuple[int, ...] = (), stop: bool = False) -> Iterator[dict[int, torch.Tensor]]:
        """Record the output of some of the layers inside a `with` block.

        Args:
            depths (`tuple[int, ...]`, *optional*): After how many layers to record; by default at the end of the
                prefix.
            stop (`bool`, defaults to `False`): Whether to end the forward pass after the deepest; see [`run`].

        Yields:
            `dict[int, torch.Tensor]`: Filled by each forward pass: hidden states `[batch, seq, hidden]` by depth.
        """
        depths = depths or (self.depth,)
        states: dict[int, torch.Tensor] = {}

        def make_hook(depth: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                self.returns[depth - 1] = num_values(output)
                if depth in depths:
                    states[depth] = hidden_of(output).clone()  # the next module may change it in place
                    if stop and depth == max(depths):
                        raise _StopForward

            return hook

        layers = enumerate(self._layers[: max(depths)], 1)
        with hook_scope(*[layer.register_forward_hook(make_hook(depth)) for depth, layer in layers]):
            yield states

    def run(
        self, depths: tuple[int, ...] = (), *, forward: Callable[..., Any] | None = None, **inputs: Any
    ) -> dict[int, torch.Tensor]:
        """Run the prefix alone on the model's arguments; see [`record`] for `depths` and what is returned.

        `forward` is called in place of the model, such as its own forward method from inside a replaced one.
        """
        with self.record(depths, stop=True) as states, suppress(_StopForward):
            (forward or self.model)(**(inputs | {"use_cache": False}))
        return states

    def is_equivalent(self, other: Prefix) -> bool:
        """Whether another model's prefix has the same layers (classes, attributes, weights) and surroundings."""
        parts = [[part for layer in prefix._layers for part in layer.modules()] for prefix in (self, other)]
        if [(type(part), _attributes(part)) for part in parts[0]] != [(type(p), _attributes(p)) for p in parts[1]]:
            return False
        ours, theirs = (
            {name.rpartition("base_model.model.")[2]: tensor for name, tensor in prefix.parameters()}
            for prefix in (self, other)
        )
        return ours.keys() == theirs.keys() and all(
            (tensor.shape, tensor.dtype) == (theirs[name].shape, theirs[name].dtype)
            and (tensor.data_ptr() == theirs[name].data_ptr() or torch.equal(tensor, theirs[name].to(tensor.device)))
            for name, tensor in ours.items()
        )

    # --- running without the prefix ----------------------------------------------------------------------

    def skip(self) -> None:
        """Skip the prefix: from now on it returns the states given to [`set_output`]. It must have run once before."""

        def stub(index: int) -> Callable[..., Any]:
            last = index == self.depth - 1
            return layer_stub(lambda hidden, *_: self._output() if last else hidden, lambda: self.returns[index])

        self._skipping.enter_context(replace_forward(self._layers, *map(stub, range(self.depth))))

    def set_output(self, state: torch.Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        """Set the prefix's output `[batch, seq, hidden]` for the next forward pass; returns the arguments for it."""
        self._state = state
        if self.needs_ids:
            self._ids = inputs["input_ids"]
            return inputs
        # The layers ignore it; it only avoids the embeddings and their memory.
        return {name: value for name, value in inputs.items() if name != "input_ids"} | {"inputs_embeds": self._state}

    def holds_output_for(self, input_ids: torch.Tensor | None) -> bool:
        """Whether the last states given to [`set_output`] are those of a forward pass with these token ids, or with none."""
        if input_ids is None or self._ids is None:
            return input_ids is self._ids
        return input_ids is self._ids or torch.equal(input_ids, self._ids)

    def unload(self) -> None:
        """Take weights that the tail does not need out of the model and off its device.

        Those are the weights of the skipped layers, the embeddings, and the originals that trained copies replace.
        Weights that the rest of the model shares with them stay.
        """
        from peft.utils.other import ModulesToSaveWrapper

        wrappers = [module for module in self.model.modules() if isinstance(module, ModulesToSaveWrapper)]
        # The adapter saves the copies, such as those of modules that a repair changed.
        copies = {id(module) for wrapper in wrappers for module in wrapper.modules_to_save.modules()}
        parts = [*self._layers, *(wrapper.original_module for wrapper in wrappers)]
        unloaded = {id(module): module for part in parts for module in part.modules() if id(module) not in copies}
        embeddings = self.model.get_input_embeddings()
        needed = {
            id(parameter)
            for module in self.model.modules()
            if id(module) not in unloaded and module is not embeddings
            for parameter in module._parameters.values()
        }
        if not self.needs_ids and not any(id(p) in needed for p in embeddings._parameters.values()):
            unloaded[id(embeddings)] = embeddings
        for module in unloaded.values():
            self._hidden.append((module, module._parameters, module._buffers))
            tensors = (module._parameters | module._buffers).items()
            module._parameters, module._buffers = {name: None for name, tensor in tensors if tensor is None}, {}
            # Optimizers read `weight`. Unlike empty parameters, these are neither saved nor split over devices.
            vars(module).update(
                {
                    name: torch.empty(0, dtype=tensor.dtype, device=tensor.device)
                    for name, tensor in tensors
                    if tensor is not None
                }
            )
        self._move("cpu")

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that were taken out of the model, by their names in it."""
        names = {id(module): name for name, module in self.model.named_modules()}
        found = {}
        for module, parameters, buffers in self._hidden:
            for name, tensor in (parameters | buffers).items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    found[f"{names[id(module)]}.{name}"] = tensor.detach()
        return found

    def _output(self) -> torch.Tensor:
        assert self._state is not None, "the prefix is skipped without its states"
        # Reentrant checkpointing makes what a layer returns its own output, which must not be what it returns again.
        return self._state.view_as(self._state)

    def restore(self, device: torch.device | str | None = None) -> None:
        """Restore the full model, with the weights that were taken out on a device; by default, where they were.

        Trained weights keep their new values.
        """
        self._skipping.close()
        self._move(device or self._device)
        for module, parameters, buffers in self._hidden:
            for name in (*parameters, *buffers):
                vars(module).pop(name, None)
            module._parameters, module._buffers = parameters, buffers
        self._hidden.clear()
        self._state = self._ids = None

    def _move(self, device: torch.device | str) -> None:
        """Move the weights that were taken out."""
        for _, parameters, buffers in self._hidden:
            for parameter in parameters.values():
                if parameter is not None:
                    parameter.data = parameter.data.to(device)
            buffers.update({name: buffer.to(device) for name, buffer in buffers.items() if buffer is not None})


def _attributes(module: nn.Module) -> dict[str, Any]:
    plain = (int, float, str, bool, tuple, type(None))
    ignored = ("training", "gradient_checkpointing", "_is_hf_initialized")
    return {name: value for name, value in vars(module).items() if isinstance(value, plain) and name not in ignored}
