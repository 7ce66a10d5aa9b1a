"""Generates answers: streamed, seeded, timed, and stopped as soon as nobody is listening.

Models that answer at the same time take turns, token by token, and each one is timed only during its own turns. So the
speed is that of the model alone, and is not affected by other answers.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from source import Source
from torch import nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
)

TICK = 0.05  # seconds between two updates of an answer
# What an answer takes from its model's generation config: where it ends, and which tokens it may contain. The rest is
# chosen on the page, or needs what may be missing here (another search, cache or package), so that every answer fails.
TAKEN = (
    "bos_token_id", "eos_token_id", "pad_token_id", "stop_strings", "bad_words_ids", "suppress_tokens",
    "begin_suppress_tokens", "sequence_bias", "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip


class Stopped(Exception):
    """Raised inside a model when nobody is waiting for its answer."""


class Side:
    """A model that answers."""

    def __init__(self, name: str, model: PreTrainedModel) -> None:
        self.name, self.model = name, model.eval()
        declared = model.generation_config
        model.generation_config = GenerationConfig(**{name: getattr(declared, name, None) for name in TAKEN})
        self.layers = model.config.get_text_config().num_hidden_layers
        self.parameters = model.num_parameters()
        self.tensors = {t.data_ptr(): t.nbytes for t in chain(model.parameters(), model.buffers())}
        self.weights_bytes = sum(self.tensors.values())
        self.shared_bytes = 0
        for module in model.modules():
            for layer in module if isinstance(module, nn.ModuleList) else ():
                layer.register_forward_pre_hook(_stop_if_abandoned)


class FairLock:
    """A fair lock: it goes to the thread that has waited longest."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._line: deque[threading.Event] = deque()

    def acquire(self) -> None:
        """Wait for a turn."""
        mine = threading.Event()
        with self._lock:
            self._line.append(mine)
            if len(self._line) == 1:
                mine.set()
        mine.wait()

    def release(self) -> None:
        """End a turn."""
        with self._lock:
            self._line.popleft()
            if self._line:
                self._line[0].set()


TURNS = FairLock()
_here = threading.local()  # the answer that a thread is generating


def _stop_if_abandoned(*_: Any) -> None:
    """Runs before each layer, so that even the prefill of a long prompt stops at once."""
    answer = getattr(_here, "answer", None)
    if answer is not None and answer.stop.is_set():
        raise Stopped


class GumbelSampler(LogitsProcessor):
    """Draws the next token, so that the highest score is the token drawn (the Gumbel-max trick).

    `generate` takes no generator, and all threads share the global one. With its own generator, an answer depends only
    on its seed, and not on other answers.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Add noise to the scores `[batch, vocabulary]`."""
        noise = torch.empty_like(scores, dtype=torch.float32).exponential_(generator=self._generator)
        return scores.float() - noise.log()


class NoRepeats(NoRepeatNGramLogitsProcessor):
    """Keeps an answer from repeating a run of `size` tokens of its own; the prompt, up to `start`, may be quoted."""

    def __init__(self, size: int, start: int) -> None:
        super().__init__(size)
        self._start = start

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Rule out the tokens that would complete a run."""
        return super().__call__(input_ids[:, self._start :], scores)


class Answer(TextStreamer):
    """An answer that is being generated: its text so far, and its figures. The settings are `temperature`, `top_p`,
    `max_tokens` and `seed`.
    """

    def __init__(self, side: Side, source: Source, ids: list[int], settings: dict[str, Any]) -> None:
        super().__init__(source.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._side, self._ids, self._settings = side, ids, settings
        self._no_repeat = source.generation["no_repeat"]
        self.text, self.tokens, self.seconds, self.first, self.cache_bytes = "", 0, 0.0, 0.0, 0
        self.stop, self.done = threading.Event(), threading.Event()
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, name="answer", daemon=True)

    def put(self, value: torch.Tensor) -> None:
        """Receive the next token, and let other answers have a turn."""
        self.seconds += time.perf_counter() - self._began
        if not self.next_tokens_are_prompt:
            self.tokens += value.numel()
            self.first = self.first or self.seconds
        super().put(value)
        TURNS.release()
        TURNS.acquire()
        self._began = time.perf_counter()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receive the next words."""
        self.text += text

    def state(self) -> dict[str, Any]:
        """The answer so far, and its figures."""
        decoding = self.seconds - self.first
        return {
            "text": self.text,
            "tokens": self.tokens,
            "tokens_per_second": round((self.tokens - 1) / decoding, 2) if self.tokens > 1 and decoding else None,
            "seconds_to_first_token": round(self.first, 3) if self.tokens else None,
            "weights_bytes": self._side.weights_bytes,
            "shared_bytes": self._side.shared_bytes,
            "cache_bytes": self.cache_bytes,
        }

    def _run(self) -> None:
        model, settings = self._side.model, self._settings
        _here.answer = self
        TURNS.acquire()
        self._began = time.perf_counter()
        try:
            loops = [NoRepeats(self._no_repeat, len(self._ids))] if self._no_repeat else []
            ids = torch.tensor([self._ids], device=model.device)
            media = {
                name: value.to(model.device, model.dtype if value.is_floating_point() else None)
                for name, value in getattr(self._ids, "media", {}).items()
            }
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                **media,
                max_new_tokens=settings["max_tokens"],
                do_sample=False,
                logits_processor=LogitsProcessorList([*loops, *_sampling(settings, model.device)]),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                streamer=self,
                tokenizer=self.tokenizer,  # for the stop strings of a generation config
                return_dict_in_generate=True,
            )
            # Before version 5.24, transformers calls it `past_key_values`.
            self.cache_bytes = _cache_bytes(made.cache if hasattr(made, "cache") else made.past_key_values)
        except Stopped:
            pass
        except Exception as error:  # raised by the thread that waits for the answer
            self.error = error
        finally:
            TURNS.release()
            self.done.set()


def _sampling(settings: dict[str, Any], device: torch.device) -> list[LogitsProcessor]:
    if not settings["temperature"]:
        return []
    steps = [TemperatureLogitsWarper(float(settings["temperature"]))]
    if settings["top_p"] < 1:
        steps.append(TopPLogitsWarper(float(settings["top_p"])))
    return [*steps, GumbelSampler(settings["seed"], device)]


def _cache_bytes(cache: Any) -> int:
    tensors = chain.from_iterable(vars(layer).values() for layer in getattr(cache, "layers", []))
    return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))


def stream_answers(
    sides: Sequence[Side], source: Source, ids: list[int], settings: dict[str, Any]
) -> Iterator[list[dict]]:
    """Let one or both models answer, and yield the answers while they grow.

    When the caller stops listening, the models stop within one layer. See `Answer` for the settings, and `Answer.state` for
    what is yielded of each answer.
    """
    answers = [Answer(side, source, ids, settings) for side in sides]
    try:
        for one in answers:
            one.thread.start()
        while not all(one.done.wait(TICK) for one in answers):
            yield [one.state() for one in answers]
        if error := next((one.error for one in answers if one.error), None):
            raise error
        yield [one.state() for one in answers]
    finally:
        for one in answers:
            one.stop.set()
        for one in answers:
            if one.thread.ident:
                one.thread.join()
