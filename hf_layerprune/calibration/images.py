"""Calibration rows with images: each is one example, as the model's own processor encodes it.

A chat goes through the processor's chat template. Its images come before the first user message, unless the messages
have placeholders for them. Plain text becomes a user message; without a template, the images' placeholders are put before
it. A row is truncated to `length` tokens, and a row whose images don't fit is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, CutError, boundary
from ..families.multimodal import placeholder_tokens
from ..options import pluralize
from ..runtime.loading import has_chat_template
from .documents import Document, is_image, message_parts, open_image

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

# The outputs of a processor that have one entry per token.
_PER_TOKEN = ("attention_mask", "token_type_ids", "mm_token_type_ids")
_MIN_TOKENS = 2  # tokens in a row: one, and the one to predict


def image_rows(
    documents: Iterator[Document],
    source: str,
    samples: int,
    length: int,
    model: PreTrainedModel | None,
    load_processor: Callable[[], ProcessorMixin] | None,
) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Make `samples` rows of at most `length` tokens from examples with images, in their order.

    Each row is token ids `[1, seq]`, and the model's other inputs. `source` is where they come from, for messages.

    Raises:
        CheckpointError: An image can't be read, or the processor refuses a row.
        CutError: There are too few rows, the model or the processor is missing, or the model reads text alone.
    """
    if model is None or load_processor is None:
        raise CutError(f"calibration={source!r} has images, which need the model and its processor")
    tokens = placeholder_tokens(model.config)
    if not tokens:
        raise CutError(
            f"{source} has images, but {model.name_or_path or 'the model'} is a {model.config.model_type} model that "
            "reads only text; specify a data set without images"
        )
    processor = load_processor()
    rows: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] = []
    longest = left_out = 0
    for document in documents:
        if not isinstance(document.text, str) and not has_chat_template(processor):
            raise CheckpointError(
                f"{document.where} is a conversation, and the processor of {model.name_or_path or 'the model'} has no chat "
                "template for it; specify a column of plain text (FILE:COLUMN)"
            )
        with boundary(f"the processor can't read {document.where}"):
            ids, media = _process(processor, document)
        places = torch.isin(ids[0], torch.tensor(tokens)).nonzero()
        if document.images and not len(places):
            raise CheckpointError(f"{document.where} has an image, but the chat template gives it no place")
        end = int(places[-1]) + 1 if len(places) else 0
        if end > length or ids.shape[1] < _MIN_TOKENS:
            longest, left_out = max(longest, end), left_out + 1
            continue
        cut = {name: value[:, :length] for name, value in media.items() if name in _PER_TOKEN}
        rows.append((ids[:, :length], media | cut))
        if len(rows) == samples:
            break
    if len(rows) < samples:
        fit = f", and {left_out} whose images take up to {longest} tokens" if left_out else ""
        raise CutError(
            f"calibration {source} has {pluralize(len(rows), 'row')} within calibration_length={length}{fit}, not {samples}; "
            "use a smaller calibration_samples, a larger calibration_length, or more rows"
        )
    return rows


def _process(processor: Any, document: Document) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The tokens `[1, seq]` of an example, and the model's other inputs."""
    given = list(document.images or ())
    text = document.text
    if isinstance(text, str) and (not has_chat_template(processor) or _has_image_token(processor, text)):
        if not _has_image_token(processor, text):
            text = processor.image_token * len(given) + text
        images = [_open(image, document) for image in given] or None
        encoded = processor(text=[text], images=images, return_tensors="pt")
    else:
        chat = [{"role": "user", "content": text}] if isinstance(text, str) else text
        encoded = processor.apply_chat_template(
            _fill_placeholders(chat, given, document), tokenize=True, return_dict=True, return_tensors="pt"
        )
    tensors = {name: value for name, value in encoded.items() if isinstance(value, torch.Tensor)}
    tensors.pop("labels", None)  # PaliGemma's processor makes them, and the model would compute a loss
    return tensors.pop("input_ids"), tensors


def _has_image_token(processor: Any, text: str) -> bool:
    return bool(getattr(processor, "image_token", None)) and processor.image_token in text


def _fill_placeholders(chat: list[dict[str, Any]], images: list[Any], document: Document) -> list[dict[str, Any]]:
    """A chat whose messages are lists of parts, with the images in place of their placeholders."""
    messages = []
    for message in chat:
        parts = [dict(part) for part in message_parts(message)]
        messages.append(message | {"content": parts or [{"type": "text", "text": message["content"]}]})
    if not any(is_image(part) for message in messages for part in message["content"]):
        first = next((message for message in messages if message["role"] == "user"), messages[0])
        first["content"][:0] = [{"type": "image"} for _ in images]
    places = [part for message in messages for part in message["content"] if is_image(part)]
    sources = [_image_source(part) for part in places]
    if (empty := sources.count(None)) != len(images):
        raise CheckpointError(
            f"{document.where} has {pluralize(len(images), 'image')} for {pluralize(empty, 'place')} in its messages; give each image one place"
        )
    remaining = iter(images)
    for part, image in zip(places, sources, strict=True):
        part.clear()
        part |= {"type": "image", "image": _open(next(remaining) if image is None else image, document)}
    return messages


def _image_source(part: dict[str, Any]) -> Any:
    return next((part[name] for name in ("image", "path", "url", "base64") if part.get(name) is not None), None)


def _open(image: Any, document: Document) -> Any:
    """Open an image, in whatever form the data set stores it."""
    if isinstance(image, dict):  # of a data set whose images are not decoded
        image = BytesIO(image["bytes"]) if image.get("bytes") else image.get("path")
    if isinstance(image, str):
        path = document.folder / image
        if not path.is_file():
            raise CheckpointError(f"{document.where} names the image {image}, and {path} is not a file")
        image = path
    return open_image(image)
