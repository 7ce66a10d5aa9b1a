"""The functions that programs can call, through `gradio_client` or as tools over MCP.

Gradio documents both from the names, signatures and docstrings here. A return type such as `-> str` is the type of each
streamed piece.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import chat as talk

MAX_MESSAGES = 10_000  # of a history: more than tokens in a context

# No `from __future__ import annotations`: Gradio needs the types themselves.


@contextmanager
def checked_types() -> Iterator[None]:
    """Refuse a request that does not have the documented types, which Gradio does not check."""
    try:
        yield
    except talk.Refused:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise talk.Refused(f"This is not a request that the API documents ({error}): see its page.") from error


def refuse_files(*values: Any) -> None:
    """Refuse anything but text: a path would name a file of this machine."""
    if any(talk.paths_of({"content": one}) for one in values):
        raise talk.Refused("The API takes text alone: leave the image out, or use the page.")


def chat(
    message: str,
    history: list[dict[str, str]] = [],  # noqa: B006 (Gradio reads the default, which is never changed)
    system_prompt: str = "",
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_tokens: int = 256,
    seed: int = -1,
) -> str:
    """
    Ask the pruned model. The answer is streamed: each piece is the whole answer so far.

    Args:
        message: The question.
        history: Earlier messages with "role" and "content". The oldest are left out if they don't fit.
        system_prompt: How the model should behave.
        temperature: 0 for the most likely token at each step; up to 2.
        top_p: Sample from the most likely tokens whose probabilities add up to this.
        max_tokens: Maximum number of new tokens.
        seed: The same seed gives the same answer; -1 for a random one.
    """
    with checked_types():
        history = history[-MAX_MESSAGES:]
        refuse_files(message, system_prompt, *(turn["content"] for turn in history))
        settings = talk.settings_of(temperature, top_p, max_tokens, seed)
        turns = talk.to_template_messages([*history, {"role": "user", "content": message}])
    if talk.models.source.chats:
        pieces = talk.stream_reply(turns, str(system_prompt or ""), settings, ["pruned"])
    else:
        pieces = talk.stream_completion("\n".join(turn["content"] for turn in turns), settings, ["pruned"])
    for [state], _ in pieces:
        yield state["text"]


def compare(
    prompt: str,
    system_prompt: str = "",
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_tokens: int = 256,
    seed: int = -1,
) -> dict[str, dict[str, Any]]:
    """
    Ask the pruned and the dense model the same question at once.

    Args:
        prompt: The question.
        system_prompt: How the models should behave.
        temperature: 0 for the most likely token at each step; up to 2.
        top_p: Sample from the most likely tokens whose probabilities add up to this.
        max_tokens: Maximum number of new tokens for each answer.
        seed: The same seed gives the same answers; -1 for a random one.

    Returns:
        For "pruned" and "dense": the text, its figures, and the bytes of weights and cache in memory.
    """
    with checked_types():
        refuse_files(prompt, system_prompt)
        settings = talk.settings_of(temperature, top_p, max_tokens, seed)
        text = talk.text_of({"content": prompt})
    for states, _ in talk.stream_both(text, str(system_prompt or ""), settings):
        yield dict(zip(("pruned", "dense"), states, strict=True))


def about() -> dict[str, Any]:
    """The records of the pruned model: its lineage, its measurements, and the metadata of its card."""
    records = talk.models.source.records
    return {"model": records.model, "lineage": records.lineage, "metrics": records.metrics, "card": records.card}
