"""Damaged and hostile checkpoints: each ends in one clear error, whatever the header or the index claims."""

import json
import os
import struct
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from hf_layerprune.cut.disk import plan_cut
from hf_layerprune.cut.header import Tensor, read_header, write_header
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.errors import CheckpointError

from .cutting import cut_checkpoint
from .test_checkpoint import EMBED, NORM, layer, make, sharded


def read(raw: bytes):
    """The header of a file with this content."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "memory")
        path.write_bytes(raw)
        return read_header(path)


def packed(header, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(start: int, end: int, dtype: str = "U8", shape=None) -> dict:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


GOOD = {"__metadata__": {"format": "pt"}, "a": entry(0, 4), "b": entry(4, 12, "F32", [2])}
BAD = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "length 2^60": packed(GOOD, bytes(12), 1 << 60),
    "length beyond the file": packed(GOOD, b"", 500),
    "truncated data": packed(GOOD, bytes(11)),
    "data after the last tensor": packed(GOOD, bytes(13)),
    "garbage": packed(b"\xff\xfe\x00garbage"),
    "no object": packed(b"[1,2]"),
    "nothing": packed(b""),
    "duplicate key": packed(b'{"a":{"dtype":"U8","dtype":"I8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
    "duplicate metadata": packed(b'{"__metadata__":{},"__metadata__":{}}'),
    "metadata of numbers": packed({"__metadata__": {"format": 1}}),
    "half a character": packed(b'{"\\ud800":%s}' % json.dumps(entry(0, 4)).encode(), bytes(4)),
    "many nested arrays": packed(b'{"a":{"x":' + b"[" * 5_000_000),
    "overlap": packed({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "gap": packed({"a": entry(0, 4), "b": entry(5, 9)}, bytes(9)),
    "negative": packed({"a": {"dtype": "U8", "shape": [4], "data_offsets": [-4, 0]}}, bytes(4)),
    "wrong shape": packed({"a": entry(0, 4, shape=[5])}, bytes(4)),
    "huge shape": packed({"a": entry(0, 4, shape=[1 << 62] * 500)}, bytes(4)),
    "shape that wraps around": packed({"a": entry(0, 0, shape=[1 << 32, 1 << 32])}),
    "unknown dtype": packed({"a": entry(0, 4, "U9")}, bytes(4)),
    "three offsets": packed({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 4]}}, bytes(4)),
    "offsets of 5000 digits": packed(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,%s]}}' % (b"9" * 5000), bytes(4)),
    "missing field": packed({"a": {"dtype": "U8", "shape": [4]}}, bytes(4)),
    "half a byte": packed({"a": entry(0, 1, "F4", [1])}, bytes(1)),
    "tensor no object": packed({"a": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_one_clear_error(name):
    started = time.process_time()
    with pytest.raises(
        CheckpointError, match=r"memory is not a valid safetensors file: .*; download or save it again"
    ) as caught:
        read(BAD[name])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500
    assert time.process_time() - started < 2


def test_a_length_that_lies_is_refused_before_the_library_sees_it(tmp_path):
    path = tmp_path / "memory"
    for claimed in (1 << 60, 200_000_000):
        path.write_bytes(packed(GOOD, bytes(12), claimed))
        os.truncate(path, 1 << 40)  # a sparse file that is long enough
        with pytest.raises(CheckpointError, match=str(claimed)):
            read_header(path)


def test_a_good_header_is_read_whatever_its_spacing():
    for raw in (json.dumps(GOOD), json.dumps(GOOD, indent=4), json.dumps(GOOD, separators=(",", ":")) + " " * 50):
        header = read(packed(raw.encode(), bytes(12)))
        assert [tensor.name for tensor in header.tensors] == ["a", "b"]
        assert header.metadata == {"format": "pt"}
    assert read(packed(b"{}  ")).tensors == ()
    assert read(packed({"a": entry(0, 0, "F4", [0]), "b": entry(0, 1, "F4", [2])}, b"1")).tensors


WIDTHS = {"U8": 1, "I16": 2, "BF16": 2, "F32": 4, "I64": 8, "F8_E4M3": 1, "BOOL": 1}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_written_is_read_again_by_the_library_too(data):
    dtypes = st.sampled_from([*WIDTHS])
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
    tensors, position = [], 0
    for name in data.draw(st.lists(names, unique=True, max_size=6)):
        dtype, shape = data.draw(dtypes), tuple(data.draw(st.lists(st.integers(0, 4), max_size=3)))
        size = WIDTHS[dtype]
        for dim in shape:
            size *= dim
        tensors.append(Tensor(name, dtype, shape, position, position + size))
        position += size
    metadata = data.draw(st.none() | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text(
        st.characters(exclude_categories=["Cs"])), max_size=3))  # fmt: skip
    raw = write_header(tensors, metadata)
    assert len(raw) % 8 == 0
    raw += bytes(position)
    header = read(raw)
    assert sorted(header.tensors, key=lambda t: t.name) == sorted(tensors, key=lambda t: t.name)
    assert header.metadata == metadata
    assert load(raw).keys() == {tensor.name for tensor in tensors}


def accepted(raw: bytes) -> bool:
    """Read a header; whatever it is, only the one error may come out of it."""
    try:
        header = read(raw)
    except CheckpointError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert "\n" not in message
        return False
    position = 0
    for tensor in header.tensors:
        assert tensor.start == position
        position = tensor.end
    assert header.data_start + position == len(raw)
    return True


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([*WIDTHS]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {"dtype": st.sampled_from([*WIDTHS, "F4"]) | VALUES,
     "shape": st.lists(st.integers(-1, 9), max_size=3) | VALUES,
     "data_offsets": st.tuples(st.integers(-1, 40), st.integers(-1, 40)) | VALUES},
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_fail_cleanly(raw):
    accepted(raw)
    accepted(packed(raw))
    accepted(packed(b"{" + raw + b"}"))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=5) | st.just("__metadata__"), ENTRIES | VALUES, max_size=4), st.integers(0, 40)
)
def test_no_json_does_anything_but_fail_cleanly(header, size):
    accepted(packed(header, bytes(size)))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_good_file_with_bytes_changed_is_taken_only_if_the_library_takes_it(data):
    raw = bytearray(
        packed({"__metadata__": {"format": "pt"}, "a": entry(0, 4), "b": entry(4, 12, "F32", [2])}, bytes(12))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    if accepted(bytes(raw)):
        try:
            load(bytes(raw))
        except SafetensorError as error:
            # Ours reads a header key that it does not know as a tensor, and so does the library.
            raise AssertionError(f"taken here and refused there: {error}") from error


# --- indices and folders ----------------------------------------------------------------------------------------


def with_index(base: Path, change) -> Path:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    new = change(index)
    path.write_text(new if isinstance(new, str) else json.dumps(index if new is None else new))
    return base


def pointed(name: str, file):
    return lambda index: index["weight_map"].__setitem__(name, file)


Q1 = "model.layers.1.self_attn.q_proj.weight"
INDICES = {
    "up and away": (pointed(Q1, "../../x.safetensors"), "not a plain .safetensors file"),
    "absolute": (pointed(Q1, "/etc/x.safetensors"), "not a plain .safetensors file"),
    "in a folder": (pointed(Q1, "sub/x.safetensors"), "not a plain .safetensors file"),
    "by backslash": (pointed(Q1, "..\\x.safetensors"), "not a plain .safetensors file"),
    "with a nul": (pointed(Q1, "x\0.safetensors"), "not a plain .safetensors file"),
    "hidden": (pointed(Q1, ".x.safetensors"), "not a plain .safetensors file"),  # no hash covers it
    "very long": (pointed(Q1, "x" * 5000 + ".safetensors"), "not a plain .safetensors file"),
    "pickled": (pointed(Q1, "pytorch_model.bin"), "not a plain .safetensors file"),
    "missing shard": (pointed(Q1, "model-00009-of-00009.safetensors"), "does not exist"),
    "wrong shard": (pointed(Q1, "model-00001-of-00004.safetensors"), "is in model-00002.*places it in model-00001"),
    "no file name": (pointed(Q1, 5), "not a file name"),
    "tensor that no shard has": (pointed("x", "model-00001-of-00004.safetensors"), "places tensor 'x'.*which lacks it"),
    "tensor not listed": (lambda index: index["weight_map"].pop(Q1) and None, "does not list it"),
    "no map": (lambda index: {"metadata": {}}, "has no weight_map"),
    "empty map": (lambda index: {"weight_map": {}}, "has no weight_map"),
    "map a list": (lambda index: {"weight_map": [1]}, "has no weight_map"),
    "a list": (lambda index: [], "where a JSON object is expected"),
    "metadata a text": (lambda index: index | {"metadata": "x"}, "metadata is not a JSON object"),
    "duplicate keys": (lambda index: '{"weight_map": {}, "weight_map": {}}', "is repeated"),
}  # fmt: skip


def refused(base: Path, match: str) -> None:
    everything = sorted(base.parent.rglob("*"))
    with pytest.raises(CheckpointError, match=match) as caught:
        cut_checkpoint(base, base.parent / "cut", [1])
    assert "\n" not in str(caught.value)
    assert sorted(base.parent.rglob("*")) == everything


@pytest.mark.parametrize("name", INDICES)
def test_a_bad_index_is_one_clear_error(tmp_path, name):
    change, match = INDICES[name]
    refused(with_index(sharded(tmp_path / "base"), change), match)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    base = sharded(tmp_path / "base")
    first, second = ((base / f"model-0000{i}-of-00004.safetensors") for i in (1, 2))
    raw = second.read_bytes()
    first.write_bytes(raw)
    refused(base, "is in model-00001.*places it in model-00002")
    with_index(base, lambda index: index["weight_map"].update(dict.fromkeys(layer(1), first.name)) or ([
        index["weight_map"].pop(name) for name in (*EMBED, *layer(0))] and None))  # fmt: skip
    with_index(base, lambda index: index["weight_map"].update({"x": second.name}))
    refused(base, "is in both model-00001.* and model-00002")


def test_another_value_of_a_tensor_in_a_second_shard_is_not_passed_over(tmp_path):
    """transformers takes the last of them, the index names one."""
    base = sharded(tmp_path / "base")
    last = base / "model-00004-of-00004.safetensors"
    save_file(load_file(last) | {name: -tensor for name, tensor in EMBED.items()}, last)
    for read in (plan_cut, load_pruned):
        with pytest.raises(
            CheckpointError, match=r"embed_tokens.* is in (both|model-00004.*places it in) model-00001"
        ):
            read(base, [1])


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    """transformers would load the base that the adapter names, and not the weights of this folder."""
    base = sharded(tmp_path / "base")
    (base / "adapter_config.json").write_text('{"base_model_name_or_path": "org/other"}')
    refused(base, "holds adapter_config.json beside config.json, and loaders would apply the adapter")


def test_two_sets_of_weights_are_refused(tmp_path):
    base = sharded(tmp_path / "base")
    make(base, [EMBED | layer(0)])
    refused(base, "holds both model.safetensors and model.safetensors.index.json")


def test_two_tensors_for_one_name_are_refused(tmp_path):
    twin = {name.replace("layers.2.", "layers.02."): tensor for name, tensor in layer(2).items()}
    refused(
        make(tmp_path / "base", [EMBED | layer(0) | layer(1) | layer(2) | layer(3) | twin]), "no plain layer index"
    )


def test_pickled_weights_are_never_opened(tmp_path):
    base = tmp_path / "base"
    make(base, [NORM])
    (base / "model.safetensors").unlink()
    refused(base, "holds neither model.safetensors nor")
    (base / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    refused(base, "only pickled weights .*convert them to safetensors first")


def test_things_that_are_no_files_are_refused(tmp_path):
    base = sharded(tmp_path / "base")
    shard = base / "model-00002-of-00004.safetensors"
    shard.unlink()
    refused(base, "does not exist")
    shard.mkdir()
    refused(base, "is not a file")
    shard.rmdir()
    os.mkfifo(shard)
    refused(base, "is not a file")
    shard.unlink()
    shard.symlink_to("nowhere")
    refused(base, "is not a file")
    shard.unlink()
    shard.symlink_to(shard.name)
    refused(base, r"is not a file|could not read|does not exist")
    shard.unlink()
    shard.symlink_to("/dev/zero")
    refused(base, "is not a file")
    for missing in (tmp_path / "none", base / "config.json"):
        with pytest.raises(CheckpointError, match="is not a folder"):
            plan_cut(missing, [1])
    (base / "config.json").unlink()
    refused(base, "config.json does not exist")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"model_type": "llama"', "[" * 100_000, "null", '{"model_type": 5}', "{}"]
)
def test_a_bad_config_is_one_clear_error(tmp_path, text):
    base = sharded(tmp_path / "base")
    (base / "config.json").write_text(text)
    refused(base, "config")


def test_every_truncation_of_a_shard_is_noticed(tmp_path):
    base = sharded(tmp_path / "base")
    shard = base / "model-00003-of-00004.safetensors"
    raw = shard.read_bytes()
    for size in (0, 7, 8, 100, len(raw) // 2, len(raw) - 1):
        shard.write_bytes(raw[:size])
        refused(base, "model-00003-of-00004.safetensors is not a valid safetensors file")
