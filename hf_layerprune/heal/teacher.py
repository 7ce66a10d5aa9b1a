"""The dense model as teacher: its last hidden states for each training row, computed once.

Up to the first layer that was dropped or changed it is the student, so its pass starts from what leaves the student's
layers there. Only the last hidden states are kept, one vector a token; logits are had from them, chunk by chunk, with
the dense model's head, when the loss needs them.
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
    """A dense model that is asked once.

    Args:
        student (`PreTrainedModel`): The pruned model, before anything was trained.
        cut (`Cut`, *optional*): What was dropped from the dense model, where that is known.
        source (`str` or `PreTrainedModel`): The dense model: a folder, a Hub id, a GGUF file, or loaded.
        limit (`int`): How many of the student's layers are frozen; no more can be shared.
        from_pretrained_kwargs: For loading it: `revision`, `attn_implementation`, ...

    Raises:
        CheckpointError: It can't be loaded, or is not what the student was cut from.
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
            logger.info("loading the dense model %s to learn from it", source)
            # Not `student.dtype`: what is trained may be held in float32.
            dtype = getattr(student.config, "dtype", None) or student.dtype
            model = load_base(source, dtype=dtype, **from_pretrained_kwargs)
        else:
            model = source
        self.model: Any = model.eval().requires_grad_(False)
        layers = len(find_decoder_layers(model).layers)
        if cut is not None and layers != cut.num_layers:
            raise CheckpointError(
                f"the teacher has {layers} layers, and this model was cut from one with {cut.num_layers}; "
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
        """Move what is needed to a device, and leave out what the student does already.

        Args:
            inputs (`dict[str, torch.Tensor]`): A few rows as the model takes them.
            device (`torch.device`): Where to.
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
            inputs (`dict[str, torch.Tensor]`): The rows as the model takes them.
            shared (`torch.Tensor`, *optional*): What leaves the shared layers, where there are any.

        Returns:
            `torch.Tensor`: `[batch, seq, width]`, as `head` takes them.
        """
        if self._prefix is not None and shared is not None:
            inputs = self._prefix.put(shared, inputs)
        return self._output.states(**inputs, use_cache=False)

    def let_go(self, device: torch.device, student: Head) -> None:
        """Keep only the head, on a device.

        Args:
            device (`torch.device`): Which one.
            student (`Head`): The student's head; where it is frozen and the same, there is one for both.
        """
        own, mine = student.weight, self.head.weight
        weight = None if mine is None else mine.detach()
        if own is not None and weight is not None and not own.requires_grad and own.shape == weight.shape:
            weight = own.detach() if torch.equal(own.cpu(), weight.cpu()) else weight
        weight = None if weight is None else weight.to(device)
        bias = None if self.head.bias is None else self.head.bias.detach().to(device)
        self.head = Head(weight, bias, self.head.transform)
        if self._prefix is not None and self._borrowed:
            self._prefix.restore()
        self.model = self._prefix = self._output = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
