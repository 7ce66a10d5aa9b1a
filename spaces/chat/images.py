"""Images in a conversation: find them in messages, open them, and encode them with the model's own processor."""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, AutoProcessor

logger = logging.getLogger(__name__)

# Types whose multimodal model fails with this version of transformers, so that their text model is loaded.
TEXT_ONLY_TYPES = ("llama4",)


class Prompt(list):
    """The token ids of a prompt.

    Args:
        ids (`list[int]`): The ids.
        media (`dict[str, torch.Tensor]`, *optional*): What the model takes beside them, such as `pixel_values`.
    """

    def __init__(self, ids: list[int], media: dict[str, torch.Tensor] | None = None) -> None:
        super().__init__(ids)
        self.media = media or {}


def auto_class(config: Any) -> Any:
    """The auto class of a model: a checkpoint whose `architectures` name a multimodal class is loaded whole."""
    whole = AutoModelForMultimodalLM._model_mapping.get(type(config), None)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return AutoModelForMultimodalLM
    named = whole is not None and whole.__name__ in (config.architectures or ())
    return AutoModelForMultimodalLM if named and config.model_type not in TEXT_ONLY_TYPES else AutoModelForCausalLM


def processor_of(names: list[str], config: Any) -> Any:
    """The processor of a model that reads images, from the first place that has it; `None` for one that reads text alone."""
    if auto_class(config) is AutoModelForCausalLM:
        return None
    for name in dict.fromkeys(names):
        try:
            found = AutoProcessor.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
            logger.warning("%s answers text alone here, as its processor can't be loaded: %s", name, error)
            continue
        if hasattr(found, "image_processor"):
            return found
    return None


def paths_of(message: dict[str, Any]) -> list[str]:
    """The images of a message, as paths of files that Gradio has received."""
    parts = message["content"] if isinstance(message["content"], list) else [message["content"]]
    files = [part.get("file", part) for part in parts if isinstance(part, dict) and part.get("type") != "text"]
    return [file["path"] if isinstance(file, dict) and "path" in file else "" for file in files]


def encode_conversation(processor: Any, messages: list[dict[str, Any]]) -> Prompt:
    """A conversation, whose messages may name the paths of `images`, as a prompt.

    Raises:
        OSError: A file is no image.
    """
    from PIL import EpsImagePlugin, Image

    EpsImagePlugin.gs_binary = False  # Ghostscript would run the program that an EPS file is

    def parts(message: dict[str, Any]) -> dict[str, Any]:
        opened = [Image.open(path).convert("RGB") for path in message.get("images", ())]
        text = [{"type": "text", "text": message["content"]}] if message["content"] else []
        return {"role": message["role"], "content": [*({"type": "image", "image": image} for image in opened), *text]}

    made = processor.apply_chat_template(
        [parts(message) for message in messages],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    media = {name: value for name, value in made.items() if torch.is_tensor(value) and name != "attention_mask"}
    return Prompt(media.pop("input_ids")[0].tolist(), media)
