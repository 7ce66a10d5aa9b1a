"""Streams answers with their figures, for the page and the API."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from html import escape
from itertools import groupby
from typing import Any

try:  # ZeroGPU assigns a GPU for the duration of a call
    from spaces import GPU
except ImportError:

    def GPU(function: Any) -> Any:
        return function


import answers
from about import format_bytes
from images import Prompt, paths_of
from source import Message, Refused
from weights import Models

MAX_CHARACTERS = 40_000  # of a prompt; later, its tokens are counted
MAX_TOKENS = 1024  # of an answer

models: Models | None = None  # set once at the start; ZeroGPU needs a module variable


@GPU
def run(roles: list[str], ids: list[int], settings: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """The part that needs the GPU."""
    yield from answers.stream_answers([models.sides[role] for role in roles], models.source, ids, settings)


# --- on the page ----------------------------------------------------------------------------------------


def reply(talk: list[dict], system: str, *numbers: float | None) -> Iterator[tuple[list[dict], str]]:
    """Answer the last message; yields the conversation with the answer so far, and its figures."""
    settings = settings_of(*numbers)
    for [state], note in stream_reply(talk, system, settings, ["pruned"]):
        answer = [{"role": "assistant", "content": state["text"]}] if state["text"] else []
        yield [*talk, *answer], small_print(figures(state), f"seed {settings['seed']}", note)
    if not state["text"]:
        raise Refused("The model returned an empty answer. Try another seed.")


def complete(text: str, *numbers: float | None) -> Iterator[tuple[str, str]]:
    """Continue a text; yields the text so far, and its figures."""
    settings = settings_of(*numbers)
    for [state], _ in stream_completion(text, settings, ["pruned"]):
        yield text + state["text"], small_print(figures(state), f"seed {settings['seed']}")


def compare(prompt: str | dict[str, Any], system: str, *numbers: float | None) -> Iterator[tuple]:
    """Let both models answer a prompt; yields the conversation and figures of each, and a line about both."""
    settings = settings_of(*numbers)
    for states, note in stream_both(prompt, system, settings):
        sides: list[Any] = []
        for state in states:
            sides.append([{"role": "assistant", "content": state["text"]}])
            sides.append(small_print(figures(state)) + small_print(memory(state)))
        yield *sides, small_print(memory_of_both(states), f"seed {settings['seed']}", note)


# --- for the page and the API ---------------------------------------------------------------------------


def check(*texts: str | None) -> None:
    """Refuse a prompt while the weights are loading, or one that is far too long.

    Raises:
        Refused: With a message for the user.
    """
    if "pruned" not in models.sides:
        raise Refused(models.error or "The weights are still loading: try again in a moment.")
    if (length := sum(len(text or "") for text in texts)) > MAX_CHARACTERS:
        raise Refused(f"This prompt has {length:,} characters, but the limit is {MAX_CHARACTERS:,}. Shorten it.")


def settings_of(temperature: float, top_p: float, max_tokens: int, seed: float | None) -> dict[str, Any]:
    """The settings of an answer, clamped to their limits; without a seed, with a random one."""
    return {
        "temperature": min(max(float(temperature), 0.0), 2.0),
        "top_p": min(max(float(top_p), 0.01), 1.0),
        "max_tokens": min(max(int(max_tokens), 1), max_answer_tokens()),
        "seed": secrets.randbelow(2**31) if seed is None or seed < 0 else int(seed) % 2**63,
    }


def max_answer_tokens() -> int:
    """The maximum length of an answer in tokens: at most half of the context."""
    return min(MAX_TOKENS, models.source.context // 2)


def text_of(message: dict[str, Any]) -> str:
    """The text of a message. Gradio may split the content into parts; over the API, a message with tool calls may have none."""
    content = message["content"] or ""
    parts = content if isinstance(content, list) else [content]
    return "\n".join(part if isinstance(part, str) else part["text"] for part in parts if is_text(part))


def is_text(part: Any) -> bool:
    """Whether a part of a message is text; the others are files."""
    return isinstance(part, str) or "text" in part


def to_message(asked: str | dict[str, Any]) -> dict[str, Any]:
    """The message from a text box: its text alone, or its images followed by its text."""
    if isinstance(asked, str):
        return {"role": "user", "content": asked}
    words = [asked["text"]] if (asked.get("text") or "").strip() else []
    return {"role": "user", "content": [*({"path": path} for path in asked.get("files") or ()), *words]}


def to_template_messages(talk: list[dict[str, Any]]) -> list[Message]:
    """A conversation in the form that chat templates need: text contents, images apart, and alternating roles.

    Raises:
        Refused: There is an image, and the model reads text alone.
    """
    turns: list[Message] = []
    # Of two in a row, the answer in between was stopped before its first word.
    for role, messages in groupby(talk, key=lambda message: message["role"]):
        said = list(messages)
        images = [path for message in said for path in paths_of(message)]
        if images and models.source.processor is None:
            raise Refused("This model reads only text: leave the image out.")
        turn = {"role": role, "content": "\n\n".join(map(text_of, said))}
        turns.append(turn | ({"images": images} if images else {}))
    return turns


Pieces = Iterator[tuple[list[dict[str, Any]], str]]


def fit_conversation(talk: list[dict[str, Any]], system: str | None, max_tokens: float) -> tuple[Prompt, int]:
    """A conversation as token ids, and the number of messages that had to be left out.

    Raises:
        Refused: The last message alone is too long.
    """
    turns = [{"role": "system", "content": system.strip()}] if system and system.strip() else []
    turns += to_template_messages(talk)
    check(turns[-1]["content"], *(turn["content"] for turn in turns[:-1] if turn["role"] == "system"))
    return models.source.fit(turns, int(max_tokens))


def stream_reply(talk: list[dict[str, Any]], system: str | None, settings: dict[str, Any], roles: list[str]) -> Pieces:
    """Answer the last message; yields the states of the answers, and a note on omitted messages."""
    ids, left_out = fit_conversation(talk, system, settings["max_tokens"])
    note = f"the first {left_out} messages no longer fit and are left out" if left_out else ""
    yield from ((states, note) for states in run(roles, ids, settings))


def stream_completion(text: str, settings: dict[str, Any], roles: list[str]) -> Pieces:
    """Continue a text, for models without a chat template."""
    check(text)
    ids = models.source.fit_text(text, settings["max_tokens"])
    yield from ((states, "") for states in run(roles, ids, settings))


def stream_both(prompt: str | dict[str, Any], system: str | None, settings: dict[str, Any]) -> Pieces:
    """Let both models answer one prompt."""
    asked = to_message(prompt)
    check(text_of(asked), system)
    if "dense" not in models.sides:
        raise Refused(models.no_dense or "The dense model is still loading.")
    if models.source.chats:
        yield from stream_reply([asked], system, settings, ["pruned", "dense"])
    else:
        yield from stream_completion(text_of(asked), settings, ["pruned", "dense"])


def figures(state: dict[str, Any]) -> str:
    """The length and speed of an answer, in one line."""
    if not state["tokens"]:
        return "reading the prompt …"
    words = [f"{state['tokens']} tokens"]
    if state["tokens_per_second"]:
        words.append(f"{state['tokens_per_second']:.1f} tokens/s")
    return " · ".join([*words, f"first token after {state['seconds_to_first_token']:.2f} s"])


def memory(state: dict[str, Any]) -> str:
    """The memory used by a model and its cache, in one line."""
    cache = f" · {format_bytes(state['cache_bytes'])} of cache" if state["cache_bytes"] else ""
    return f"{format_bytes(state['weights_bytes'])} of weights{cache}"


def memory_of_both(states: list[dict[str, Any]]) -> str:
    """The memory used by both models together, which is less than their sum if they share tensors."""
    shared = states[0]["shared_bytes"]
    total = format_bytes(sum(state["weights_bytes"] for state in states) - shared)
    return f"{total} of weights for both" + (f", of which they share {format_bytes(shared)}" if shared else "")


def small_print(*words: str) -> str:
    """A line of small print, as HTML."""
    return f"<p class='small'>{escape(' · '.join(word for word in words if word))}</p>"
