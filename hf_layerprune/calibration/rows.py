"""Calibration sets: the rows of tokens that criteria and repairs use.

    calibration = load_calibration("self", tokenizer, model=model)             # text written by the dense model
    calibration = load_calibration("notes.txt", tokenizer, samples=64)         # a local text file
    calibration = load_calibration("rows.jsonl:output", tokenizer)             # a column of a local file
    calibration = load_calibration("allenai/c4@en:train:text", tokenizer)      # a column of a data set on the Hub

Rows of text are windows without padding: documents are concatenated, separated by an end-of-text token, and a seeded
random sample of the windows is used. Each begins as the tokenizer begins a text. Where a set has images, each of its rows
is one example, see [`.images`].
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from random import Random
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CheckpointError, CutError, boundary
from ..families.multimodal import placeholder_tokens
from ..options import pluralize
from ..records.names import strip_local_path
from ..runtime.loading import has_chat_template
from ..runtime.windows import check_context, special_prefix, split_into_windows
from .documents import Document, read_documents
from .images import image_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

SELF = "self"
# How many times the required number of tokens is read, so that rows don't all come from the first documents.
_OVERSAMPLING = 4
_PROBE_TOKENS = 32

Media = dict[str, torch.Tensor]
# Token ids `[batch, seq]` of some rows, and the model's other inputs, such as `pixel_values`.
Rows = tuple[torch.Tensor, Media]


@dataclass(frozen=True)
class CalibrationSet:
    """Rows of tokens, all with images or all without.

    Args:
        input_ids (`torch.Tensor`): `[samples, length]`, int64; without padding, unless there are images.
        source (`str`): Where they come from, as given by the user.
        fingerprint (`str`): sha256 of the tokens, their shape and the images.
        seed (`int`, defaults to 42): The seed that the rows were sampled with.
        media (`tuple[Media, ...]`): For each row, the model's other inputs; empty for rows of text.
        lengths (`tuple[int, ...]`): How many tokens each row has before its padding; empty for rows of text.
    """

    input_ids: torch.Tensor
    source: str
    fingerprint: str
    seed: int = 42
    media: tuple[Media, ...] = ()
    lengths: tuple[int, ...] = ()

    @classmethod
    def from_ids(
        cls,
        input_ids: torch.Tensor,
        source: str,
        seed: int = 42,
        media: Sequence[Media] = (),
        lengths: Sequence[int] = (),
    ) -> CalibrationSet:
        """Make a set of rows of tokens `[samples, length]`."""
        input_ids = input_ids.to(torch.int64).cpu().contiguous()
        digest = hashlib.sha256(f"{tuple(input_ids.shape)}".encode() + input_ids.numpy().astype("<i8").tobytes())
        for row, used in zip(media, lengths, strict=True):
            for name, value in sorted(row.items()):
                digest.update(f"{used} {name} {tuple(value.shape)} {value.dtype}".encode())
                digest.update(value.contiguous().view(torch.uint8).numpy().tobytes())
        return cls(input_ids, source, digest.hexdigest(), seed, tuple(media), tuple(lengths))

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def tokens(self) -> int:
        """The number of tokens in all rows."""
        return sum(self.lengths) if self.media else self.input_ids.numel()

    def batches(self, size: int) -> Iterator[Rows]:
        """The rows, `size` at a time; rows with images, which differ in length, one at a time."""
        if not self.media:
            yield from ((ids, {}) for ids in self.input_ids.split(size))
        for ids, media, length in zip(self.input_ids, self.media, self.lengths, strict=False):
            yield ids[None, :length], media

    def probe(self) -> Rows:
        """A few tokens for trial runs of a layer: the first of the first row; all of a row with an image."""
        return next(self.batches(1)) if self.media else (self.input_ids[:1, :_PROBE_TOKENS], {})

    def first(self, rows: int) -> CalibrationSet:
        """A set of the first rows."""
        return self._slice(0, rows)

    def split(self, held_out: float) -> tuple[CalibrationSet, CalibrationSet]:
        """Hold out a share of the rows; returns the other rows, and the held-out ones. Both are at least one row.

        Raises:
            CutError: There are fewer than two rows.
        """
        if len(self) < 2:
            raise CutError("one calibration row can't be split; raise calibration_samples")
        count = held_out_rows(held_out, len(self))
        return self._slice(0, len(self) - count), self._slice(len(self) - count, len(self))

    def _slice(self, start: int, end: int) -> CalibrationSet:
        media, lengths = self.media[start:end], self.lengths[start:end]
        return CalibrationSet.from_ids(self.input_ids[start:end], self.source, self.seed, media, lengths)

    def record(self) -> dict[str, Any]:
        """The entry for `lineage.json`."""
        samples, length = self.input_ids.shape
        shape: dict[str, Any] = {"source": strip_local_path(self.source), "samples": samples, "length": length}
        images = {"images": True, "tokens": self.tokens} if self.media else {}
        return shape | images | {"seed": self.seed, "fingerprint": self.fingerprint}


def held_out_rows(held_out: float, rows: int) -> int:
    """The number of rows to hold out: the given share, and at least one on each side."""
    return min(rows - 1, max(1, round(held_out * rows)))


def load_calibration(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    samples: int = 128,
    length: int = 512,
    seed: int = 42,
    model: PreTrainedModel | None = None,
    processor: Callable[[], ProcessorMixin] | None = None,
) -> CalibrationSet:
    """Load a calibration set.

    Args:
        source (`str`): `"self"`, a `.txt`, `.json` or `.jsonl` file (`rows.jsonl:column`, `text` by default), or
            `id[@config][:split[:column]]` of a data set on the Hub or in a folder (split `train` and column `text` by
            default). A column holds text, or chats as lists of messages. A column `image` or `images` beside it holds
            images, or paths of images, relative to the file.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The model's tokenizer. Optional for `"self"`, where text
            then starts from the beginning-of-text token instead of an empty chat turn.
        samples (`int`, defaults to 128): Number of rows.
        length (`int`, defaults to 512): Number of tokens per row.
        seed (`int`, defaults to 42): For sampling the rows, or the text.
        model (`PreTrainedModel`, *optional*): The dense model. It writes the text for `"self"`; otherwise every token
            is checked against its vocabulary.
        processor (`Callable`, *optional*): Loads the model's processor, which rows with images need.

    Returns:
        `CalibrationSet`: The rows.

    Raises:
        CheckpointError: The text can't be read, or is empty.
        CutError: The text is too short, the rows are longer than the model's context, or the model or tokenizer it needs is missing.
    """
    if model is not None:
        check_context(model.config, length, "calibration_length")
    if source == SELF:
        if model is None:
            raise CutError('calibration="self" is text written by the dense model; pass the model')
        from .self_text import generate_text

        logger.info(
            "the dense model writes %s of %d tokens to calibrate on, which is slow on a CPU; text of your own avoids this",
            pluralize(samples, "row"),
            length,
        )
        return CalibrationSet.from_ids(generate_text(model, tokenizer, samples, length, seed), source, seed)
    if tokenizer is None:
        raise CutError(f"calibration={source!r} needs the model's tokenizer")
    documents = read_documents(source, seed)
    start = next(documents, None)
    documents = chain([] if start is None else [start], documents)
    reads_images = model is not None and bool(placeholder_tokens(model.config))
    if start is not None and (start.images or (reads_images and start.images is not None)):
        rows = image_rows(documents, source, samples, length, model, processor)
        lengths = [ids.shape[1] for ids, _ in rows]
        padded = torch.cat([torch.nn.functional.pad(ids, (0, length - ids.shape[1])) for ids, _ in rows])
        calibration = CalibrationSet.from_ids(padded, source, seed, [media for _, media in rows], lengths)
    else:
        calibration = CalibrationSet.from_ids(
            _sample_windows(documents, tokenizer, source, samples, length, seed), source, seed
        )
    check_vocabulary(calibration, model)
    return calibration


def _sample_windows(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    samples: int,
    length: int,
    seed: int,
) -> torch.Tensor:
    """A random sample of the windows of text, `[samples, length]`, in their order."""
    ids = _tokenize(documents, tokenizer, samples * length * _OVERSAMPLING)
    windows = split_into_windows(ids, length, special_prefix(tokenizer))
    rows = len(windows)
    if rows < samples:
        raise CutError(
            f"calibration {source} is too short: {len(ids):,} tokens make {pluralize(rows, 'row')} of {length}, not {samples}; use "
            "a smaller calibration_samples or calibration_length, or more text"
        )
    return windows[sorted(Random(seed).sample(range(rows), samples))]


def check_vocabulary(calibration: CalibrationSet, model: PreTrainedModel | None) -> None:
    """Refuse tokens outside a model's embeddings.

    Raises:
        CheckpointError: A token is outside them.
    """
    if model is None:
        return
    embeddings: Any = model.get_input_embeddings()
    size, largest = embeddings.weight.shape[0], int(calibration.input_ids.max())
    if largest >= size:
        raise CheckpointError(
            f"the calibration set has token {largest}, but the model's vocabulary ends at {size - 1}; use the "
            "tokenizer of this model"
        )


def _tokenize(documents: Iterator[Document], tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    ids: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        if document.images:
            raise CheckpointError(f"{document.where} has images, and the first row has none; use rows of one kind")
        if isinstance(document.text, str):
            if not document.text.strip():  # as between the paragraphs of some corpora; not the end of a document
                continue
            with boundary("the tokenizer can't read the calibration set"):
                ids += tokenizer(document.text, add_special_tokens=False, verbose=False).input_ids + separator
        elif not has_chat_template(tokenizer):
            raise CheckpointError(
                "the calibration set has conversations, but the tokenizer has no chat template; specify a set with plain text"
            )
        else:
            with boundary("the tokenizer's chat template can't render the calibration set", "name plain text instead"):
                chat: Any = tokenizer.apply_chat_template(document.text, return_dict=True)
            ids += chat.input_ids
        if len(ids) >= needed:
            break
    return ids
