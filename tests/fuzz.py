"""Damaged and hostile versions of every file that the commands read, made from sound ones."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

# Unexpected values for a field.
ODD = (
    None, True, False, 0, 1, -1, 2, 7, 3.7, -0.5, 1e308, 10**6, 10**9, 10**30, -(10**19), "", " ", "x", "34", "true", "auto",
    "x" * 5000, "\x1b[31m", "\u202eabc", "a\x00b", "\ud800", "../../etc/passwd", "/dev/zero", "é", "{{ 1 }}", "float32",
    "llama", "bert", "org/name", [], {}, [[]], [0], [1, 2, 3], [-1], [None], ["a"], {"a": 1}, {"": None}, [True, 4],
    {"0": 1, "1": 2}, [10**9] * 3, ["x"] * 2000,
)  # fmt: skip
RAW = ("NaN", "-Infinity", "1e999", "1" * 5000, "[" * 200 + "]" * 200, '{"a":' * 300 + "1" + "}" * 300)
_HERE = "\x01here\x01"


def paths(content: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every value of a JSON document."""
    yield here
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in list(inside)[:40]:
        yield from paths(value, (*here, key))


def _put(content: Any, path: tuple[Any, ...], change: Any) -> Any:
    """A document with one value changed; `change` takes the value's container and key."""
    holder: Any = {"top": json.loads(json.dumps(content))}
    at, key = holder, "top"
    for step in path:
        at, key = at[key], step
    change(at, key)
    return holder.get("top")


@st.composite
def damaged_json(draw: st.DrawFn, sound: str) -> bytes:
    """A damaged version of a JSON file."""
    if draw(st.integers(0, 5)) == 0:
        return draw(damaged_bytes(sound.encode()))
    content = json.loads(sound)
    raw = None
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(sorted(set(paths(content)), key=str)))
        how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "wrap", "raw", "nudge"]))
        odd = draw(st.sampled_from(ODD))

        def change(at: Any, key: Any, how: str = how, odd: Any = odd) -> None:
            value = at[key]
            if how == "drop" and (isinstance(at, list) or key != "top"):
                del at[key]
            elif how == "add" and isinstance(value, dict):
                value[odd if isinstance(odd, str) else "more"] = odd
            elif how == "add" and isinstance(value, list):
                value.append(odd)
            elif how == "wrap":
                at[key] = [value]
            elif how == "raw":
                at[key] = _HERE
            elif how == "nudge" and isinstance(value, int | float):
                at[key] = -value if value else 1
            elif how == "nudge" and isinstance(value, str):
                at[key] = value[:-1] + "\u202e"
            else:
                at[key] = odd

        content = _put(content, path, change)
        if how == "raw":
            raw = draw(st.sampled_from(RAW))
    text = json.dumps(content)
    if raw is not None:
        text = text.replace(json.dumps(_HERE), raw)
    return text.encode()


@st.composite
def damaged_bytes(draw: st.DrawFn, sound: bytes) -> bytes:
    """A file with bytes removed, changed or added."""
    data = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        how = draw(st.sampled_from(["cut", "flip", "insert", "gap", "repeat", "prefix"]))
        if how == "cut":
            del data[at:]
        elif how == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "insert":
            data[at:at] = draw(
                st.sampled_from([b"\x00", b"\xff", b"\xed\xa0\x80", b"\x1b[2J", b'"', b"{", b"\n---\n", b"99"])
            )
        elif how == "gap":
            del data[at : at + draw(st.integers(1, 40))]
        elif how == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 40))]
        elif how == "prefix":
            data[:0] = draw(
                st.sampled_from([b"\xef\xbb\xbf", b"\xff\xfe", b"<!DOCTYPE html><html>", b"version https://git-lfs"])
            )
    return bytes(data)


@st.composite
def damaged_safetensors(draw: st.DrawFn, sound: bytes) -> bytes:
    """A safetensors file with another header before the same data."""
    (length,) = struct.unpack("<Q", sound[:8])
    if draw(st.booleans()):
        header = draw(damaged_json(sound[8 : 8 + length].decode()))
        said = draw(st.sampled_from([len(header)] * 6 + [0, 1, len(header) + 1, 2**31, 2**63, 2**64 - 1]))
        return struct.pack("<Q", said) + header + sound[8 + length :]
    head = draw(damaged_bytes(sound[: 8 + length]))
    return head + sound[8 + length :]


@st.composite
def damaged_gguf(draw: st.DrawFn, sound: bytes, header: int) -> bytes:
    """A GGUF file with a damaged header, or another number in it."""
    if draw(st.booleans()):
        return draw(damaged_bytes(sound[:header])) + sound[header:]
    data = bytearray(sound)
    at = draw(st.integers(0, header - 8))
    number = draw(st.sampled_from([0, 1, 255, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
    width = draw(st.sampled_from(["<Q", "<I"]))
    data[at : at + struct.calcsize(width)] = struct.pack(width, number & (2 ** (8 * struct.calcsize(width)) - 1))
    return bytes(data)


@st.composite
def damaged_lines(draw: st.DrawFn, sound: str) -> bytes:
    """A file of JSON lines, one of which is damaged."""
    lines = [line for line in sound.split("\n") if line]
    at = draw(st.integers(0, len(lines) - 1))
    damaged = draw(damaged_json(lines[at]))
    before, after = ("\n".join(part).encode() for part in (lines[:at], lines[at + 1 :]))
    return before + b"\n" + damaged + b"\n" + after


@st.composite
def damaged_yaml(draw: st.DrawFn, sound: str) -> bytes:
    """YAML (or a card that begins with some) with odd values, tags, aliases and broken ends."""
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(sound.encode()))
    odd = [
        "!!python/object/apply:os.system ['true']", "!function os.system", "&a [*a]", "*unknown", "{a: b", "2026-99-99",
        "2026-01-01", "0x1F", ".nan", ".inf", "1e999", "1" * 5000, "~", "[]", "{}", "[1, 2]", "{? [a] : b}", "true", "yes",
        "|\n  text", '"\\ud800"', '"\\x1b[2J"', "- a", "? a", "<<: {a: 1}", "'" + "x" * 5000 + "'", "[" * 300, "''",
        "{{ cycler.__init__.__globals__ }}", "'{{ query.__class__ }}'", "'{% for'", "!!binary aGk=", "!!set {a}",
    ]  # fmt: skip
    lines = sound.split("\n")
    for _ in range(draw(st.integers(1, 2))):
        at = draw(st.integers(0, len(lines) - 1))
        name, colon, _ = lines[at].partition(":")
        how = draw(st.sampled_from(["value", "value", "value", "twice", "drop", "key"]))
        if how == "value" and colon:
            lines[at] = f"{name}: {draw(st.sampled_from(odd))}"
        elif how == "twice":
            lines.insert(at, lines[at])
        elif how == "drop":
            lines[at] = ""
        else:
            lines[at] = f"{draw(st.sampled_from(odd))}: {lines[at]}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def damaged_template(draw: st.DrawFn, sound: str) -> bytes:
    """A chat template that raises, tries to escape the sandbox, or renders nothing."""
    odd = [
        "{{ raise_exception('no') }}", "{{ messages[99].content }}", "{{ cycler.__init__.__globals__ }}", "{{ 1 / 0 }}",
        "{% for m in messages %}", "{{ x }}", "{% include 'a' %}", "{{ messages|tojson }}", "{{ 'a' * 3 }}", "{{", "",
        "{{ messages[0]['nothing'].more }}", "{{ strftime_now('%') }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
        "{{ namespace(a=1).b.c }}", "{{ messages | map('x') | list }}", "{% break %}", "{% generation %}a{% endgeneration %}",
    ]  # fmt: skip
    if draw(st.integers(0, 2)) == 0:
        return draw(damaged_bytes(sound.encode()))
    pieces = re.split(r"(?<=%\})|(?<=\}\})", sound)
    at = draw(st.integers(0, len(pieces)))
    pieces[at:at] = [draw(st.sampled_from(odd))]
    if draw(st.booleans()):
        del pieces[draw(st.integers(0, len(pieces) - 1))]
    return "".join(pieces).encode()
