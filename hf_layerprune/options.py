"""Options: each is declared once, with its type, default, choices, help and check. Importing this imports no torch.

A dataclass whose fields are options is all that a config, a request and a command line need:

    @dataclass(kw_only=True)
    class PruneRequest(CutOptions):
        dtype: str = option("auto", "Type of the weights", choices=DTYPES)

    add(parser, PruneRequest)             # --drop, --criterion, ..., --dtype
    request = gather(args, PruneRequest)  # checked, as PruneRequest(drop=...) is

`docs/options.md` is made from the same declarations (`make docs`).
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import math
import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from .errors import CutError
from .layer_ranges import parse_layers

T = TypeVar("T")

DTYPES = ("auto", "bfloat16", "float16", "float32")
MODEL_HELP = "A Hub id, a model folder, or a .gguf file"
_MOST_LAYERS = 100_000
_MOST_CHARACTERS = 4096

# Names that an option may have, by what they name: a room's registry enters its own, see `bind`.
_TABLES: dict[str, Collection[str]] = {}


# --- kinds of values --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        parse (`Callable[[str], Any]`): The value of a word on a command line; raises `ValueError`.
        check (`Callable[[Any], Any]`): The value as it is kept; raises `ValueError` with what it must be.
        metavar (`str`, *optional*): What stands for it in `--help`.
        repeated (`bool`): Whether its option may be given several times, for a value each.
    """

    parse: Callable[[str], Any]
    check: Callable[[Any], Any]
    metavar: str | None = None
    repeated: bool = False


def whole(least: int = 1, most: int = 1_000_000, metavar: str = "N") -> Kind:
    """A whole number from `least` to `most`."""

    def check(value: Any) -> int:
        number = _index(value)
        if number is None or not least <= number <= most:
            raise ValueError(f"must be a whole number from {least} to {most}")
        return number

    def parse(text: str) -> int:
        digits = text.strip().removeprefix("-")
        if not (digits.isascii() and digits.isdecimal() and len(digits) <= 20):
            raise ValueError(f"must be a whole number from {least} to {most}")
        return int(text)

    return Kind(parse, check, metavar)


def many(kind: Kind, check: Callable[[Any], Any] | None = None, separator: str | None = None) -> Kind:
    """Several values of a kind, as a tuple: an option for each, or with a `separator` all in one word."""

    def check_each(values: Any) -> tuple[Any, ...]:
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError("must be a list")
        return tuple(kind.check(value) for value in values)

    def parse(text: str) -> Any:
        return tuple(kind.parse(part) for part in text.split(separator)) if separator else kind.parse(text)

    metavar = f"{kind.metavar},{kind.metavar}" if separator else kind.metavar
    return Kind(parse, check or check_each, metavar, repeated=separator is None)


def _check_text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value or len(value) > _MOST_CHARACTERS:
        raise ValueError(f"must be a text of 1 to {_MOST_CHARACTERS} characters")
    return value


def _check_path(value: Any) -> Path:
    if not isinstance(value, str | os.PathLike):
        raise ValueError("must be a path")
    return Path(_check_text(os.fspath(value)))


def _check_flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("must be True or False")
    return value


def _check_drop(value: Any) -> float | int:
    number = _index(value)
    if number is not None and 0 < number <= _MOST_LAYERS:
        return number
    if number is not None or not isinstance(value, float) or not math.isfinite(value) or value <= 0:
        raise ValueError("must be a fraction between 0 and 1, or a number of layers")
    if value >= 1:
        way_out = f" such as drop={int(value)}" if value < _MOST_LAYERS else ""
        raise ValueError(f"must be a fraction below 1, or a whole number of layers{way_out}")
    return value


def _parse_drop(text: str) -> float | int:
    try:
        return int(text) if len(text) < 20 and text.strip().isdecimal() else float(text)
    except ValueError:
        raise ValueError("is neither a fraction such as 0.25 nor a number of layers") from None


def _check_layers(value: Any) -> list[int]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise ValueError("must be a list of layer indices such as [6, 7]")
    numbers = [_index(i) for i in value]
    if any(i is None or not 0 <= i < _MOST_LAYERS for i in numbers):
        raise ValueError(f"must be a list of layer indices, whole numbers from 0 to {_MOST_LAYERS - 1}")
    return sorted(i for i in numbers if i is not None)


def _check_tune_layers(value: Any) -> int | str | list[int]:
    try:
        if value == "cut":
            return "cut"
        number = _index(value)
        if number is None and isinstance(value, str):
            return _parse_tune_layers(value)
        return _check_layers(value) if number is None else whole(0, _MOST_LAYERS).check(number)
    except ValueError:
        raise ValueError("must be a number of last layers, 'cut', or a list of base indices") from None


def _parse_tune_layers(text: str) -> int | str | list[int]:
    return text if text == "cut" else int(text) if text.isdecimal() and len(text) < 7 else parse_layers(text)


def _index(value: Any) -> int | None:
    """A whole number of any type, such as numpy's; `None` for anything else, `True` and `3.0` included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


TEXT = Kind(str, _check_text)
MODEL = Kind(str, lambda value: _check_text(os.fspath(value) if isinstance(value, os.PathLike) else value))
PATH = Kind(Path, _check_path, "PATH")
FLAG = Kind(bool, _check_flag)
DROP = Kind(_parse_drop, _check_drop, "D")
LAYERS = Kind(parse_layers, _check_layers, "L")
TUNE_LAYERS = Kind(_parse_tune_layers, _check_tune_layers, "T")


# --- declaring --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """What is known of an option besides its name and its type, which are the field's.

    Args:
        default (`Any`): `dataclasses.MISSING` for what has to be given.
        help (`str`): One sentence without a full stop, and without its choices.
        kind (`Kind`): What values are accepted.
        choices (`Collection[str]` or `str`): The names it may have; or the name of the table that a room has bound.
        flag (`str`, *optional*): The name on the command line, where it is not the field's. Of an option that is on by
            default, the name that turns it off.
        positional (`bool`): Whether it stands on the command line without a name.
    """

    default: Any
    help: str
    kind: Kind
    choices: Collection[str] | str = ()
    flag: str | None = None
    positional: bool = False

    @property
    def names(self) -> Collection[str]:
        """The names it may have; none where any value of its kind will do, or no room has entered any."""
        return _TABLES.get(self.choices, ()) if isinstance(self.choices, str) else self.choices

    @property
    def text(self) -> str:
        """The help with its choices."""
        return f"{self.help}: {', '.join(self.names)}" if self.names else self.help

    def check(self, name: str, value: Any) -> Any:
        """The value as it is kept.

        Raises:
            CutError: It is not accepted.
        """
        if value is None and self.default is None:
            return None
        if self.names and self.kind is TEXT:
            return find(name, value, self.names)
        return checked(name, value, self.kind)


def option(
    default: Any,
    help: str,
    kind: Kind | None = None,
    *,
    choices: Collection[str] | str = (),
    flag: str | None = None,
    positional: bool = False,
) -> Any:
    """Declare a field of a dataclass as an option; see [`Option`]. PEFT and transformers read its `help`."""
    kind = kind or (FLAG if isinstance(default, bool) else TEXT)
    declared = Option(default, help, kind, choices, flag, positional)
    metadata = {"help": f"{help}.", "option": declared}
    return dataclasses.field(default=default, metadata=metadata)


def bind(table: str, names: Collection[str]) -> None:
    """Say which names the options of a table may have. A registry is bound itself, so later entries count as well."""
    _TABLES[table] = names


def find(what: str, name: Any, names: Collection[str]) -> str:
    """Look a name up.

    Raises:
        CutError: There is none of that name; the message lists what there is.
    """
    if isinstance(name, str) and name in names:
        return name
    near = get_close_matches(str(name)[:100], names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}? There are" if near else "; there are"
    raise CutError(f"{what} {quoted(name)} is unknown{hint} {', '.join(names)}")


def checked(name: str, value: Any, kind: Kind) -> Any:
    """A value as it is kept.

    Raises:
        CutError: It is not of that kind.
    """
    try:
        return kind.check(value)
    except CutError:  # says what it is about itself
        raise
    except ValueError as error:
        raise CutError(f"{name}={quoted(value)} {error}") from None


def quoted(value: Any) -> str:
    """A value as an error quotes it: short, whatever somebody passed."""
    try:
        text = repr(value[:50] if isinstance(value, str | list | tuple) else value)
    except ValueError:  # an integer of thousands of digits
        return f"{type(value).__name__} of enormous size"
    return text if len(text) <= 80 else f"{text[:80]}..."


def declared(cls: Any) -> dict[str, Option]:
    """The options among the fields of a dataclass, by name."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(cls) if "option" in f.metadata}


def check(values: Any) -> None:
    """Check all options of a dataclass, and bring them to the form in which they are kept.

    Raises:
        CutError: One of them is not accepted.
    """
    for name, known in declared(values).items():
        setattr(values, name, known.check(name, getattr(values, name)))


def take(cls: type[T], values: Any, **changes: Any) -> T:
    """Make a dataclass of those fields that another one has by the same name.

    Args:
        cls (`type`): What to make.
        values (`Any`): The other dataclass.
        changes: Fields that are set to something else.
    """
    names = {f.name for f in dataclasses.fields(values)} & {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    return cls(**{name: getattr(values, name) for name in names} | changes)


def documented(cls: type[T]) -> type[T]:
    """Write the options of a dataclass into its docstring, as its `Args`."""
    lines = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        if "option" in field.metadata:
            default = "" if field.default is dataclasses.MISSING else f", defaults to `{field.default!r}`"
            lines.append(f"    {field.name} (`{field.type}`{default}): {field.metadata['option'].text}.")
    own, colon, rest = (cls.__doc__ or "").rstrip().partition("\n\nArgs:\n")
    cls.__doc__ = "\n".join([f"{inspect.cleandoc(own)}\n\nArgs:", *lines, rest if colon else ""])
    return cls


# --- the command line -------------------------------------------------------------------------------------


def add(parser: Any, cls: type, *names: str, skip: Collection[str] = ()) -> None:
    """Add the options of a dataclass to a parser.

    Args:
        parser (`argparse.ArgumentParser`): Or a group of one.
        cls (`type`): The dataclass.
        names (`str`): Only these; all by default.
        skip (`Collection[str]`): All but these.
    """
    options = declared(cls)
    for name in names or options:
        if name not in skip:
            _add(parser, name, options[name])


def _add(parser: Any, name: str, known: Option) -> None:
    listed = not isinstance(known.choices, str) and bool(known.choices)  # by argparse itself
    text = (known.help if listed else known.text).replace("%", "%%")
    text = text if text[1:2].isupper() else text[0].lower() + text[1:]
    words: dict[str, Any] = {"help": text}
    flag = known.flag or name.replace("_", "-")
    if known.kind is FLAG:
        off = "store_false" if known.flag else argparse.BooleanOptionalAction
        action = off if known.default else "store_true"
        parser.add_argument(f"--{flag}", action=action, dest=name, default=known.default, **words)
        return
    if known.kind.repeated:
        words["action"] = "append"
    elif known.default not in (None, dataclasses.MISSING):
        several = isinstance(known.default, list | tuple)
        default = ",".join(map(str, known.default)) if several else known.default
        words |= {"default": known.default, "help": f"{text} ({default})"}
    if listed:
        words["choices"] = known.choices
    elif known.kind is not TEXT:
        words["type"] = word_of(known)
    if known.positional or known.default is dataclasses.MISSING:
        if known.default is None:
            words |= {"nargs": "?", "default": None}
        parser.add_argument(name, metavar=name.upper(), **words)
        return
    if "choices" not in words:
        words["metavar"] = known.kind.metavar or name.rpartition("_")[2].upper()
    parser.add_argument(f"--{flag}", dest=name, **words)


def word_of(known: Option) -> Callable[[str], Any]:
    """How argparse reads an option's word."""

    def parse(text: str) -> Any:
        try:
            return known.kind.parse(text)
        except CutError as error:  # says what it is about itself
            raise argparse.ArgumentTypeError(str(error)) from None
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{quoted(text)} {error}") from None

    return parse


def gather(args: argparse.Namespace, cls: type[T], **others: Any) -> T:
    """Make a dataclass of a command line's words, and of others that it doesn't have."""
    said = {name: getattr(args, name) for name in declared(cls) if hasattr(args, name)}
    said = {name: value for name, value in said.items() if value is not None}
    return cls(**said | others)


def arguments(name: str, cls: type[T], skip: Collection[str] = ()) -> type[T]:
    """A subclass of a dataclass of options that transformers' `HfArgumentParser` (and TRL's) can read.

    Args:
        name (`str`): The name of the subclass.
        cls (`type`): A dataclass, all of whose fields are options with defaults.
        skip (`Collection[str]`): Options that are not read; they keep their defaults.
    """
    fields = []
    for option_name, known in declared(cls).items():
        skipped = option_name in skip
        field = dataclasses.field(default=known.default, init=not skipped, metadata={"help": f"{known.text}."})
        kind = bool if known.kind is FLAG else str if known.kind is TEXT else word_of(known)
        fields.append((option_name, kind, field))
    return dataclasses.make_dataclass(name, fields, bases=(cls,), kw_only=True)


# --- what several commands, configs and recipes share ------------------------------------------------------


@dataclass(kw_only=True)
class Options:
    """Options that are checked when they are made."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(kw_only=True)
class CalibrationOptions(Options):
    """The text that criteria and repairs look at."""

    calibration: str = option(
        "self",
        "Text that criteria and repairs look at: self (the dense model writes it), a .txt or .jsonl file "
        "(rows.jsonl:column), or a data set on the Hub (id:split:column)",
    )
    calibration_samples: int = option(128, "Number of rows in the calibration set", whole(1))
    calibration_length: int = option(512, "Number of tokens in each calibration row", whole(1))
    seed: int = option(42, "Seed for everything random: layers, rows, text", whole(0, 2**63 - 1, "SEED"))


@dataclass(kw_only=True)
class ChoiceOptions(Options):
    """How many layers are dropped, and which may be."""

    drop: float | int = option(
        0.25, "Fraction of the layers to drop, rounded down to whole layers, or the number of layers", DROP
    )
    variant: str = option(
        "original",
        "Definition of the criterion: as its own source has it, or as the code of the paper (arXiv:2411.15558) does",
        choices="variant",
    )
    protect_first: int | None = option(
        None, "Number of layers at the start that are never dropped; by default the criterion's own",
        whole(0, _MOST_LAYERS),
    )  # fmt: skip
    protect_last: int | None = option(
        None, "Number of layers at the end that are never dropped; by default the criterion's own",
        whole(0, _MOST_LAYERS),
    )  # fmt: skip
    contiguous: bool = option(False, "Drop one block of adjacent layers")
    repair: str | None = option(
        None, "Closed-form compensation for the dropped layers, before any training", choices="repair"
    )


@dataclass(kw_only=True)
class CutOptions(CalibrationOptions, ChoiceOptions):
    """Which layers are dropped, and what makes up for them before training."""

    drop_layers: list[int] | None = option(
        None, "Base indices of the layers to drop, such as 20-26,29; overrides drop and criterion", LAYERS
    )
    criterion: str = option("reverse_order", "How the layers are chosen", choices="criterion")
    steps: int = option(
        1,
        "Number of rounds in which the layers are chosen; each round scores what the one before left",
        whole(1, 10_000),
    )


@dataclass(kw_only=True)
class TuningOptions(Options):
    """What an adapter tunes."""

    tune_layers: int | str | list[int] = option(
        3,
        "Layers to tune: a number of last layers, cut (the layers next to each cut), or base indices such as 20-22",
        TUNE_LAYERS,
    )
    tune_lm_head: bool = option(
        True, "Tune lm_head; where it is tied to the embeddings, this unties it, which adds a matrix"
    )
