"""The functions that programs can call, through `gradio_client` or as tools over MCP.

Gradio documents both from the names, signatures and docstrings here. A return type such as `-> str` is the type of each
streamed piece.
"""

from typing import Any

import chat as talk

# No `from __future__ import annotations`: Gradio needs the types themselves.


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
    talk.check(message, system_prompt)
    if any(talk.paths_of(turn) for turn in history):  # a path would name a file of this machine
        raise talk.Refused("The API takes text alone: leave the image out, or use the page.")
    settings = talk.settings_of(temperature, top_p, max_tokens, seed)
    turns = [*history, {"role": "user", "content": message}]
    if talk.models.source.chats:
        pieces = talk.converse(turns, system_prompt, settings, ["pruned"])
    else:
        pieces = talk.go_on("\n".join(turn["content"] for turn in talk.plain(turns)), settings, ["pruned"])
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
    for states, _ in talk.both(prompt, system_prompt, talk.settings_of(temperature, top_p, max_tokens, seed)):
        yield dict(zip(("pruned", "dense"), states, strict=True))


def about() -> dict[str, Any]:
    """The records of the pruned model: its lineage, its measurements, and the metadata of its card."""
    records = talk.models.source.records
    return {"model": records.model, "lineage": records.lineage, "metrics": records.metrics, "card": records.card}
