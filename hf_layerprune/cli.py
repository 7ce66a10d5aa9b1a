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

from .commands import COMMANDS, Answer
from .errors import explain, one_line, shown, wants_traceback
from .options import AnswerOptions, ScreenOptions, add, gather
from .screen import settle
from .versions import __version__


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, and masks a token that was given in place of something else."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            meant = unknown[0].partition("=")[0].replace("_", "-")
            near = get_close_matches(meant, self._option_string_actions, n=1, cutoff=0.8)
            hint = f"; did you mean {near[0]}?" if near else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return values, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"hf-layerprune: {one_line(shown(message))} (see {self.prog} --help)\n")


def _command(name: str) -> ModuleType:
    return import_module(f".commands.{name}", __package__)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(prog="hf-layerprune", description="Drop whole decoder layers from Hugging Face language models.")
    parser.add_argument("--version", action="version", version=f"hf-layerprune {__version__}")
    add(parser, ScreenOptions)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = _command(name)
        command = commands.add_parser(name, help=module.HELP, description=module.DESCRIPTION)
        add(command, module.Request, exclusive=getattr(module, "EXCLUSIVE", ()))
        add(command, _screen_of(module))
    return parser


def _screen_of(command: ModuleType) -> type[ScreenOptions]:
    return getattr(command, "Screen", AnswerOptions)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv (`Sequence[str]`, *optional*): The arguments; by default `sys.argv[1:]`.

    Returns:
        `int`: 0 for success; 1 for a failure; 2 for wrong usage; 130 for an interrupt. One line on stderr says what
            went wrong and why, after the traceback if `--debug` is given. A command that answers a question with yes or
            no (such as `verify`) returns 1 for no.
    """
    args = build_parser().parse_args(argv)
    command = _command(args.command)
    screen = gather(args, _screen_of(command))
    settle(quiet=screen.quiet)
    try:
        answer = command.run(gather(args, command.Request))
        try:
            return _show(answer, screen)
        except BrokenPipeError:  # the reader, such as `head`, has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return answer.code
    except (Exception, KeyboardInterrupt) as error:
        if screen.debug or wants_traceback():
            print(shown(traceback.format_exc()), file=sys.stderr)
        return _fail(*explain(error, "--debug"))


def _show(answer: Answer, screen: ScreenOptions) -> int:
    """Print the result of a command, with control characters escaped and tokens masked."""
    for line in answer.errors:
        _fail(line, answer.code)
    if isinstance(screen, AnswerOptions) and screen.json:
        print(shown(json.dumps(answer.data)), flush=True)
        return answer.code
    if answer.text:
        print(shown(answer.text))
    following = f"next: {shlex.join(answer.then)}" if answer.then and not screen.quiet else ""
    if line := "; ".join(filter(None, (answer.made, following))):
        print(shown(f"\n{line}" if answer.text else line))
    sys.stdout.flush()
    return answer.code


def _fail(message: str, code: int) -> int:
    print(f"hf-layerprune: {one_line(message)}", file=sys.stderr)
    return code
