"""The dense model as teacher: its last hidden states for each training row, computed once.

If the student's frozen layers are the same in the teacher, its pass starts from their output. Only the last hidden
states are kept, one vector per token, and those after the cut for feature reconstruction; the loss computes logits
from them with the dense model's head, chunk by chunk.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CutError
from ..runtime.head import Head, OutputHead
from ..runtime.loading import load_base
from ..runtime.memory import free_memory
from ..runtime.parts import TrialError, agree, probe_ids, trial
from ..runtime.prefix import Prefix
from .placement import eager_attention_on_cpu, is_on_several_devices
from .store import hash_tensors
from .student import check_teacher_config, recorded_cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


class Teacher:
    """A dense model that runs once over the training rows.

    Args:
        source (`str` or `PreTrainedModel`): The dense model: a folder, a Hub id, a GGUF file, or a loaded model.
        student (`PreTrainedModel`): The pruned model, before training.
        prefix (`Prefix`, *optional*): The student's frozen layers, which have run once.
        revision (`str`, *optional*): Branch, tag or commit of the dense model on the Hub.
        features (`tuple[int, ...]`, *optional*): After how many of its layers hidden states are wanted, too.

    Raises:
        CheckpointError: It can't be loaded, or can't teach the student, see [`check_teacher_config`].
    """

    def __init__(
        self,
        source: str | PreTrainedModel,
        student: PreTrainedModel,
        prefix: Prefix | None,
        revision: str | None = None,
        features: tuple[int, ...] = (),
    ) -> None:
        self._is_external = not isinstance(source, str)
        if isinstance(source, str):
            logger.info("loading the dense model %s as the teacher", source)
            # Not `student.dtype`: trained weights may be held in float32.
            dtype = getattr(student.config, "dtype", None) or student.dtype
            attention = student.config._attn_implementation
            source = load_base(source, revision=revision, dtype=dtype, attn_implementation=attention)
        self.model: Any = source.eval().requires_grad_(False)
        self._device = next(source.parameters()).device
        if recorded_cut(student.config) is not None:
            name = str(source.config.name_or_path)
            check_teacher_config(source.config, student.config, name, features=bool(features))
        with eager_attention_on_cpu(source):
            self._output: Any = OutputHead(source)
        self.head: Head = self._output.head()
        self.width = self._output.width
        self.layer_width: int = source.config.get_text_config().hidden_size
        self.feature_width = len(features) * self.layer_width
        # Size of a token's states.
        self.token_bytes: int = (self.feature_width + self.width) * source.dtype.itemsize
        self.fingerprint = hash_tensors(source.named_parameters(), source.config.to_json_string(), *features)
        self._features = features
        self._feature_prefix = Prefix(source, features[-1]) if features else None
        self._prefix: Prefix | None = None
        if prefix is None or source is student:
            return
        own = Prefix(source, prefix.depth, needs_ids=prefix.needs_ids)
        if own.is_equivalent(prefix) and self._can_start_from(own):
            own.unload()
            self._prefix = own
        else:
            own.restore()

    def _can_start_from(self, prefix: Prefix) -> bool:
        """Skip the prefix; whether its output is all that the other layers need, also those that the student lacks."""
        inputs = {"input_ids": probe_ids(self.model, 8)}
        try:
            with trial(), torch.inference_mode(), eager_attention_on_cpu(self.model):
                with prefix.record() as states:
                    wanted = self._output.states(**inputs, use_cache=False)
                prefix.skip()
                found = self._output.states(**prefix.set_output(states[prefix.depth], inputs), use_cache=False)
        except TrialError:
            return False
        return agree(found, wanted)

    @property
    def shared_depth(self) -> int:
        """How many layers it does not run, because it starts from their output."""
        return 0 if self._prefix is None else self._prefix.depth

    def states(self, inputs: dict[str, torch.Tensor], shared: torch.Tensor | None) -> torch.Tensor:
        """The last hidden states of some rows, `[batch, seq, width]`: the input of `head`, after the features if any.

        `inputs` are the model's arguments, and `shared` is the output of the student's frozen layers, if it starts there.
        """
        if self._prefix is not None and shared is not None:
            inputs = self._prefix.set_output(shared, inputs)
        if self._feature_prefix is None:
            return self._output.states(**inputs, use_cache=False).to(self.model.dtype)
        with self._feature_prefix.record(self._features) as found:
            last = self._output.states(**inputs, use_cache=False)
        shape = (*last.shape[:-1], self.layer_width)
        if any(states.shape != shape for states in found.values()):
            raise CutError("this model's layers pass on more than one hidden state a token; use features=0")
        return torch.cat([*(found[depth] for depth in self._features), last], -1).to(self.model.dtype)

    def release(self, device: torch.device, student: Head) -> Head:
        """Free the model, or move one that was passed in back to its device, and return its head on the given device.

        If the student's head is frozen and has the same weights, both share one copy.
        """
        own, weight, bias = student.weight, self.head.weight, self.head.bias
        if own is not None and weight is not None and not own.requires_grad and own.shape == weight.shape:
            weight = own if torch.equal(own.cpu(), weight.cpu()) else weight
        weight = None if weight is None else weight.detach().to(device)
        bias = None if bias is None else bias.detach().to(device)
        head = Head(weight, bias, self.head.transform)
        self.put_back()
        self.model = self._prefix = self._feature_prefix = self._output = self.head = None  # type: ignore[assignment]
        free_memory()
        return head

    def put_back(self) -> None:
        """Put a model that was passed in together again, on the device that it came from."""
        if not self._is_external or self.model is None:  # `release` has done it
            return
        if self._prefix is not None:
            self._prefix.restore()
        moved = any(parameter.device != self._device for parameter in self.model.parameters())
        if moved and not is_on_several_devices(self.model):
            self.model.to(self._device)
