"""The `hf-layerprune` command: words to calls. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from . import __version__
from .errors import CutError, LayerPruneError

_BASE_HELP = "a Hub id, a model folder, or a .gguf file"
_DTYPES = ("auto", "bfloat16", "float16", "float32")


def _drop(text: str) -> float | int:
    try:
        return int(text) if text.strip().isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a fraction such as 0.25 nor a number of layers"
        ) from None


def _layers(text: str) -> list[int]:
    from .select.spec import parse_layers

    try:
        return parse_layers(text)
    except CutError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _tune_layers(text: str) -> int | str | list[int]:
    return text if text == "cut" else int(text) if text.isdecimal() else _layers(text)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hf-layerprune", description="Drop whole decoder layers from Hugging Face language models."
    )
    parser.add_argument("--version", action="version", version=f"hf-layerprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prune = commands.add_parser(
        "prune",
        help="drop layers and write what is left",
        description="Drop decoder layers of BASE and write the model that is left to OUTPUT.",
    )
    prune.add_argument("base", metavar="BASE", help=_BASE_HELP)
    prune.add_argument("output", metavar="OUTPUT", help="folder to write; a .gguf file for a cut GGUF file")
    which = prune.add_mutually_exclusive_group()
    which.add_argument(
        "--drop", type=_drop, default=0.25, metavar="D", help="fraction of the layers, or a number of them (0.25)"
    )
    which.add_argument("--drop-layers", type=_layers, metavar="L", help="these layers, such as 20-26,29")
    prune.add_argument(
        "--criterion", default="reverse_order", metavar="C", help="reverse_order or random (reverse_order)"
    )
    prune.add_argument("--protect-first", type=int, default=0, metavar="N", help="never choose the first N layers")
    prune.add_argument("--protect-last", type=int, default=0, metavar="N", help="never choose the last N layers")
    prune.add_argument("--contiguous", action="store_true", help="choose layers that lie side by side")
    prune.add_argument("--seed", type=int, default=42, help="for --criterion random (42)")
    prune.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the weights; auto keeps the base's")
    prune.add_argument("--adapter", action="store_true", help="write a PEFT adapter: the plan and the tuned tail")
    prune.add_argument(
        "--tune-layers",
        type=_tune_layers,
        default=3,
        metavar="T",
        help="with --adapter: last T layers, cut, or 20-22 (3)",
    )
    prune.add_argument("--no-tune-lm-head", action="store_true", help="with --adapter: leave the head alone, and tied")
    prune.add_argument("--revision", help="branch, tag or commit of BASE on the Hub")
    prune.add_argument("--link", action="store_true", help="hard-link weight files of a folder that stay as they are")
    prune.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")

    inspect = commands.add_parser(
        "inspect",
        help="show what a model is made of",
        description="Show layers, parameters by part, and what a cut would leave. No weight is loaded.",
    )
    inspect.add_argument("model", metavar="MODEL", help=_BASE_HELP)
    inspect.add_argument("--drop", type=_drop, default=0.25, metavar="D", help="the cut to try out (0.25)")
    inspect.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    return parser


def _prune(args: argparse.Namespace) -> None:
    from .prune import PruneRequest, prune_to

    result = prune_to(
        PruneRequest(
            base=args.base,
            output=args.output,
            drop=args.drop,
            drop_layers=args.drop_layers,
            criterion=args.criterion,
            protect_first=args.protect_first,
            protect_last=args.protect_last,
            contiguous=args.contiguous,
            seed=args.seed,
            dtype=args.dtype,
            adapter=args.adapter,
            tune_layers=args.tune_layers,
            tune_lm_head=not args.no_tune_lm_head,
            revision=args.revision,
            link=args.link,
            force=args.force,
        )
    )
    print(result)


def _inspect(args: argparse.Namespace) -> None:
    from .anatomy import inspect_config, report
    from .loading import load_config

    config = load_config(args.model, revision=args.revision)
    print(report(args.model, inspect_config(config), args.drop))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The words after the program's name; those of the process by default.

    Returns:
        `int`: 0, 1 for a failure, 2 for words that make no sense. One line on stderr says which and why.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_layerprune").setLevel(logging.INFO)
    try:
        {"prune": _prune, "inspect": _inspect}[args.command](args)
    except LayerPruneError as error:
        return _fail(error, 2 if isinstance(error, CutError) else 1)
    except OSError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", 130)
    return 0


def _fail(error: object, code: int) -> int:
    print(f"hf-layerprune: {' '.join(str(error).split())}", file=sys.stderr)
    return code
