"""What several commands have in common: the words that name a model or a set of layers."""

from __future__ import annotations

import argparse

from ..errors import CutError

BASE_HELP = "a Hub id, a model folder, or a .gguf file"
DTYPES = ("auto", "bfloat16", "float16", "float32")


def drop(text: str) -> float | int:
    """A fraction of the layers or a number of them, for argparse."""
    try:
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a fraction such as 0.25 nor a number of layers"
        ) from None


def layers(text: str) -> list[int]:
    """A set of layers such as `20-26,29`, for argparse."""
    from ..select.spec import parse_layers

    try:
        return parse_layers(text)
    except CutError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tune_layers(text: str) -> int | str | list[int]:
    """A number of last layers, `cut`, or a set of layers, for argparse."""
    return text if text == "cut" else int(text) if text.isdecimal() else layers(text)
