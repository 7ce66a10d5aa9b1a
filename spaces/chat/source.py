"""A model's small files, which are enough to build the page, and its conversations as token ids."""

from __future__ import annotations

import os
from bisect import bisect_left
from pathlib import Path
from typing import Any

import gradio as gr
from about import Records, find_file
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from images import Prompt, encode_conversation, processor_of
from jinja2 import TemplateError
from PIL import Image
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

NO_REPEAT_NGRAM = 5  # what a card advises, for models that declare nothing against repetition
# What to do for access, in a Space and elsewhere.
_TOKEN = f"{'give this Space a secret named HF_TOKEN with' if 'SPACE_ID' in os.environ else 'set HF_TOKEN to'} a token"
MAX_CONTEXT = int(os.environ.get("MAX_CONTEXT", 8192))  # tokens; less if the model's own context is shorter

Message = dict[str, Any]  # `role`, `content` as text and, where there are any, `images` as paths


class CannotLoad(Exception):
    """A model that does not exist or does not fit. The message is shown on the page."""


class Refused(gr.Error):
    """A request that can't be answered. The page and the API show the message."""

    def __init__(self, message: str) -> None:
        super().__init__(message, print_exception=False)


class Source:
    """The small files of a model, which are enough to build the page.

    Args:
        model (`str`): A Hub id, a folder or a `.gguf` file; a whole model or an adapter.
        base (`str`, *optional*): The dense model to compare with; by default the base of an adapter.

    Raises:
        CannotLoad: The files are missing or can't be read.
    """

    def __init__(self, model: str, base: str | None = None) -> None:
        self.model = model
        try:
            self.adapter = find_adapter(model)
            self.base = base or (self.adapter.base_model_name_or_path if self.adapter else None)
            whole = self.base if self.adapter else model
            if not whole:
                raise ValueError("it is an adapter whose adapter_config.json names no base")
            self.tokenizer = tokenizer_of(model, whole)
            config = AutoConfig.from_pretrained(**model_arguments(whole), trust_remote_code=False)
            self.config = config.get_text_config()
            self.processor = None if os.path.isfile(model) else processor_of([model, whole], config)
            self.records = Records.load(model_arguments(model)["pretrained_model_name_or_path"])
            if os.path.isfile(model):  # its records are those of its folder, its name is its own
                self.records.model = model
            self.size = weights_size(model)
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CannotLoad(explain(model, error)) from error
        self.generation = default_settings(whole)
        self.context = min(getattr(self.config, "max_position_embeddings", None) or MAX_CONTEXT, MAX_CONTEXT)

    @property
    def chats(self) -> bool:
        """Whether the model has a chat template, or a default one if there are several."""
        template = (self.processor or self.tokenizer).chat_template
        return "default" in template if isinstance(template, dict) else bool(template)

    def encode(self, messages: list[Message]) -> Prompt:
        """A conversation as token ids, with the prompt for an answer, and its images as inputs.

        Raises:
            Refused: A file can't be read as an image.
        """
        try:
            return self._rendered(messages)
        except TemplateError:
            if messages[0]["role"] != "system":
                raise
            # Some templates have no system role, so the system prompt is put before the first question.
            system, first, *rest = messages
            first = {**first, "content": f"{system['content']}\n\n{first['content']}"}
            return self._rendered([first, *rest])

    def _rendered(self, messages: list[Message]) -> Prompt:
        if self.processor is None:
            template = self.tokenizer.apply_chat_template
            return Prompt(template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])
        try:
            return encode_conversation(self.processor, messages)
        except (OSError, Image.DecompressionBombError) as error:
            raise Refused("One of the files can't be read as an image. Remove it, or attach another.") from error

    def fit(self, messages: list[Message], max_tokens: int) -> tuple[Prompt, int]:
        """Leave out the oldest questions and their answers until the rest and an answer of `max_tokens` fit.

        Returns:
            `tuple[Prompt, int]`: Token ids, and the number of messages that were left out.

        Raises:
            Refused: The question alone does not fit.
        """
        system = [message for message in messages[:1] if message["role"] == "system"]
        talk = messages[len(system) :]
        starts = [i for i, message in enumerate(talk) if message["role"] == "user"]
        room = self.context - max_tokens
        # Skip messages that can't fit (more than 16 characters per token, or more than one message), because tokenising
        # a book takes a while.
        sizes = [0]
        for message in reversed(talk):
            sizes.append(sizes[-1] + max(16, len(message["content"])))
        starts = [i for i in starts[:-1] if sizes[len(talk) - i] <= 16 * room] + starts[-1:]

        def fits(start: int) -> bool:
            return len(self.encode(system + talk[start:])) <= room

        start = starts[min(bisect_left(starts, True, key=fits), len(starts) - 1)]
        ids = self.encode(system + talk[start:])
        if len(ids) > room:
            raise Refused(
                f"This prompt has {len(ids):,} tokens. The context is {self.context:,} tokens, of which {max_tokens:,} are "
                "reserved for the answer: shorten the prompt or the system prompt, or lower the maximum of new tokens."
                + (" Images take tokens too: a smaller one takes fewer." if ids.media else "")
            )
        return ids, start

    def fit_text(self, text: str, max_tokens: int) -> list[int]:
        """A text to continue, as token ids.

        Raises:
            Refused: It does not fit.
        """
        ids = self.tokenizer(text)["input_ids"]
        room = self.context - max_tokens
        if len(ids) > room:
            raise Refused(
                f"This text has {len(ids):,} tokens, but only {room:,} fit before {max_tokens:,} new ones: shorten it."
            )
        return ids


def model_arguments(model: str) -> dict[str, str]:
    """The arguments of `from_pretrained` that name a model."""
    if not os.path.isfile(model):
        return {"pretrained_model_name_or_path": model}
    path = Path(model)
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def default_settings(model: str) -> dict[str, float]:
    """The settings in a model's generation config, or reasonable defaults."""
    try:
        config = GenerationConfig.from_pretrained(model_arguments(model)["pretrained_model_name_or_path"])
    except (OSError, ValueError):
        config = GenerationConfig()
    declared = config.no_repeat_ngram_size or (config.repetition_penalty or 1) != 1
    return {
        "temperature": config.temperature or 0.6,
        "top_p": config.top_p or 0.9,
        "no_repeat": 0 if declared else NO_REPEAT_NGRAM,
    }


def find_adapter(model: str) -> Any:
    """The configuration of an adapter; `None` for a whole model."""
    if os.path.isfile(model) or find_file(model, "config.json") or not find_file(model, "adapter_config.json"):
        return None
    from peft import PeftConfig

    import hf_layerprune  # noqa: F401 (makes the method known to PEFT)

    return PeftConfig.from_pretrained(model)


def tokenizer_of(model: str, whole: str) -> Any:
    """The tokenizer of a model, or that of its base if it has none."""
    try:
        if os.path.isfile(model):  # a file on this machine, and so is the package
            from hf_layerprune.runtime.loading import load_tokenizer

            return load_tokenizer(model)
        return AutoTokenizer.from_pretrained(**model_arguments(model), trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError):  # transformers 5.4 looks for protobuf first
        if model == whole:
            raise
        return AutoTokenizer.from_pretrained(**model_arguments(whole), trust_remote_code=False)


def weights_size(model: str) -> int:
    """The size of a model's weights in bytes."""
    if os.path.isfile(model):
        return 4 * Path(model).stat().st_size  # unpacked: 16 bits for what can be as little as 4
    folder = Path(model)
    if not folder.is_dir():
        try:
            files = HfApi().model_info(model, files_metadata=True).siblings
            return sum(file.size for file in files if file.rfilename.endswith(".safetensors"))
        except (OSError, ValueError):  # no network, but perhaps a copy in the cache
            folder = Path(snapshot_download(model, local_files_only=True, allow_patterns="*.safetensors"))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def explain(model: str, error: BaseException) -> str:
    """A message that says why a model can't be loaded and what to do."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return f"{model} is gated. Ask for access on its page, then {_TOKEN} that has it."
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"{model} is not on the Hub, or it is private. If it is private, {_TOKEN} that may read it."
    if isinstance(error, ImportError) and "hf_layerprune" in str(error):
        return f"{model} is an adapter, which needs hf-layerprune: add it to requirements.txt."
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{model} can't be loaded: {text if len(text) < 300 else text[:299] + '…'}"
