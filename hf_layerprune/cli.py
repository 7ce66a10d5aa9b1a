"""The `hf-layerprune` command: words to calls. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import NoReturn

from .commands import COMMANDS
from .errors import CutError, LayerPruneError, cause_of, one_line, shown
from .options import add, gather
from .versions import __version__

_DEBUG = "HF_LAYERPRUNE_DEBUG"


class _Parser(argparse.ArgumentParser):
    """Repeats no token that was given where something else belongs."""

    def error(self, message: str) -> NoReturn:
        super().error(shown(message))


def _command(name: str) -> ModuleType:
    return import_module(f".commands.{name}", __package__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog="hf-layerprune", description="Drop whole decoder layers from Hugging Face language models.")
    parser.add_argument("--version", action="version", version=f"hf-layerprune {__version__}")
    _add_debug(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = _command(name)
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        add(command, module.Request, exclusive=getattr(module, "EXCLUSIVE", ()))
        _add_debug(command)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,
        help=f"show where an error came from (also {_DEBUG}=1)",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The words after the program's name; those of the process by default.

    Returns:
        `int`: 0; 1 for a failure; 2 for wrong usage. One line on stderr says what went wrong and why, after the
            traceback where `--debug` asks for it. A command that answers a question with yes or no (`verify`)
            returns 1 for no.
    """
    args = build_parser().parse_args(argv)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Shown("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("hf_layerprune").setLevel(logging.INFO)
    try:
        command = _command(args.command)
        return command.run(gather(args, command.Request)) or 0
    except KeyboardInterrupt:
        return _fail("interrupted; nothing was left half-written", 130)
    except Exception as error:
        if getattr(args, "debug", False) or os.environ.get(_DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        return _fail(*_explain(error))


class _Shown(logging.Formatter):
    """Escapes what a terminal would act on: a message may repeat what a file says."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def _explain(error: Exception) -> tuple[str, int]:
    """One line for an error, and the exit code."""
    if isinstance(error, LayerPruneError | OSError):
        return str(error), 2 if isinstance(error, CutError) else 1
    if isinstance(error, MemoryError):
        return "out of memory; use a machine with more of it, or a smaller setting", 1
    return f"internal error: {cause_of(error)}; --debug shows where it came from", 1


def _fail(message: str, code: int) -> int:
    print(f"hf-layerprune: {one_line(message)}", file=sys.stderr)
    return code
