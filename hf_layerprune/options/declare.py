"""Declare a field of a dataclass as an option, and check what it is set to."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from ..errors import CutError
from .kinds import FLAG, TEXT, Kind, check_value, quoted
from .quantities import join_words

T = TypeVar("T")

# The allowed names, by table; registries set theirs with `set_choices`.
_TABLES: dict[str, Collection[str]] = {}


@dataclass(frozen=True)
class Option:
    """The declaration of an option; its name and its type are those of the dataclass field.

    Args:
        default (`Any`): The default; `dataclasses.MISSING` for a required option.
        help (`str`): One sentence without a full stop, and without its choices.
        kind (`Kind`): What values are accepted.
        choices (`Collection[str]` or `str`): The allowed names, or the name of a table that is set with [`set_choices`].
        flag (`str`, *optional*): The name on the command line, if it differs from the field's.
        positional (`bool`): Whether it is a positional argument on the command line.
        revision_of (`str`, *optional*): The option that names the model, if this one is a revision of it.
    """

    default: Any
    help: str
    kind: Kind
    choices: Collection[str] | str = ()
    flag: str | None = None
    positional: bool = False
    revision_of: str | None = None

    @property
    def names(self) -> Collection[str]:
        """The allowed names; empty if any value of the kind is accepted, or the table is not set yet."""
        return _TABLES.get(self.choices, ()) if isinstance(self.choices, str) else self.choices

    @property
    def text(self) -> str:
        """The help with its choices."""
        return f"{self.help}: {', '.join(self.names)}" if self.names else self.help

    def check(self, name: str, value: Any) -> Any:
        """Validate and normalise a value.

        Raises:
            CutError: It is not accepted.
        """
        if value is None and self.default is None:
            return None
        if self.names and self.kind is TEXT:
            return check_choice(name, value, self.names)
        return check_value(name, value, self.kind)


class _Help(str):
    """An option's help, which carries its declaration: HfArgumentParser passes all other metadata on to argparse."""

    option: Option


def option(default: Any, help: str, kind: Kind | None = None, **more: Any) -> Any:
    """Declare a field of a dataclass as an option; see [`Option`]. PEFT and transformers read its `help`."""
    declaration = Option(default, help, kind or (FLAG if isinstance(default, bool) else TEXT), **more)
    return dataclasses.field(default=default, metadata={"help": help_of(declaration)})


def help_of(declaration: Option) -> str:
    """The help of a dataclass field that is this option."""
    text = _Help(f"{declaration.text}.")
    text.option = declaration
    return text


def set_choices(table: str, names: Collection[str]) -> None:
    """Set the allowed names of a table. The collection is not copied, so entries that are added later count too."""
    _TABLES[table] = names


def check_choice(what: str, name: Any, names: Collection[str]) -> str:
    """Check that a name is one of `names`, and return it.

    Raises:
        CutError: It is unknown; the message lists the known names.
    """
    if isinstance(name, str) and name in names:
        return name
    near = get_close_matches(str(name)[:100], names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}? There are" if near else "; there are"
    raise CutError(f"{what} {quoted(name)} is unknown{hint} {', '.join(names)}")


def option_fields(cls: Any) -> dict[str, Option]:
    """The options among the fields of a dataclass, by name."""
    helps = {f.name: f.metadata.get("help") for f in dataclasses.fields(cls)}
    return {name: text.option for name, text in helps.items() if isinstance(text, _Help)}


def check_options(values: Any) -> None:
    """Validate and normalise all options of a dataclass, then call its method `check_combination`, which checks them together.

    Raises:
        CutError: One of them is not accepted.
    """
    options = option_fields(values)
    for name, declaration in options.items():
        setattr(values, name, declaration.check(name, getattr(values, name)))
    for name, declaration in options.items():
        model = getattr(values, declaration.revision_of, None) if declaration.revision_of else None
        if model and os.path.exists(os.path.expanduser(model)):
            refuse_unused(values, (name,), f"on {model}, which is a local path")
    if check_combination := getattr(values, "check_combination", None):
        check_combination()


def refuse_unused(values: Any, names: Iterable[str], why: str, way_out: str = "") -> None:
    """Refuse those of some settings that differ from their defaults. `why` says when they have no effect, and `way_out` what
    to do, besides leaving them out, which follows.

    The dataclass may be another library's. Settings that are `None` or do not exist count as unset.

    Raises:
        CutError: One of them is set.
    """
    options, changed = option_fields(values), []
    fields = {field.name: field for field in dataclasses.fields(values)}
    for name in names:
        if name not in fields:
            continue
        factory = fields[name].default_factory
        default = factory() if factory is not dataclasses.MISSING else fields[name].default
        default = options[name].check(name, default) if name in options else default
        if getattr(values, name) not in (None, default):
            value = getattr(values, name)
            changed.append(f"{name}={quoted(value) if len(str(value)) <= 50 else '...'}")
    if changed:
        has, it = ("have", "them") if len(changed) > 1 else ("has", "it")
        raise CutError(f"{join_words(changed)} {has} no effect {why}; {way_out}leave {it} out")


def copy_fields(cls: type[T], values: Any, **changes: Any) -> T:
    """Make a dataclass from the fields of another one that it shares, with some changes."""
    names = {f.name for f in dataclasses.fields(values)} & {f.name for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    return cls(**{name: getattr(values, name) for name in names} | changes)


def documented(cls: type[T]) -> type[T]:
    """Add the fields of a dataclass that have a help to its docstring, as its `Args`."""
    lines, options = [], option_fields(cls)
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        text = f"{options[field.name].text}." if field.name in options else field.metadata.get("help")
        if text and isinstance(field.type, str):  # the types of PEFT's own fields are not text
            default = "" if field.default is dataclasses.MISSING else f", defaults to `{field.default!r}`"
            lines.append(f"    {field.name} (`{field.type}`{default}): {text}")
    cls.__doc__ = "\n".join([f"{inspect.getdoc(cls)}\n\nArgs:", *lines])
    return cls
