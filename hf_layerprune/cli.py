"""The `hf-layerprune` command: words to calls. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from . import __version__
from .commands import COMMANDS
from .errors import CutError, LayerPruneError


def _command(name: str) -> ModuleType:
    return import_module(f".commands.{name}", __package__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="hf-layerprune", description="Drop whole decoder layers from Hugging Face language models."
    )
    parser.add_argument("--version", action="version", version=f"hf-layerprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = _command(name)
        module.add_arguments(commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The words after the program's name; those of the process by default.

    Returns:
        `int`: 0, 1 for a failure, 2 for words that make no sense. One line on stderr says which and why. A command
            that answers a question with yes or no (`verify`) returns 1 for no.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_layerprune").setLevel(logging.INFO)
    try:
        return _command(args.command).run(args) or 0
    except LayerPruneError as error:
        return _fail(error, 2 if isinstance(error, CutError) else 1)
    except OSError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", 130)


def _fail(error: object, code: int) -> int:
    print(f"hf-layerprune: {' '.join(str(error).split())}", file=sys.stderr)
    return code
