"""The recipe's command line and settings files: TRL's parser, with this package's errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

from trl import TrlParser

from ..errors import CutError, one_line, sanitize
from ..options import CutOptions, option_fields, spell_options
from ..options.kinds import quoted
from ..records.requirements import RequireOptions

# Here, some options of `eval` have other names.
_OF_EVAL = {"tasks": "eval_tasks", "tasks_from": "eval_from", "texts": "eval_texts", "limit": "eval_limit"}


class RecipeParser(TrlParser):
    """Takes options by their full names, reports an error in one line, and repeats no token that it was given by mistake."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__(arguments, allow_abbrev=False)

    def set_defaults_with_config(self, **settings: Any) -> list[str]:
        """Read a settings file as the command line is read, where `drop_layers` may be 3, and `on` is a word.

        Raises:
            CutError: A setting that has one value is a list, a mapping, or a date.
        """
        checked = option_fields(CutOptions) | option_fields(RequireOptions)  # when they are parsed
        for action in self._actions:
            name, value = action.dest, settings.get(action.dest)
            single = action.nargs != "+" and action.type not in (None, str) and name not in checked
            if single and not isinstance(value, str | int | float | None):
                raise CutError(f"'{name}: {quoted(value)}' in the settings file must be a single value")
        words = {name: str(settings[name]) for name in checked if type(settings.get(name)) in (int, float)}
        if isinstance(settings.get("cache"), bool):  # YAML's on and off
            words["cache"] = "on" if settings["cache"] else "off"
        return super().set_defaults_with_config(**settings | words)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {one_line(sanitize(message))} (--help lists the options)\n")


def spell_settings(message: str, arguments: Sequence[Any]) -> str:
    """Name the options in a message as the recipe's command line does, see [`spell_options`]."""
    flags = {field.name: f"--{field.name}" for one in arguments for field in fields(one)}
    flags |= {name: f"--{own}" for name, own in _OF_EVAL.items()}
    for name, flag in list(flags.items()):
        flags |= {f"{name}={value}": f"{flag} {str(value).lower()}" for value in (True, False)}
    return spell_options(message, flags)
