"""Runs tasks about images by lm-evaluation-harness's `hf-multimodal`, on a model that is already loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.models.hf_vlms import HFMultimodalLM

from .harness import Runs, first_batch
from .tasks import quiet, require_harness

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin


class ImageHarness(Runs, HFMultimodalLM):
    """The harness for tasks about images, set up for one model.

    Args:
        model (`PreTrainedModel`): A model that reads images and text.
        processor (`ProcessorMixin`): Its processor.
        batch_size (`int` or `"auto"`, defaults to `"auto"`): Answers that are written together.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, batch_size: int | str = "auto") -> None:
        require_harness()
        text = model.config.get_text_config()
        with quiet():
            super().__init__(
                pretrained=model,
                tokenizer=processor,
                batch_size=first_batch(model, batch_size),
                max_length=getattr(text, "max_position_embeddings", None),  # which it seeks at the top of the config
                convert_img_format=True,
            )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the processor that is given; the harness only keeps one that it loads by a name."""
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer
