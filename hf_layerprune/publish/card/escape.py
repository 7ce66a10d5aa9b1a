"""Escapes untrusted text for Markdown.

Strangers choose the names of models, tasks and data sets. In a card, a name must not break a table, start a link, a
tag, a formula or a template, hide or reverse the text around it, or be excessively long. Everything that a template
prints is escaped here, with `escape_text` unless the template asks for another filter.
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
# Control characters and invisible marks, some of which reverse the direction of the text that follows.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ud800-\udfff\ufeff\ufff9-\uffff]"
)
_SPECIAL = re.compile(r"([`*\[\]<>{}|~^$])")
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
# At the start of a line, these make it a heading, a list item or a rule.
_START = re.compile(r"^(\d{1,9}(?=[.)](?:\s|$))|(?=[#+=-]))(.)")
# Renderers turn these into links automatically.
_LINK = re.compile(r"(?i)\b(https?|ftp|mailto)(?=:)|\bwww(?=\.)|(?<=\w)@(?=\w)")
_MARK = re.compile(r"<!--|-->")


def clean_line(value: Any, limit: int = MAX_TEXT) -> str:
    """One line of bounded length, without invisible characters."""
    text = " ".join(_INVISIBLE.sub(" ", str(value)[: 50 * limit]).split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def escape_text(value: Any) -> Markup:
    """Escape text for a paragraph or a table cell."""
    if isinstance(value, Markup):
        return value
    text = clean_line(value).replace("&", "&amp;").replace("\\", "&#92;")
    text = _START.sub(r"\1\\\2", _UNDERSCORE.sub(r"\\_", _SPECIAL.sub(r"\\\1", text)))
    return Markup(_LINK.sub(r"\g<0><!-- -->", text))


def code_span(value: Any) -> Markup:
    """A name or a value as a code span that is also safe inside a table."""
    text = clean_line(value)
    if "|" in text:  # which would need an escape inside a table, and be shown with it elsewhere
        return Markup(f"<code>{escape_text(text)}</code>")
    ticks = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip("` ") else ""
    return Markup(f"{ticks}{pad}{text or '-'}{pad}{ticks}")


def code_block(value: Any, language: str = "") -> Markup:
    """A fenced code block."""
    lines = _INVISIBLE.sub("", str(value)[:MAX_CODE].replace("\r\n", "\n")).rstrip("\n")
    lines = _MARK.sub(lambda match: match[0].replace("--", "- -"), lines)  # must not look like one of our marks
    ticks = "`" * max(3, max(map(len, re.findall("`+", lines)), default=0) + 1)
    return Markup(f"{ticks}{language}\n{lines}\n{ticks}")


def link(text: Any, url: str) -> Markup:
    """A link, or its text alone if the URL is not a plain http(s) address."""
    if re.fullmatch(r"https?://[\w.-]+(:\d+)?(/[\w.,:;%~/?#@!&=+-]*)?", url) is None:
        return escape_text(text)
    return Markup(f"[{escape_text(text)}]({url})")


def hub_link(name: str, kind: str = "") -> Markup:
    """A link to a repository on the Hub, or the name as code if it is not a valid Hub id."""
    if not is_hub_name(name):
        return code_span(name)
    return Markup(f"[{escape_text(name)}](https://huggingface.co/{kind + '/' if kind else ''}{name})")


def python_literal(value: Any) -> Markup:
    """A Python string literal, for a code snippet."""
    return Markup(json.dumps(clean_line(value), ensure_ascii=False))


def shell_command(words: Sequence[Any]) -> Markup:
    """A shell command in which every word is quoted."""
    return Markup(shlex.join(clean_line(word, 2000) for word in words))
