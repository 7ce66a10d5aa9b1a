"""Options on the command line: for argparse, and for transformers' `HfArgumentParser`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from ..errors import CutError
from ..layer_ranges import format_layers
from .declare import Option, declared
from .kinds import FLAG, LAYERS, TEXT, quoted

T = TypeVar("T")


def add(parser: argparse.ArgumentParser, cls: type, exclusive: Collection[str] = ()) -> None:
    """Add the options of a dataclass to a parser; of those that are `exclusive`, only one may be given."""
    group = parser.add_mutually_exclusive_group() if exclusive else parser
    for name, known in declared(cls).items():
        _add(group if name in exclusive else parser, name, known)


def _add(parser: Any, name: str, known: Option) -> None:
    listed = not isinstance(known.choices, str) and bool(known.choices)  # then argparse lists them
    text = (known.help if listed else known.text).replace("%", "%%")
    text = text if text[1:2].isupper() else text[0].lower() + text[1:]
    words: dict[str, Any] = {"help": text}
    flag = _flag(name, known)
    if known.kind is FLAG:
        action = "store_true" if known.default is False else argparse.BooleanOptionalAction
        # No default, which would overwrite the value of the same option before the command.
        default = known.default or argparse.SUPPRESS
        parser.add_argument(flag, action=action, dest=name, default=default, **words)
        return
    if known.kind.repeated:
        words["action"] = "append"
    elif known.default not in (None, dataclasses.MISSING):
        several = isinstance(known.default, list | tuple)
        default = ",".join(map(str, known.default)) if several else known.default
        words |= {"default": known.default, "help": f"{text} (default: {default})"}
    if listed:
        words["choices"] = known.choices
    elif known.kind is not TEXT:
        words["type"] = word_of(known)
    if known.positional or known.default is dataclasses.MISSING:
        if known.default is not dataclasses.MISSING:
            words |= {"nargs": "?", "default": known.default}
        parser.add_argument(name, metavar=name.upper(), **words)
        return
    if "choices" not in words:
        words["metavar"] = known.kind.metavar or name.rpartition("_")[2].upper()
    parser.add_argument(flag, dest=name, **words)


def _flag(name: str, known: Option) -> str:
    return f"--{known.flag or name.replace('_', '-')}"


def word_of(known: Option) -> Callable[[str], Any]:
    """The function that argparse calls to parse an option's value."""

    def parse(text: str) -> Any:
        try:
            return known.kind.read(text)
        except ValueError as error:
            said = str(error) if isinstance(error, CutError) else f"{quoted(text)} {error}"
            raise argparse.ArgumentTypeError(said) from None

    return parse


def gather(args: argparse.Namespace, cls: type[T]) -> T:
    """Make a dataclass from parsed arguments."""
    said = {name: getattr(args, name, None) for name in declared(cls)}
    return cls(**{name: value for name, value in said.items() if value is not None})


def words_of(values: Any, *without: str) -> list[str]:
    """The command-line arguments for the options of a dataclass that differ from their defaults.

    `gather` makes an equal one from these arguments and the positional ones.
    """
    words: list[str] = []
    for name, known in declared(values).items():
        value, flag = getattr(values, name), _flag(name, known)
        if name in without or known.positional or known.default is dataclasses.MISSING or value == known.default:
            continue
        if known.kind is FLAG:
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif known.kind.repeated:
            words += [word for one in value for word in (flag, _spelled(one))]
        elif known.kind is LAYERS:
            words += [flag, format_layers(value)]
        else:
            words += [flag, ",".join(map(_spelled, value)) if isinstance(value, list | tuple) else _spelled(value)]
    return words


def _spelled(value: Any) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def arguments(name: str, cls: type[T], skip: Collection[str] = ()) -> type[T]:
    """A subclass of a dataclass of options that transformers' `HfArgumentParser` (and TRL's) can read.

    All options must have defaults; those that are skipped keep theirs.
    """
    fields = []
    for option_name, known in declared(cls).items():
        skipped = option_name in skip
        field = dataclasses.field(default=known.default, init=not skipped, metadata={"help": f"{known.text}."})
        kind = bool if known.kind is FLAG else str if known.kind is TEXT else word_of(known)
        fields.append((option_name, kind, field))
    return dataclasses.make_dataclass(name, fields, bases=(cls,), kw_only=True)
