"""Options on the command line: for argparse, and for transformers' `HfArgumentParser`."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Callable, Collection
from typing import Any, TypeVar

from ..errors import CutError
from ..layer_ranges import format_layers
from .declare import Option, help_of, option_fields
from .kinds import FLAG, LAYERS, TEXT, TUNE_LAYERS, quoted
from .spelling import spell_options

T = TypeVar("T")


def add_options(parser: argparse.ArgumentParser, cls: type, exclusive: Collection[str] = ()) -> None:
    """Add the options of a dataclass to a parser, in the groups that its classes name (`help_group`).

    Of those that are `exclusive`, all of one group, only one may be given. Help names other options as Python does
    (`from_curve`), and becomes `--from-curve` here.
    """
    options, flags = option_fields(cls), option_flags(cls)
    groups: dict[str | None, Any] = {None: parser}
    one_of: Any = None
    for name, option in options.items():
        declared_in = next(c for c in reversed(cls.__mro__) if name in inspect.get_annotations(c))
        title = vars(declared_in).get("help_group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        if name in exclusive:
            one_of = one_of or groups[title].add_mutually_exclusive_group()
        _add(one_of if name in exclusive else groups[title], name, option, flags)


def _add(parser: Any, name: str, option: Option, flags: dict[str, str]) -> None:
    listed = not isinstance(option.choices, str) and bool(option.choices)  # then argparse lists them
    text = (option.help if listed else option.text).replace("%", "%%")
    text = spell_options(text, flags)
    text = text if text[1:2].isupper() else text[0].lower() + text[1:]
    kwargs: dict[str, Any] = {"help": text}
    flag = _flag(name, option)
    if option.kind is FLAG:
        action = "store_true" if option.default is False else argparse.BooleanOptionalAction
        # No default, which would overwrite the value of the same option before the command.
        default = option.default or argparse.SUPPRESS
        parser.add_argument(flag, action=action, dest=name, default=default, **kwargs)
        return
    if option.kind.repeated:
        kwargs["action"] = "append"
    elif option.default not in (None, dataclasses.MISSING):
        default = option.default
        default = ",".join(map(str, default)) if isinstance(default, list | tuple) else default
        kwargs |= {"default": option.default, "help": f"{text} (default: {default})"}
    if listed:
        kwargs["choices"] = option.choices
    elif option.kind is not TEXT:
        kwargs["type"] = value_parser(option)
    if _is_positional(option):
        if option.default is not dataclasses.MISSING:
            kwargs |= {"nargs": "?", "default": option.default}
        parser.add_argument(name, metavar=name.upper(), **kwargs)
        return
    if "choices" not in kwargs:
        kwargs["metavar"] = option.kind.metavar or name.rpartition("_")[2].upper()
    parser.add_argument(flag, dest=name, **kwargs)


def _flag(name: str, option: Option) -> str:
    return f"--{option.flag or name.replace('_', '-')}"


def _is_positional(option: Option) -> bool:
    return option.positional or option.default is dataclasses.MISSING


def option_flags(cls: type) -> dict[str, str]:
    """How the options of a dataclass are written on the command line, for [`spell_options`]."""
    flags = {}
    for name, option in option_fields(cls).items():
        flags[name] = flag = name.upper() if _is_positional(option) else _flag(name, option)
        if option.kind is FLAG:
            flags[f"{name}=True"] = flag
            if option.default is not False:
                flags[f"{name}=False"] = flag.replace("--", "--no-", 1)
    return flags


def value_parser(option: Option) -> Callable[[str], Any]:
    """The function that argparse calls to parse an option's value."""

    def parse(text: str) -> Any:
        try:
            return option.kind.read(text)
        except ValueError as error:
            message = str(error) if isinstance(error, CutError) else f"{quoted(text)} {error}"
            raise argparse.ArgumentTypeError(message) from None

    return parse


def options_from_args(args: argparse.Namespace, cls: type[T]) -> T:
    """Make a dataclass from parsed arguments."""
    given = {name: getattr(args, name, None) for name in option_fields(cls)}
    return cls(**{name: value for name, value in given.items() if value is not None})


def to_arguments(values: Any, *without: str) -> list[str]:
    """The command-line arguments for the options of a dataclass that differ from their defaults.

    `options_from_args` makes an equal one from these arguments and the positional ones.
    """
    arguments: list[str] = []
    for name, option in option_fields(values).items():
        value, flag = getattr(values, name), _flag(name, option)
        if name in without or _is_positional(option) or value == option.default:
            continue
        if option.kind is FLAG:
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif option.kind.repeated:
            arguments += [word for one in value for word in (flag, _format_value(one))]
        elif option.kind in (LAYERS, TUNE_LAYERS) and isinstance(value, list):
            layers = format_layers(value)
            # Of the layers to tune, a number alone would be how many.
            single = option.kind is TUNE_LAYERS and layers.isdecimal()
            arguments += [flag, f"{layers}-{layers}" if single else layers]
        else:
            several = isinstance(value, list | tuple)
            arguments += [flag, ",".join(map(_format_value, value)) if several else _format_value(value)]
    return arguments


def _format_value(value: Any) -> str:
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def argument_dataclass(name: str, cls: type[T], skip: Collection[str] = ()) -> type[T]:
    """A subclass of a dataclass of options that transformers' `HfArgumentParser` (and TRL's) can read.

    All options must have defaults; those that are skipped keep theirs.
    """
    fields = []
    for option_name, option in option_fields(cls).items():
        skipped = option_name in skip
        field = dataclasses.field(default=option.default, init=not skipped, metadata={"help": help_of(option)})
        kind = bool if option.kind is FLAG else str if option.kind is TEXT else value_parser(option)
        fields.append((option_name, kind, field))
    return dataclasses.make_dataclass(name, fields, bases=(cls,), kw_only=True)
