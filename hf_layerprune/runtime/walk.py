"""Run a decoder layer by layer: all batches and candidates go through one layer before the next one is used.

    walk = LayerWalk(model)
    batches = [walk.begin(ids) for ids in rows.split(8)]
    for i in range(walk.num_layers):
        with walk.layer(i) as run:
            for batch in batches:
                batch.hidden = run(batch.hidden, batch)

Each layer's arguments (masks, rotary embeddings) are recorded from the model's own forward pass, with every layer
stubbed to pass its input through, so no family's code is reimplemented here. The walk is first tried on a few tokens: a
model whose layers pass more than hidden states to each other is refused.

Rows may have images or audio: the model's own forward then puts the features of its towers in their places, and
whatever it does with them (positions, masks, features that are added before later layers) is recorded with the
layers' arguments. The first such row is tried as well.

Weights that are mapped from a file, as `load_mapped` leaves them, are read when a layer runs, and the system drops them
again when memory runs short. With `device`, a layer's weights are on that device only while it runs. So a model may be
larger than memory, and each weight is read once per pass.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from ..errors import LayerPruneError, UnsupportedModelError
from ..families import check_stage, protected_layers
from ..families.layout import find_decoder_layers
from ..families.multimodal import placeholder_tokens
from .devices import moved_to
from .memory import free_bytes, free_memory, is_out_of_memory
from .parts import (
    TrialError,
    agree,
    hidden_of,
    hook_scope,
    layer_stub,
    num_values,
    probe_ids,
    refuse_quantised,
    replace_forward,
    trial,
    without_dropout,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

_PROBE_TOKENS = 8
Result = TypeVar("Result")


@dataclass
class Batch:
    """Rows that are going through the decoder.

    Args:
        input_ids (`torch.Tensor`): Token ids `[batch, seq]`.
        hidden (`torch.Tensor`): The input hidden states `[batch, seq, hidden]` of the next layer.
        calls (`list[tuple[tuple, dict]]`): Each layer's arguments other than the hidden states.
        text_positions (`torch.Tensor`): Positions whose next token is text, boolean `[batch, seq]`; all without images.
        added_before (`dict[int, torch.Tensor]`): Features that are added to the input of a layer, by its index.
        added_after (`dict[int, torch.Tensor]`): Features that are added to the output of a layer.
    """

    input_ids: torch.Tensor
    hidden: torch.Tensor
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    text_positions: torch.Tensor
    added_before: dict[int, torch.Tensor] = field(default_factory=dict)
    added_after: dict[int, torch.Tensor] = field(default_factory=dict)


class LayerWalk:
    """A causal language model whose decoder layers are run one at a time.

    Args:
        model (`PreTrainedModel`): The model. It is not changed, and runs in evaluation mode, whatever mode it is in.
        device (`str` or `torch.device`, *optional*): Where a layer's weights are moved to while it runs. By default
            layers run where they are.

    Raises:
        UnsupportedModelError: The model's layers can't be run one at a time.
    """

    def __init__(self, model: PreTrainedModel, *, device: str | torch.device | None = None) -> None:
        check_stage(model.config, "rank")
        self.model = model
        self.stack = find_decoder_layers(model)
        self.layers: nn.ModuleList = self.stack.layers
        self.num_layers = len(self.layers)
        self._device = torch.device(device) if device is not None else None
        self._storage_device = next(self.layers[0].parameters()).device
        self._tried_media = False
        # How many values each layer returns, see [`num_values`].
        self._returns: list[int | None] = [None] * self.num_layers
        if self._device is not None and self._device != self._storage_device:
            self._move_surroundings()
        self._check_layerwise(probe_ids(model, _PROBE_TOKENS).to(self.device), {})

    @property
    def device(self) -> torch.device:
        """The device of the hidden states."""
        return self._device or self._storage_device

    @property
    def reloads_weights(self) -> bool:
        """Whether each pass over the layers has to load their weights again."""
        size = self.model.get_memory_footprint(return_buffers=False)
        return self._is_streaming or size > free_bytes(torch.device("cpu")) // 2

    def begin(self, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor] | None = None) -> Batch:
        """Embed rows of tokens `[batch, seq]` without padding, and the model's other inputs, such as `pixel_values`.

        Raises:
            UnsupportedModelError: With these media, the layers can't be run one at a time.
        """
        media = {name: self._to_device(value) for name, value in (media or {}).items()}
        if media and not self._tried_media:
            self._tried_media = True
            self._check_layerwise(input_ids.to(self.device), media)
        return self._begin(input_ids.to(self.device), media)

    @contextmanager
    def layer(self, index: int) -> Iterator[Callable[[torch.Tensor, Batch], torch.Tensor]]:
        """Load one layer inside a `with` block.

        Yields:
            `Callable`: Runs the layer: takes hidden states `[batch, seq, hidden]` and the batch that they belong to,
                and returns the layer's output hidden states. Gradients flow if they are enabled.
        """
        layer = self.layers[index]

        def run(hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
            args, kwargs = batch.calls[index]
            if index in batch.added_before:
                hidden = hidden + batch.added_before[index]
            after = hidden_of(layer(hidden, *args, **kwargs))
            return after + batch.added_after[index] if index in batch.added_after else after

        with self._on_device(layer), without_dropout(layer):
            yield run

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, the head, and whatever the model does to its logits, on the last layer's output."""

        def inject(index: int, before: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
            return hidden if index == self.num_layers - 1 else before

        with self._replace_layers(inject):
            return self._forward(torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device))

    def with_whole_model(self, work: Callable[[], Result]) -> Result:
        """Do work that runs the whole model, such as generating text, with all of its weights on one device.

        That is the device of the walk or, if the model does not fit there, the one where its layers are kept.
        """
        try:
            with self._on_device(self.model):
                return work()
        except (RuntimeError, MemoryError, LayerPruneError) as error:
            if not (self._is_streaming and is_out_of_memory(error)):
                raise
        finally:
            free_memory()
        logger.warning(
            "%s is too small for the whole model, so it runs on %s for now", self._device, self._storage_device
        )
        with moved_to(self._storage_device, self.model):
            return work()

    # --- internals ---------------------------------------------------------------------------------------

    def _begin(self, input_ids: torch.Tensor, media: Mapping[str, torch.Tensor]) -> Batch:
        calls: list[Any] = [None] * self.num_layers
        entering: list[Any] = [None] * self.num_layers

        def record(index: int, before: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
            calls[index], entering[index] = (args, kwargs), before
            # After zeros, whatever enters the next layer was added by the model in between.
            return torch.zeros_like(before) if media else before

        with torch.no_grad(), self._replace_layers(record), self._skip_head():
            self._forward(input_ids, logits_to_keep=1, **media)
        if any(call is None for call in calls):
            raise self._refusal("not every layer is called")
        batch = Batch(input_ids, entering[0], calls, torch.ones_like(input_ids, dtype=torch.bool))
        if media:
            tokens = torch.tensor(placeholder_tokens(self.model.config), device=input_ids.device)
            batch.text_positions[:, :-1] = ~torch.isin(input_ids[:, 1:], tokens)
            for index in range(1, self.num_layers):
                if entering[index].any():
                    self._record_added(batch, index, entering[index])
        return batch

    def _record_added(self, batch: Batch, index: int, added: torch.Tensor) -> None:
        """Features belong to the layer, of the two around them, that can't be dropped."""
        protected = protected_layers(self.model.config)
        if index - 1 in protected:
            batch.added_after[index - 1] = added
        elif index in protected:
            batch.added_before[index] = added
        else:
            raise self._refusal(
                f"features are added between layers {index - 1} and {index}, neither of which has to stay"
            )

    def _to_device(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor on the device and, if it holds no indices, in the type of the weights."""
        return value.to(self.device, self.model.dtype) if value.is_floating_point() else value.to(self.device)

    def _forward(self, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        with without_dropout(self.model):
            return self.model(input_ids=input_ids, use_cache=False, return_dict=True, **kwargs).logits

    def _replace_layers(
        self, replacement: Callable[[int, torch.Tensor, tuple, dict], torch.Tensor]
    ) -> AbstractContextManager[None]:
        """Call a function in place of every layer."""

        def stub(index: int) -> Callable[..., Any]:
            return layer_stub(functools.partial(replacement, index), lambda: self._returns[index])

        return replace_forward(list(self.layers), *map(stub, range(self.num_layers)))

    def _skip_head(self) -> AbstractContextManager[None]:
        """Skip the head where its logits are not used: its product is slow for a few rows, and on some CPUs takes ten
        times the memory of its weights.
        """
        head = self.model.get_output_embeddings()
        return replace_forward([] if head is None else [head], lambda hidden, *args, **kwargs: hidden)

    def _check_layerwise(self, ids: torch.Tensor, media: Mapping[str, torch.Tensor]) -> None:
        """Run a row normally and layer by layer, and refuse a model for which the results differ."""
        order: list[int] = []

        def make_hook(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                order.append(index)
                self._returns[index] = num_values(output)

            return hook

        def on_device(layer: nn.Module) -> Callable[..., Any]:
            own = layer.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                with self._on_device(layer):
                    return own(*args, **kwargs)

            return forward

        notes = hook_scope(*[one.register_forward_hook(make_hook(i)) for i, one in enumerate(self.layers)])
        try:
            with trial(), notes, torch.no_grad(), replace_forward(list(self.layers), *map(on_device, self.layers)):
                wanted = self._forward(ids, **media)
        except TrialError as error:
            why = f"the model itself fails on a few tokens ({error})"
            raise refuse_quantised(self.model, self.device, error) or self._refusal(why) from error
        if order != list(range(self.num_layers)):
            raise self._refusal("they are not run once each, in order")
        try:
            with trial(), torch.no_grad():
                batch = self._begin(ids, media)
                if batch.hidden.shape[:-1] != ids.shape:
                    raise self._refusal("they pass on several streams of hidden states")
                for index in range(self.num_layers):
                    with self.layer(index) as run:
                        batch.hidden = run(batch.hidden, batch)
                logits = self.logits(batch.hidden)
        except TrialError as error:
            raise self._refusal(f"one fails when it is run alone ({error})") from error
        if not agree(logits, wanted):
            raise self._refusal("they pass more than hidden states to each other")

    def _refusal(self, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the layers of {type(self.model).__name__} can't be run one at a time: {why}. Choose layers with a "
            "criterion that needs no data (reverse_order, random, magnitude_l1, magnitude_l2), or list them yourself"
        )

    @property
    def _is_streaming(self) -> bool:
        return self._device is not None and self._device != self._storage_device

    def _move_surroundings(self) -> None:
        """Move everything but the layers to the device, permanently."""
        inside = {id(tensor) for layer in self.layers for tensor in (*layer.parameters(), *layer.buffers())}
        for module in self.model.modules():
            both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for tensors in both:
                for name, tensor in tensors.items():
                    if tensor is not None and id(tensor) not in inside and tensor.device != self._device:
                        if tensors is module._parameters:
                            tensor.data = tensor.data.to(self._device)
                        else:
                            tensors[name] = tensor.to(self._device)

    def _on_device(self, module: nn.Module) -> AbstractContextManager[None]:
        """Move a layer, or the whole model, to the device inside a `with` block, if its layers are elsewhere."""
        return moved_to(self._device if self._is_streaming else None, module)
