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
    from ..layer_ranges import parse_layers

    try:
        return parse_layers(text)
    except CutError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def tune_layers(text: str) -> int | str | list[int]:
    """A number of last layers, `cut`, or a set of layers, for argparse."""
    return text if text == "cut" else int(text) if text.isdecimal() else layers(text)


def add_criterion(parser: argparse.ArgumentParser, default: str = "reverse_order", extra: str = "") -> None:
    """The words that say how layers are chosen."""
    from ..select.registry import CRITERIA, VARIANTS

    parser.add_argument("--criterion", default=default, metavar="C", help=f"{', '.join(CRITERIA)}{extra} ({default})")
    parser.add_argument(
        "--variant",
        choices=VARIANTS,
        default="published",
        help="as its source defines a criterion, or as the code of arXiv:2411.15558 computed it (published)",
    )
    own = "by default as its source has it: 4 and 2 for taylor and the magnitudes, 0 for the rest"
    parser.add_argument("--protect-first", type=int, metavar="N", help=f"never choose the first N layers; {own}")
    parser.add_argument("--protect-last", type=int, metavar="N", help="never choose the last N layers")


def add_calibration(parser: argparse.ArgumentParser) -> None:
    """The words that name a calibration set."""
    parser.add_argument(
        "--calibration",
        default="self",
        metavar="TEXT",
        help="what criteria and repair look at: self, a .txt or .jsonl file, or id:split:column on the Hub (self)",
    )
    parser.add_argument("--calibration-samples", type=int, default=128, metavar="N", help="rows of it (128)")
    parser.add_argument("--calibration-length", type=int, default=512, metavar="N", help="tokens a row (512)")
