"""Comparing a model's tensors with what they have to be, byte by byte, and saying what is wrong where they differ."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod

from tqdm.auto import tqdm

from ...cut.header import Header, Tensor
from ...cut.plan import Origin, Span
from ...files.copy import LocalFile
from .rebuild import CHUNK, Reference, read_span, same_make, stream

_AT_ONCE = 4
_LAYER = re.compile(r"(?P<prefix>.*?\b(?:layers|layer|h|blocks|block)\.)(?P<index>\d+)\.(?P<rest>.+)")
# So many tensors of one layer are looked for elsewhere, when it is not the layer that it should be.
_PROBES = 2


@dataclass
class Comparison:
    """What was found.

    Args:
        same (`list[str]`): Tensors that are what they have to be, to the last bit.
        changed (`list[str]`): Tensors that differ, as a stage says.
        wrong (`dict[str, str]`): What is wrong with each of the others.
        absent (`list[str]`): Tensors that the model lacks.
        read (`int`): How many bytes were compared.
    """

    same: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)
    read: int = 0


def compare(
    headers: dict[str, Header],
    hashes: dict[str, str],
    reference: Reference,
    may_differ: Callable[[str], bool],
    kept: Sequence[int],
    *,
    rename: Callable[[str], str] = lambda name: name,
    local: bool = True,
    quick: bool = False,
) -> Comparison:
    """Hold a model's tensors against what they have to be.

    Args:
        headers (`dict[str, Header]`): The model's weight files.
        hashes (`dict[str, str]`): The sha256 of each of them, where reading a file costs more than hashing it anew.
        reference (`Reference`): What its tensors have to be.
        may_differ (`Callable[[str], bool]`): Which tensors a stage says it changed.
        kept (`Sequence[int]`): The base's indices of the model's layers.
        rename (`Callable[[str], str]`): From a tensor's name in the files to its name in the reference.
        local (`bool`): Whether reading the model costs no network.
        quick (`bool`): Compare names, types and shapes alone.

    Returns:
        `Comparison`: What was found.
    """
    found = Comparison()
    to_read: list[tuple[Header, list[tuple[str, Tensor, Origin]]]] = []
    seen = set()
    for header in headers.values():
        items = []
        for tensor in header.tensors:
            name = rename(tensor.name)
            seen.add(name)
            origin = reference.tensors.get(name)
            if origin is None or not same_make(origin.tensor, tensor):
                if may_differ(name):
                    found.changed.append(name)
                else:
                    found.wrong[name] = _of_another_make(name, tensor, origin)
                continue
            items.append((name, tensor, origin))
        to_read.append((header, items))
    found.absent = [name for name in reference.tensors if name not in seen]
    if quick:
        found.same = [name for _, items in to_read for name, _, _ in items if not may_differ(name)]
        return found
    total = sum(tensor.size for _, items in to_read for _, tensor, _ in items)
    with tqdm(
        total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="comparing", disable=total < 1 << 30
    ) as bar:
        for header, items in to_read:
            expected = hashes.get(_name_of(headers, header))
            by_hash = not local and expected is not None and len(items) == len(header.tensors)
            if by_hash and _whole(header, items, expected, may_differ, found, bar.update):
                continue
            wrong = _one_by_one(header, items, may_differ, found, bar.update)
            found.wrong |= _explained(header, wrong, reference, kept)
    found.read = total
    return found


def _name_of(headers: dict[str, Header], header: Header) -> str:
    return next(name for name, one in headers.items() if one is header)


def _of_another_make(name: str, tensor: Tensor, origin: Origin | None) -> str:
    if origin is None:
        return "is no tensor of the base"
    was, has = (f"{one.dtype}{list(one.shape)}" for one in (origin.tensor, tensor))
    return f"is {has}, and the base's is {was}"


def _whole(
    header: Header,
    items: list[tuple[str, Tensor, Origin]],
    expected: str,
    may_differ: Callable[[str], bool],
    found: Comparison,
    advance: Callable[[int], object],
) -> bool:
    """Prove a file by its hash: of its own header, the base's bytes, and its own where a stage changed them."""
    digest = hashlib.sha256(header.source.read(0, header.data_start))
    changed, same = [], []
    for name, tensor, origin in sorted(items, key=lambda item: item[1].start):
        if not may_differ(name):
            for data in stream(origin):
                digest.update(data)
                advance(len(data))
            same.append(name)
            continue
        equal = True
        for mine, theirs in zip_longest(_own(header.source, header, tensor), _in_step(origin, tensor)):
            digest.update(mine)
            equal = equal and mine == theirs
            advance(len(mine))
        (same if equal else changed).append(name)
    if digest.hexdigest() != expected:
        advance(-sum(tensor.size for _, tensor, _ in items))
        return False
    found.same += same
    found.changed += changed
    return True


def _own(source: LocalFile, header: Header, tensor: Tensor) -> Iterator[bytes]:
    return read_span(source, header.data_start + tensor.start, tensor.size)


def _one_by_one(
    header: Header,
    items: list[tuple[str, Tensor, Origin]],
    may_differ: Callable[[str], bool],
    found: Comparison,
    advance: Callable[[int], object],
) -> list[tuple[str, Tensor, str]]:
    """Compare tensors, and return those that should not differ and do."""

    def difference(item: tuple[str, Tensor, Origin]) -> str | None:
        _, tensor, origin = item
        told = _difference(_own(header.source, header, tensor), _in_step(origin, tensor), tensor)
        advance(tensor.size)
        return told

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        differences = list(pool.map(difference, items))
    wrong: list[tuple[str, Tensor, str]] = []
    for (name, tensor, _), told in zip(items, differences, strict=True):
        if told is None:
            found.same.append(name)
        elif may_differ(name):
            found.changed.append(name)
        else:
            wrong.append((name, tensor, told))
    return wrong


def _in_step(origin: Origin, tensor: Tensor) -> Iterator[bytes]:
    """The reference's bytes in stretches as long as the model's."""
    if len(origin.pieces) == 1 and isinstance(origin.pieces[0], Span):
        return stream(origin)
    whole = b"".join(stream(origin))  # of a tensor that holds a slice a layer; there is one in a model
    return (whole[start : start + CHUNK] for start in range(0, tensor.size, CHUNK))


def _difference(mine: Iterator[bytes], theirs: Iterator[bytes], tensor: Tensor) -> str | None:
    """Where two tensors differ first, and in how many bytes; `None` where they don't."""
    import numpy as np

    count, first, position = 0, None, 0
    for one, other in zip_longest(mine, theirs, fillvalue=b""):
        if one != other:
            if len(one) != len(other):
                return "has another length than the base's"
            differ = np.flatnonzero(np.frombuffer(one, np.uint8) != np.frombuffer(other, np.uint8))
            count += len(differ)
            first = position + int(differ[0]) if first is None else first
        position += len(one)
    if first is None:
        return None
    at = _element(first, tensor)
    return f"differs from the base's in {count:,} of {tensor.size:,} bytes, first in element {at}"


def _element(position: int, tensor: Tensor) -> str:
    elements = prod(tensor.shape)
    index = position * elements // tensor.size if tensor.size else 0
    found = []
    for length in reversed(tensor.shape):
        found.append(index % length)
        index //= length
    return str(found[::-1])


def _explained(
    header: Header, wrong: list[tuple[str, Tensor, str]], reference: Reference, kept: Sequence[int]
) -> dict[str, str]:
    """What is wrong with each tensor; of a layer that is another layer of the base, once for all of them."""
    by_layer: dict[tuple[str, int], list[tuple[str, Tensor, str]]] = {}
    found = {}
    for name, tensor, told in wrong:
        match = _LAYER.fullmatch(name)
        if match is None:
            found[name] = told
        else:
            by_layer.setdefault((match["prefix"], int(match["index"])), []).append((name, tensor, told))
    for (prefix, index), items in by_layer.items():
        other = _source_layer(header, prefix, items, reference.others)
        here = kept[index] if index < len(kept) else index
        for name, _, told in items:
            found[name] = told if other is None else f"is the base's layer {other}, in the place of layer {here}"
    return found


def _source_layer(
    header: Header, prefix: str, items: list[tuple[str, Tensor, str]], others: dict[str, Origin]
) -> int | None:
    """The layer of the base whose tensors these are, or `None`."""
    candidates: set[int] | None = None
    smallest = sorted(items, key=lambda item: item[1].size)
    for name, tensor, _ in {id(item): item for item in (*smallest[:_PROBES], smallest[-1])}.values():
        rest = _LAYER.fullmatch(name)["rest"]
        mine = _digest(_own(header.source, header, tensor))
        equal = set()
        for other, origin in others.items():
            match = _LAYER.fullmatch(other)
            if match is None or match["prefix"] != prefix or match["rest"] != rest:
                continue
            layer = int(match["index"])
            wanted = candidates is None or layer in candidates
            if wanted and same_make(origin.tensor, tensor) and _digest(stream(origin)) == mine:
                equal.add(layer)
        candidates = equal
        if not candidates:
            return None
    return min(candidates) if candidates else None


def _digest(parts: Iterator[bytes]) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def is_copy(name: str, reference: Reference) -> bool:
    """Whether a tensor outside the layers has the very bytes of another one, as a head that is tied to the embeddings."""
    origin = reference.tensors[name]
    mine = _digest(stream(origin))
    return any(
        _digest(stream(other)) == mine
        for other_name, other in reference.tensors.items()
        if other_name != name and same_make(other.tensor, origin.tensor) and not _LAYER.fullmatch(other_name)
    )


def by_layer(names: Collection[str]) -> list[str]:
    """Names of tensors, those of one layer together: `model.layers.3: mlp.down_proj.weight, ...`."""
    grouped: dict[str, list[str]] = {}
    for name in sorted(names, key=_order):
        match = _LAYER.fullmatch(name)
        key = f"{match['prefix']}{match['index']}" if match else name
        grouped.setdefault(key, []).extend([match["rest"]] if match else [])
    return [f"{key}: {', '.join(rest)}" if rest else key for key, rest in grouped.items()]


def _order(name: str) -> tuple[str, int, str]:
    match = _LAYER.fullmatch(name)
    return (match["prefix"], int(match["index"]), match["rest"]) if match else (name, -1, "")
