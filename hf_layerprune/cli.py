"""The `hf-layerprune` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType
from typing import Any, NoReturn

from .commands import COMMANDS, Result
from .errors import LayerPruneError, explain, one_line, sanitize, wants_traceback
from .options import DisplayOptions, ResultOptions, add_options, option_flags, options_from_args, spell_options
from .screen import configure_output
from .versions import __version__


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, and masks a token that was given in place of something else."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        values, unknown = super().parse_known_args(args, namespace)
        for action in self._get_positional_actions():
            # Python 3.11 takes an optional argument for missing if an option stands before it.
            is_missing = action.nargs == argparse.OPTIONAL and getattr(values, action.dest) is action.default
            if is_missing and unknown and not unknown[0].startswith("-"):
                setattr(values, action.dest, self._get_values(action, [unknown.pop(0)]))
        if unknown:
            option = unknown[0].partition("=")[0].replace("_", "-")
            similar = get_close_matches(option, self._option_string_actions, n=1, cutoff=0.8)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return values, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hf-layerprune: {one_line(sanitize(message))} (see {self.prog} --help)\n")


def _command(name: str) -> ModuleType:
    return import_module(f".commands.{name}", __package__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog="hf-layerprune", description="Drop whole decoder layers from Hugging Face language models.")
    parser.add_argument("--version", action="version", version=f"hf-layerprune {__version__}")
    add_options(parser, DisplayOptions)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name in COMMANDS:
        module = _command(name)
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        add_options(command, module.Request, exclusive=getattr(module, "EXCLUSIVE", ()))
        add_options(command, _display_options(module))
    return parser


def _display_options(command: ModuleType) -> type[DisplayOptions]:
    return getattr(command, "Display", ResultOptions)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; by default `sys.argv[1:]`.

    Returns:
        `int`: 0 for success; 1 for a failure; 2 for wrong usage; 130 for an interrupt. One line on stderr says what
            went wrong and why, after the traceback if `--debug` is given. A command that answers a question with yes or
            no (such as `verify`) returns 1 for no.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    command = _command(args.command)
    display = options_from_args(args, _display_options(command))
    configure_output(quiet=display.quiet)
    try:
        result = command.run(options_from_args(args, command.Request))
        try:
            return _show(result, display)
        except BrokenPipeError:  # the reader, such as `head`, has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return result.exit_code
        except OSError as error:
            # Where Python would write the rest at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise LayerPruneError(f"the command is done, but its result can't be shown: {error.strerror}") from error
    except (Exception, KeyboardInterrupt) as error:
        if display.debug or wants_traceback():
            print(sanitize(traceback.format_exc()), file=sys.stderr)
        flags = option_flags(command.Request)
        return _fail(*explain(error, "--debug", lambda message: spell_options(message, flags)))


def _show(result: Result, display: DisplayOptions) -> int:
    """Print the result of a command, with control characters escaped and tokens masked."""
    for line in result.errors:
        _fail(line, result.exit_code)
    if isinstance(display, ResultOptions) and display.json:
        print(sanitize(json.dumps(result.data)), flush=True)
        return result.exit_code
    if result.text:
        print(sanitize(result.text))
    following = f"next: {shlex.join(result.follow_up)}" if result.follow_up and not display.quiet else ""
    if line := "; ".join(filter(None, (result.summary, following))):
        print(sanitize(f"\n{line}" if result.text else line))
    sys.stdout.flush()
    return result.exit_code


def _fail(message: str, exit_code: int) -> int:
    print(f"hf-layerprune: {one_line(message)}", file=sys.stderr)
    return exit_code
