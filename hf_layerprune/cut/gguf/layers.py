"""Rewrite the metadata of a GGUF file that describes its layers.

`families/gguf.py` lists the known architectures and keys. Any other architecture, and any other key that may be about
layers, is refused, because a model that loads but silently gives wrong results must never be written.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...errors import CutError
from ...families.fields import Cut, cut_without
from ...families.gguf import (
    ARCHITECTURES,
    ARRAYS,
    FIRST_SIZES_ALL,
    PER_LAYER,
    PER_LAYER_UNPREFIXED,
    PERIODS,
    SCALARS,
    TWO_KINDS,
)
from ...files.gguf_header import CUT_KEYS, architecture_of, block_count_of, integer_value
from ...layer_ranges import format_layers

if TYPE_CHECKING:
    from ...files.gguf_header import Entry, GGUFHeader

_OTHER_PREFIXES = ("general.", "tokenizer.", "split.", "quantize.", "diffusion.")
_LAYER_WORDS = re.compile(r"layer|block|blk|every|interval|period|pattern|depth|stage|stack|loop|_step")


class GGUFCut(NamedTuple):
    """A cut of a file whose layers from `main_count` on are for multi-token prediction."""

    header: GGUFHeader
    architecture: str
    main_count: int
    layers: Cut

    @property
    def block_count(self) -> int:
        """How many layers the file has."""
        return self.layers.num_layers

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that stay."""
        return self.layers.keep

    @property
    def kept_main(self) -> int:
        """How many of the decoder's layers stay."""
        return bisect_left(self.kept, self.main_count)


def rewrite_metadata(header: GGUFHeader, drop_layers: Sequence[int]) -> tuple[GGUFCut, dict[str, Sequence[Any]]]:
    """Work out every metadata entry that changes when layers are dropped.

    Returns:
        `tuple[GGUFCut, dict[str, Sequence[Any]]]`: The layers to keep, and the new values of each entry that changes, by
            key.

    Raises:
        CheckpointError: The architecture, a key or the set of layers does not allow an exact cut.
    """
    arch = architecture_of(header)
    block_count = block_count_of(header)
    trailing = header.keys.get(f"{arch}.nextn_predict_layers")
    main_count = block_count - (0 if trailing is None else integer_value(header, trailing))
    if not 0 < main_count <= block_count:
        header.fail(f"{arch}.nextn_predict_layers does not fit the {block_count} layers; the file is damaged")
    cut = GGUFCut(header, arch, main_count, cut_without(drop_layers, block_count))
    if not cut.kept_main:
        raise CutError(f"drop_layers has all of the decoder's layers 0..{main_count - 1}; one must stay")
    _check_architecture(cut)

    changes = {entry.key: _new_values(cut, entry) for entry in header.keys.values()}
    return cut, {key: values for key, values in changes.items() if values is not None}


def _check_architecture(cut: GGUFCut) -> None:
    rule = ARCHITECTURES.get(cut.architecture)
    if rule is None:
        cut.header.fail(
            f"the GGUF architecture {cut.architecture!r} cannot be cut in this format: it is not known to run the same layers "
            "at other indices; cut the model's safetensors checkpoint instead and convert that"
        )
    for counts in rule.counts:
        if (cut.main_count in counts) != (cut.kept_main in counts):
            cut.header.fail(
                f"llama.cpp reads a {cut.architecture} file of {cut.main_count} layers differently from one of "
                f"{cut.kept_main}; drop another number of layers, or cut the safetensors checkpoint instead"
            )
    gate = cut.header.keys.get(f"{cut.architecture}.{rule.only_if}") if rule.only_if else None
    if not rule.period or (rule.only_if and (gate is None or not integer_value(cut.header, gate))):
        return
    period = rule.period
    entry = cut.header.keys.get(f"{cut.architecture}.{rule.period_key}")
    if entry is not None and not entry.is_array:
        period = integer_value(cut.header, entry)
    # An array of flags describes the layers too, but readers older than the array go by the fixed period.
    _check_alternation(cut, period, f"every {cut.architecture} model")


def _check_alternation(cut: GGUFCut, period: int, source: str) -> None:
    """Refuse a cut after which other layers would end a group of `period`, and so be of the other kind."""
    if not period:
        return
    for new, old in enumerate(cut.kept[: cut.kept_main]):
        if ((new + 1) % period == 0) != ((old + 1) % period == 0):
            first = next(index for index, layer in enumerate(cut.kept) if index != layer)
            first -= first % period
            last = min(first + period, cut.main_count) - 1
            cut.header.fail(
                f"two kinds of layers alternate in groups of {period} ({source}), and layer {old} would become layer {new}, "
                f"which is of the other kind; drop whole groups, for example {format_layers(range(first, last + 1))}"
            )
    if cut.kept_main < period <= cut.main_count:
        cut.header.fail(
            f"two kinds of layers alternate in groups of {period} ({source}), and only one kind would be left; keep a layer "
            "of each"
        )


def _new_values(cut: GGUFCut, entry: Entry) -> list[Any] | None:
    """The new values of an entry, or `None` to copy it unchanged."""
    header, key = cut.header, entry.key
    if key in PER_LAYER_UNPREFIXED:
        return _kept_values(cut, entry) if entry.is_array else None
    if key.startswith("general.tensor_extra."):
        header.fail(f"{key} lists tensors by name, and rewriting it is not supported")
    if key.startswith(_OTHER_PREFIXES) or key in CUT_KEYS:
        return None
    suffix = key.removeprefix(f"{cut.architecture}.")
    if suffix == key:
        _check_unknown_key(cut, entry)
        return None
    if suffix == "block_count":
        return [len(cut.kept)]
    if suffix in PER_LAYER and entry.is_array:
        return _kept_kinds(cut, entry, suffix)
    if suffix in PERIODS:
        _check_alternation(cut, integer_value(header, entry), key)
    elif suffix == "leading_dense_block_count":
        return [bisect_left(cut.kept, integer_value(header, entry))]
    elif suffix == "nextn_predict_layers":
        return [len(cut.kept) - cut.kept_main]
    elif suffix in SCALARS or suffix in PER_LAYER:
        if entry.is_array:
            _check_unknown_key(cut, entry)
    elif suffix not in ARRAYS:
        _check_unknown_key(cut, entry)
    return None


def _kept_kinds(cut: GGUFCut, entry: Entry, suffix: str) -> list[Any]:
    """The values of the kept layers, if readers take the same from them as they do from the whole array."""
    before, after = entry.values, _kept_values(cut, entry)
    if suffix in FIRST_SIZES_ALL and before[0] != after[0]:
        cut.header.fail(
            f"{entry.key} is {before[0]} in the first layer, and readers size the whole model by it; after this cut the "
            f"first layer would have {after[0]}, so keep layer 0"
        )
    if suffix in TWO_KINDS and {value != 0 for value in before} != {value != 0 for value in after}:
        cut.header.fail(
            f"{entry.key} tells two kinds of layers apart, and only one would be left; keep a layer of each"
        )
    return after


def _kept_values(cut: GGUFCut, entry: Entry) -> list[Any]:
    """The values of the kept layers."""
    if not entry.is_numeric or entry.count not in (cut.block_count, cut.main_count):
        cut.header.fail(
            f"{entry.key} should have one number for each of the {cut.block_count} layers, and is an array of "
            f"{entry.count}{'' if entry.is_numeric else ' strings'}; the file is damaged or of an unknown kind"
        )
    kept = cut.kept if entry.count == cut.block_count else cut.kept[: cut.kept_main]
    return [entry.values[layer] for layer in kept]


def _check_unknown_key(cut: GGUFCut, entry: Entry) -> None:
    if entry.is_array:
        suspect = entry.count in (cut.block_count, cut.main_count)
    else:
        suspect = entry.is_integer and entry.values[0] == cut.block_count
    if suspect or _LAYER_WORDS.search(entry.key):
        cut.header.fail(
            f"{entry.key} may say something about the layers, and it is not known how to rewrite it; "
            "remove it with gguf-editor-gui or gguf-new-metadata if it does not matter, or cut the safetensors "
            "checkpoint instead"
        )
