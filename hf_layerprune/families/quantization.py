r"""Rewrite quantisation settings that name layers by index.

Each quantiser has its own fields for this (skip lists, ignore patterns, targets, per-module overrides), and new ones
keep appearing. So fields are not looked up by name; every string and every key of the settings is examined. A name
(`model.layers.12.mlp.down_proj`) is renumbered, or removed with its layer; one with a wildcard (`model.layers.3*`) is
resolved to the layers it matches. A regular expression that may pick layers by their index, and anything else that looks
like a layer's index, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..errors import CutError
from ..layer_ranges import LIST_NAMES, NOT_TEXT
from .fields import Cut, looks_per_layer

# Characters that distinguish a regular expression from a module name, with or without wildcards.
_REGEX = re.compile(r"[\\^$()|+{\[]")
# Fields whose keys are regular expressions even if they look like names: GPTQModel's and Gemma's.
_PATTERN_FIELDS = ("dynamic", "module_quant_configs")
# The quantisers whose stars match any text, as in file names; all others take what has a star as a regular expression.
_WITH_WILDCARDS = ("modelopt", "quark")
# Words that identify the decoder of a multimodal model among its other stacks, and where else it may be.
_TEXT = re.compile(r"language|text|decoder|llm")
_PLAIN = ("model", "transformer", "thinker.model")
# A layer's index in a form that is not a module's name, such as `layer_3`, `blk.3` or `3.mlp`.
_INDEX = re.compile(r"(?<![a-z])(?:layers?|blocks?|blk)[\W_]*[0-9]|^[0-9]+\.(?!dev|post|rc)[a-z_]", re.IGNORECASE)
_INDICES = re.compile(r"[0-9][0-9\s,:;-]*")
_ANY_DIGIT = re.compile(r"(?<!\{)(?<!,)(?:\\d|[0-9]+)")
# A segment that matches any index. A second dot beside it could stand for one of the digits.
_ANY_INDEX = re.compile(r"(?<=\w\.|\\\.)(\((?:\?:|\?P<\w+>)?)?(?:\\d|\[0-9\])\+(?(1)\))(?=\\\.|\.\w)")
_WORD_END = re.compile(r"(?:^|[^\\A-Za-z0-9_])(?:\\b)?[A-Za-z_][A-Za-z0-9_]*$")
_LIST = re.compile(rf"(?:(?<=\\b)|(?<![A-Za-z0-9_]))(?:{'|'.join(LIST_NAMES)})(?:\\\.|\.|\[\.\])")
# What may start a group: `(`, `(?:`, `(?!`, `(?P<name>`, ...
_GROUPS = r"(?:\((?:\?(?:[a-z-]*:|<?[=!]|>|P?<\w+>))?)*"
# A number of characters, so that layers 0 to 9 are told from the rest.
_ONE_DIGIT = re.compile(rf"{_LIST.pattern}{_GROUPS}(?:\.|(?<!\()\?|\\[wS]|\[[^\]]+\])(?![*+])")
_OWNER = re.compile(r"(?:(?<=\\b)|(?<!\\))(?<![A-Za-z0-9_])([A-Za-z_][A-Za-z0-9_]*)(\\\.|\.|\[\.\])$")


def rewrite_quantization(
    settings: Any, cut: Cut, name: str = "quantization_config", *, several_stacks: bool = False
) -> Any:
    """The quantisation settings of the pruned model, without dropped layers and with the kept ones renumbered; a copy.

    `name` is what holds them, for errors. With `several_stacks`, the model has layers outside its decoder, so
    ambiguous patterns are refused.

    Raises:
        CutError: An entry names layers in a way that can't be rewritten exactly.
    """
    method = None
    if isinstance(settings, dict):  # only ModelOpt has a producer, in a file of its own
        method = settings.get("quant_method", "modelopt" if "producer" in settings else None)
    return _Rewriter(cut, name, several_stacks, str(method).startswith(_WITH_WILDCARDS)).walk(settings, "")


def names_layers(value: Any) -> bool:
    """Whether a value of a config, or anything in it, may name layers by index, as quantisation settings do."""
    if isinstance(value, dict):
        return any(map(names_layers, (*value, *value.values())))
    if isinstance(value, list | tuple):
        return any(map(names_layers, value))
    return isinstance(value, str) and bool(_LIST.search(value)) and any(char.isdecimal() for char in value)


def _is_outside_decoder(pattern: str) -> bool:
    """Whether a regular expression can only mean stacks for other modalities, in each of its alternatives."""
    ends = [match.start() for match in _LIST.finditer(pattern)]
    before = pattern[: ends[-1]] if ends else ""
    return not re.search(r"!|\)[?*{]", before) and all(NOT_TEXT.search(part) for part in before.split("|"))


def _begun_by(names: Iterable[Any], num_layers: int) -> Iterator[tuple[str, int, str]]:
    """Layers of the decoder whose name begins with one of these names: what precedes the index, the index, and that name."""
    for name in names:
        stem, _, index = name.rpartition(".") if isinstance(name, str) else ("", "", "")
        is_layer = stem.rpartition(".")[2] in LIST_NAMES and index.isdecimal() and not NOT_TEXT.search(name)
        yield from ((f"{stem}.", i, name) for i in range(num_layers) if is_layer and str(i).startswith(index))


class _Rewriter:
    def __init__(self, cut: Cut, name: str, several_stacks: bool, wildcards: bool) -> None:
        self._cut = cut
        self._holder = name
        self._several_stacks = several_stacks
        self._wildcards = wildcards

    def walk(self, value: Any, where: str) -> Any:
        if isinstance(value, dict):
            return self._walk_dict(value, where)
        listed = value if isinstance(value, list | tuple) else [value] if isinstance(value, str) else []
        if "layer" in where.lower() and any(_INDICES.fullmatch(str(one)) for one in listed):
            raise self._ambiguous_error(where, "may list layers by index")
        if isinstance(value, list | tuple):
            new: list[Any] = []
            for item in value:
                new += self._rewrite_text(item, where) if isinstance(item, str) else [self.walk(item, where)]
            self._check_beginnings(value, new)
            return new
        if isinstance(value, str):
            texts = self._rewrite_text(value, where)
            if len(texts) != 1:
                raise self._refusal(value, f"field {where!r} can hold only one name, but {len(texts)} would be needed")
            return texts[0]
        return value

    def _walk_dict(self, value: dict[str, Any], where: str) -> dict[str, Any]:
        if "layer" in where.lower() and any(re.fullmatch(r"[0-9]+", str(key)) for key in value):
            raise self._ambiguous_error(where, "has keys that may be layers")
        new: dict[str, Any] = {}
        for key, item in value.items():
            field = "" if "." in str(key) else str(key).lower()
            short = isinstance(item, list) and (len(item) < 3 or str in map(type, item))  # such as a block's size
            if not short and (why := looks_per_layer(field, item, self._cut.num_layers)):
                raise self._ambiguous_error(str(key), why)
            for text in self._rewrite_text(key, where) if isinstance(key, str) else [key]:
                rewritten = self.walk(item, key if isinstance(key, str) else where)
                if new.setdefault(text, rewritten) != rewritten:
                    raise self._refusal(key, f"{text!r} would get two settings")
        return new

    def _rewrite_text(self, text: str, where: str) -> list[str]:
        """Rewrite a string: none if it only names dropped layers, several if a wildcard has to be written out."""
        if where == "version":
            return [text]
        if _ONE_DIGIT.search(text) and not _is_outside_decoder(text):
            raise self._refusal(text, "it may pick layers by their index, or by its length")
        body = text.removeprefix("re:").removeprefix("+:").removeprefix("-:")
        if body != text or where in _PATTERN_FIELDS or _REGEX.search(body):
            self._check_no_index(text, body)
            return [text]
        return self._rewrite_name(text)

    # --- names, with or without wildcards --------------------------------------------------------------------

    def _rewrite_name(self, text: str) -> list[str]:
        parts = text.split(".")
        for place, part in enumerate(parts[:-1]):
            index, before = parts[place + 1], ".".join(parts[:place])
            if part.lstrip("*") in LIST_NAMES:
                if not any(char.isdecimal() for char in index):
                    continue
                if NOT_TEXT.search(before) or "mtp" in parts[:place]:
                    return [text]
                self._check_stack(text, before, "*" in part)
                return self._numbered(text, parts, place + 1)
            if re.fullmatch(r"[*?]*[0-9]+[*?]*", index) and (not part or "*" in part or "?" in part):
                raise self._refusal(text, "its index may belong to a layer")
        odd = _INDEX.search(text)
        if re.fullmatch(r"[*?]+[0-9]+[*?]*", parts[0]) or (odd and not NOT_TEXT.search(text[: odd.start()])):
            raise self._refusal(text, "its index may belong to a layer")
        return [text]

    def _numbered(self, text: str, parts: list[str], place: int) -> list[str]:
        head, index, tail = ".".join(parts[:place]), parts[place], parts[place + 1 :]
        if not self._wildcards and (index.endswith("*") or (tail and tail[0].startswith("*"))):
            raise self._refusal(text, "it could be a wildcard or a regular expression")
        if len(index) < 10 and index.isascii() and index.isdecimal():
            return [".".join([head, str(new), *tail]) for new in self._new_indices([int(index)])]
        if not re.fullmatch(r"[0-9]+\*", index):
            raise self._refusal(text, f"{index!r} is not a plain index")
        # A star also matches dots: it stands for more digits, and for any module inside the layer.
        indices = self._new_indices(i for i in range(self._cut.num_layers) if str(i).startswith(index[:-1]))
        return [".".join([head, str(new), *rest]) for new in indices for rest in (tail, ["*", *tail])]

    # --- regular expressions ---------------------------------------------------------------------------------

    def _check_no_index(self, text: str, pattern: str) -> None:
        """Refuse digits, except in a word (`w1`), outside a list of layers (`experts.0`), or for any number."""
        pattern = _ANY_INDEX.sub("x", pattern)
        for match in _ANY_DIGIT.finditer(pattern):
            before = pattern[: match.start()]
            if match[0] != r"\d" and _WORD_END.search(before):
                continue
            # Back to the start of the sub-pattern that contains the digit.
            opened = re.sub(r"[\[(?:|0-9\\d-]+$", "", before) if before[-1:] in tuple("[(:|-0123456789") else before
            if opened != before and _WORD_END.search(opened):
                continue
            owner = _OWNER.search(opened)
            if owner and owner[1] not in LIST_NAMES:
                continue
            if _is_outside_decoder(pattern):
                continue
            raise self._refusal(text, f"{match[0]!r} may pick layers by their index")

    # --- common ----------------------------------------------------------------------------------------------

    def _new_indices(self, layers: Iterable[int]) -> list[int]:
        return [self._cut.new_index[i] for i in layers if i in self._cut.new_index]

    def _check_beginnings(self, old: Sequence[Any], new: Sequence[Any]) -> None:
        """Refuse a list that means other layers after the cut where `layers.1` means `layers.10`, too.

        That is so in older versions of transformers.
        """
        if self._wildcards:
            return
        index = self._cut.new_index
        before = {(stem, index[i]): (name, i) for stem, i, name in _begun_by(old, self._cut.num_layers) if i in index}
        after = {(stem, i): (name, i) for stem, i, name in _begun_by(new, len(self._cut.keep))}
        if differing := before.keys() ^ after.keys():
            place = min(differing)
            name, i = (before | after)[place]
            when = "but would not after the cut" if place in before else "but only after the cut"
            raise self._refusal(name, f"some loaders also take it for {place[0] + str(i)!r}, {when}")

    def _check_stack(self, text: str, before: str, wild: bool) -> None:
        if self._several_stacks and not _TEXT.search(before) and (wild or before not in _PLAIN):
            raise self._refusal(text, "it may also match layers outside the decoder")

    def _ambiguous_error(self, where: str, why: str) -> CutError:
        return CutError(f"{self._holder} field {where!r} {why}, which is ambiguous; list modules instead")

    def _refusal(self, text: str, why: str) -> CutError:
        quoted = repr(text if len(text) <= 200 else text[:197] + "...")
        return CutError(
            f"{self._holder} names layers by {quoted}, which can't be rewritten exactly for the kept layers: "
            f"{why}; list the modules one by one in the base's config"
        )
