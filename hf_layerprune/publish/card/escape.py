"""Text that comes from outside, put into Markdown so that it stays text.

Names of models, tasks and data sets are chosen by strangers. In a card they may neither end a table nor start a
link, a tag, a formula or a template; nor may they hide or turn around what stands beside them, nor be longer than
anybody reads. Everything that the template prints goes through here: `prose` is what it does unless told otherwise.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ...records.names import is_hub_name

MAX_TEXT = 200
MAX_CODE = 20_000
# Control characters; and marks that no reader sees, some of which turn the direction of what follows.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\uffff]"
)
_SPECIAL = re.compile(r"([`*\[\]<>{}|~^$])")
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
# What makes a heading, a list or a rule of the line that it begins.
_START = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[#+=-]))(.)")
# What renderers turn into a link on sight.
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto)(?=:)|\bwww(?=\.)|(?<=\w)@(?=\w)")
_MARK = re.compile(r"<!--|-->")


def plain(value: Any, limit: int = MAX_TEXT) -> str:
    """One line without unseen characters, of bounded length."""
    text = " ".join(_UNSEEN.sub(" ", str(value)[: 50 * limit]).split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def prose(value: Any) -> Markup:
    """Text inside a paragraph or a table's cell."""
    if isinstance(value, Markup):
        return value
    text = plain(value).replace("&", "&amp;").replace("\\", "&#92;")
    text = _START.sub(r"\1\\\2", _UNDERSCORE.sub(r"\\_", _SPECIAL.sub(r"\\\1", text)))
    return Markup(_LINK.sub(lambda match: match[0] + "<!-- -->" if match[0] != "@" else "&#64;", text))


def code(value: Any) -> Markup:
    """A name or a value, in a code span that also holds inside a table."""
    text = plain(value)
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip("` ") else ""
    return Markup(f"{ticks}{pad}{text or '-'}{pad}{ticks}".replace("|", r"\|"))


def fenced(value: Any, language: str = "") -> Markup:
    """A block of code."""
    lines = _UNSEEN.sub("", str(value)[:MAX_CODE].replace("\r\n", "\n")).rstrip("\n")
    lines = _MARK.sub(lambda match: match[0].replace("--", "- -"), lines)  # not to be taken for a mark of ours
    ticks = "`" * max(3, max(map(len, re.findall("`+", lines)), default=0) + 1)
    return Markup(f"{ticks}{language}\n{lines}\n{ticks}")


def link(text: Any, url: str) -> Markup:
    """A link, or only its text where the address is not plainly one."""
    if re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[\w.,:;%~/?#@!&=+-]*)?", url) is None:
        return prose(text)
    return Markup(f"[{prose(text)}]({url})")


def hub_link(name: str, kind: str = "") -> Markup:
    """A link to a repository on the Hub, or the name as code where it has no such form."""
    if not is_hub_name(name):
        return code(name)
    return Markup(f"[{prose(name)}](https://huggingface.co/{kind + '/' if kind else ''}{name})")


def string(value: Any) -> Markup:
    """A string literal of Python, for a snippet."""
    return Markup(json.dumps(plain(value), ensure_ascii=False))


def command(words: Sequence[Any]) -> Markup:
    """A line for a shell, in which no word can do more than be one."""
    return Markup(shlex.join(plain(word, 2000) for word in words))
