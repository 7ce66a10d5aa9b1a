"""The dense model as teacher: its last hidden states for each training row, computed once.

Up to the first layer that was dropped or changed, the teacher is the same as the student, so its pass starts from the
student's hidden states there. Only the last hidden states are kept, one vector per token; the loss computes logits
from them with the dense model's head, chunk by chunk.
"""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError
from ..families import Cut
from ..families.layout import find_decoder_layers
from ..runtime.head import Head, OutputHead
from ..runtime.loading import load_base
from ..runtime.prefix import Prefix, shared_layers
from .store import hash_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Teacher:
    """A dense model that runs once over the training rows.

    Args:
        student (`PreTrainedModel`): The pruned model, before training.
        cut (`Cut`, *optional*): The cut that was made in the dense model, if it is known.
        source (`str` or `PreTrainedModel`): The dense model: a folder, a Hub id, a GGUF file, or a loaded model.
        limit (`int`): How many of the student's layers are frozen; no more than these can be shared.
        from_pretrained_kwargs: For loading it: `revision`, `attn_implementation`, ...

    Raises:
        CheckpointError: It can't be loaded, or has a different number of layers than the student's base.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        cut: Cut | None,
        source: str | PreTrainedModel,
        limit: int,
        **from_pretrained_kwargs: Any,
    ) -> None:
        self._borrowed = not isinstance(source, str)
        if isinstance(source, str):
            logger.info("loading the dense model %s as the teacher", source)
            # Not `student.dtype`: trained weights may be held in float32.
            dtype = getattr(student.config, "dtype", None) or student.dtype
            model = load_base(source, dtype=dtype, **from_pretrained_kwargs)
        else:
            model = source
        self.model: Any = model.eval().requires_grad_(False)
        layers = len(find_decoder_layers(model).layers)
        if cut is not None and layers != cut.num_layers:
            raise CheckpointError(
                f"the teacher has {layers} layers, but this model was cut from one with {cut.num_layers}; "
                "name the dense model with --teacher"
            )
        self.shared = shared_layers(model, student, min(limit, cut.drop[0]) if cut is not None else 0)
        self._output: Any = OutputHead(model)
        self.head: Head = self._output.head()
        self.dtype = model.dtype
        self.width = self._output.width
        self.fingerprint = hash_tensors(model.named_parameters())
        self._prefix: Prefix | None = None

    def prepare(self, inputs: dict[str, Any], device: torch.device, *, needs_ids: bool = False) -> None:
        """Move the model to a device, without the layers that it shares with the student.

        Args:
            inputs (`dict[str, torch.Tensor]`): The model's arguments for a few rows.
            device (`torch.device`): The device.
            needs_ids (`bool`, defaults to `False`): See [`Prefix`].
        """
        if self.shared:
            self._prefix = Prefix(self.model, self.shared, needs_ids=needs_ids)
            home = next(self.model.parameters()).device
            self._prefix.run(**{name: value.to(home) for name, value in inputs.items()})
            self._prefix.skip()
            self._prefix.unload()
        self.model.to(device)

    def states(self, inputs: dict[str, torch.Tensor], shared: torch.Tensor | None = None) -> torch.Tensor:
        """The last hidden states of some rows.

        Args:
            inputs (`dict[str, torch.Tensor]`): The model's arguments for the rows.
            shared (`torch.Tensor`, *optional*): The output of the shared layers, if there are any.

        Returns:
            `torch.Tensor`: `[batch, seq, width]`, the input of `head`.
        """
        if self._prefix is not None and shared is not None:
            inputs = self._prefix.put(shared, inputs)
        return self._output.states(**inputs, use_cache=False)

    def let_go(self, device: torch.device, student: Head) -> None:
        """Free the model, and keep only its head on a device.

        Args:
            device (`torch.device`): The device.
            student (`Head`): The student's head; if it is frozen and has the same weights, both share one copy.
        """
        shared = student.weight
        weight = None if self.head.weight is None else self.head.weight.detach()
        if shared is not None and weight is not None and not shared.requires_grad and shared.shape == weight.shape:
            weight = shared.detach() if torch.equal(shared.cpu(), weight.cpu()) else weight
        weight = None if weight is None else weight.to(device)
        bias = None if self.head.bias is None else self.head.bias.detach().to(device)
        self.head = Head(weight, bias, self.head.transform)
        if self._prefix is not None and self._borrowed:
            self._prefix.restore()
        self.model = self._prefix = self._output = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
