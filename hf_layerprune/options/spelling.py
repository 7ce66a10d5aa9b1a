"""How a message names options: as in Python where it is written, and as flags where a command shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..layer_ranges import format_layers

# Quoted text, in which nothing is an option, or a word with its value, if any. Parts of a path or of a dotted or hyphenated
# name, and functions that are called, are not options.
_QUOTED = r"""(?<!\w)(["'`]).*?\1(?!\w)"""
_VALUE = r"""'[^']*'|"[^"]*"|\[[^]]*\]|\([^)]*\)|\{[^}]*\}|\.{3}|[^\s,;)]*[^\s,;:.)]"""
_WORD = re.compile(rf"{_QUOTED}|(?<![\w./-])(?P<name>[a-z][a-z0-9_]*)(?:=(?P<value>{_VALUE}))?(?![\w(/-]|\.\w)")
_SAFE = re.compile(r"[\w./:,+-]+")  # in a shell, without quotes


def spell_options(message: str, flags: Mapping[str, str]) -> str:
    """Name the options in a message as a command line does: `drop=3` becomes `--drop 3`, and `target_size` `--target-size`.

    A name of one word is taken for an option only with a value; where a message has none, it says `drop=...`.

    Args:
        message (`str`): The message, with the options as in Python.
        flags (`Mapping[str, str]`): The flag of each option, and the flags for values that are not written after it, such
            as `{"tune_lm_head=False": "--no-tune-lm-head"}`.
    """

    def spell(match: re.Match[str]) -> str:
        name, value = match["name"], match["value"]
        if name not in flags or (value is None and "_" not in name):
            return match[0]
        if value is None or value == "...":
            return flags[name]
        if match[0] in flags or value in ("None", "False"):
            return flags.get(match[0], match[0])
        return f"{flags[name]} {_as_typed(value)}"

    return _WORD.sub(spell, message)


def _as_typed(value: str) -> str:
    """A Python value as one types it."""
    if value[0] in "[(":
        words = [word.strip("\"'") for word in re.split(r", ?", value[1:-1]) if word]
        if value[0] == "[" and all(map(str.isdecimal, words)):
            return format_layers([int(word) for word in words])
        return ",".join(words)
    plain = value.strip("\"'")
    return plain if _SAFE.fullmatch(plain) else value
