"""Other programs that run models."""

from __future__ import annotations

from collections.abc import Mapping

from .base import Engine, EngineError, Timed, explain

__all__ = ["Engine", "EngineError", "Timed", "engine_named", "explain"]


def engine_named(name: str) -> Engine:
    """Look up an engine.

    Args:
        name (`str`): One of `ENGINES` in `measure/requests.py`, except transformers.

    Returns:
        `Engine`: The engine.
    """
    from .llama_cpp import LlamaCpp
    from .vllm import Vllm

    engines: Mapping[str, type[Engine]] = {"llama.cpp": LlamaCpp, "vllm": Vllm}
    return engines[name]()
