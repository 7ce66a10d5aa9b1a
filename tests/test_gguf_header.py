"""Hostile and damaged GGUF files: each is one clear error, at once, whatever the header claims."""

import os
import re
import struct
import tempfile
import time
from pathlib import Path

import pytest
from gguf.constants import MODEL_ARCH_NAMES
from hypothesis import HealthCheck, example, given, settings, strategies as st

from hf_layerprune.cut.gguf import cut_gguf, gguf_layer_count, is_gguf, plan_gguf_cut
from hf_layerprune.errors import CheckpointError
from hf_layerprune.families import gguf as tables
from hf_layerprune.runtime.loading import load_base, load_config, load_tokenizer
from tests.gguf_makers import ARCH_KEY, COUNT_KEY, make_gguf, number, raw_gguf, raw_info, raw_string, smollm2, value

HUGE = 1 << 60
GOOD_KEYS = (ARCH_KEY, COUNT_KEY)
GOOD_INFOS = (raw_info("blk.0.w"), raw_info("blk.1.w", offset=32))
DATA = bytes(64)


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def key(name: str, kind: int, payload: bytes) -> bytes:
    return raw_string(name) + u32(kind) + payload


def with_key(*extra: bytes, **counts: int) -> bytes:
    return raw_gguf([*GOOD_KEYS, *extra], GOOD_INFOS, DATA, **counts)


def with_infos(*infos: bytes, **counts: int) -> bytes:
    return raw_gguf(GOOD_KEYS, infos, DATA, **counts)


def test_the_hand_made_file_is_good(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(with_key())
    assert gguf_layer_count(path) == 2
    cut_gguf(path, tmp_path / "b.gguf", [0])
    assert gguf_layer_count(tmp_path / "b.gguf") == 1


def empty(name: str) -> bytes:
    """The entry of a tensor without values, after those of `GOOD_INFOS`."""
    return raw_info(name, (0,), offset=64)


def unreadable(why: str) -> str:
    return re.escape(f"it can't be read ({why}); it is truncated or damaged, so download it again") + "$"


def beyond(length: int, at: int, size: int) -> str:
    """It claims `length` bytes from byte `at` of a file of `size`."""
    return unreadable(
        f"its header claims {length} bytes from byte {at}, but the file has {size}, and a header at most 268435456"
    )


ENDS = "its tensors extend beyond byte {}, where the file ends"
HOSTILE = {
    "empty": (b"", "not a GGUF file"),
    "bad magic": (b"GGML" + with_key()[4:], "not a GGUF file"),
    "version 1": (raw_gguf(GOOD_KEYS, GOOD_INFOS, DATA, version=1), "version 1 is not supported"),
    "version 0": (raw_gguf(GOOD_KEYS, GOOD_INFOS, DATA, version=0), "version 0 is not supported"),
    "version 99": (raw_gguf(GOOD_KEYS, GOOD_INFOS, DATA, version=99), "version 99 is not supported"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 2, 2) + bytes(99), "version 50331648 is not"),
    "only the magic": (b"GGUF", "file ends at byte 4"),
    "no counts": (with_key()[:12], "file ends at byte 12"),
    "cut in the keys": (with_key()[:70], beyond(8, 69, 70)),
    "cut in the tensor list": (with_key()[:150], beyond(7, 149, 150)),
    "cut in the data": (with_key()[:-1], unreadable(ENDS.format(255))),
    "no data at all": (with_key()[:-64], unreadable(ENDS.format(192))),
    "2^60 keys": (with_key(key_count=HUGE), f"claims 2 tensors and {HUGE} metadata keys"),
    "2^60 tensors": (with_key(tensor_count=HUGE), f"claims {HUGE} tensors"),
    "more keys than there are": (with_key(key_count=50), unreadable("a metadata key is empty")),
    "more tensors than there are": (with_key(tensor_count=50), beyond(8, 252, 256)),
    "2^60 byte key name": (raw_gguf([u64(HUGE)], (), bytes(99)), beyond(HUGE, 32, 131)),
    "2^60 byte string": (with_key(key("general.name", 8, u64(HUGE))), beyond(HUGE, 134, 288)),
    "2^60 strings": (with_key(key("tokenizer.x", 9, u32(8) + u64(HUGE))), f"claims {HUGE} strings"),
    "2^22 strings": (with_key(key("tokenizer.x", 9, u32(8) + u64(1 << 22))), beyond((1 << 35) + 1, 160, 288)),
    "2^60 byte item": (with_key(key("tokenizer.x", 9, u32(8) + u64(1, HUGE))), beyond(HUGE, 145, 288)),
    "2^60 numbers": (with_key(key("tokenizer.x", 9, u32(4) + u64(HUGE))), beyond(4 * HUGE, 137, 288)),
    "nested arrays": (
        with_key(key("x", 9, u32(9) + u64(1) + u32(4) + u64(0))),
        unreadable("'x' is of the unknown type 9"),
    ),
    "unknown value type": (with_key(key("x", 77, b"")), unreadable("'x' is of the unknown type 77")),
    "unknown item type": (with_key(key("x", 9, u32(77) + u64(1))), unreadable("'x' is of the unknown type 77")),
    "name of no text": (
        with_key(raw_string(b"\xff\xfe") + u32(0) + b"\0"),
        unreadable("'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
    ),
    "empty key": (with_key(key("", 0, b"\0")), unreadable("a metadata key is empty")),
    "key twice": (with_key(key("x", 0, b"\0"), key("x", 0, b"\1")), unreadable("it has a key or a tensor twice")),
    "alignment 0": (with_key(key("general.alignment", 4, u32(0))), unreadable("general.alignment is 0")),
    "alignment 33": (with_key(key("general.alignment", 4, u32(33))), unreadable("general.alignment is 33")),
    "alignment 2^31": (
        with_key(key("general.alignment", 4, u32(1 << 31))),
        unreadable(f"general.alignment is {1 << 31}"),
    ),
    "alignment as text": (
        with_key(key("general.alignment", 8, raw_string("32"))),
        unreadable("unpack requires a buffer of 4 bytes"),
    ),
    "no architecture": (raw_gguf([COUNT_KEY], GOOD_INFOS, DATA), "general.architecture is missing"),
    "architecture a number": (raw_gguf([key("general.architecture", 4, u32(1))], (), b""), "architecture is missing"),
    "not a model": (with_key(key("general.type", 8, raw_string("adapter"))), "general.type is 'adapter'"),
    "no block_count": (raw_gguf([ARCH_KEY], GOOD_INFOS, DATA), "llama.block_count is missing"),
    "block_count 0": (raw_gguf([ARCH_KEY, key("llama.block_count", 4, u32(0))], (), b""), "llama.block_count is 0"),
    "block_count -1": (raw_gguf([ARCH_KEY, key("llama.block_count", 5, b"\xff" * 4)], (), b""), "cannot be negative"),
    "block_count 2^60": (raw_gguf([ARCH_KEY, key("llama.block_count", 10, u64(HUGE))], (), b""), "only 1..1000"),
    "block_count 1.5": (raw_gguf([ARCH_KEY, key("llama.block_count", 6, b"\0\0\xc0?")], (), b""), "one whole number"),
    "block_count an array": (
        raw_gguf([ARCH_KEY, key("llama.block_count", 9, u32(4) + u64(1) + u32(2))], (), b""),
        "one whole number",
    ),
    "too many dimensions": (with_infos(raw_info("blk.0.w", (1,) * 5)), "has 5 dimensions"),
    "2^60 values": (with_infos(raw_info("blk.0.w", (HUGE,))), unreadable(ENDS.format(224))),
    "2^256 values": (with_infos(raw_info("blk.0.w", (2**64 - 1,) * 4)), unreadable(ENDS.format(256))),
    "negative size": (with_infos(raw_info("blk.0.w", (2**64 - 8,))), unreadable(ENDS.format(224))),
    "offset past the end": (
        with_infos(raw_info("blk.0.w", offset=HUGE)),
        unreadable("tensor 'blk.0.w' does not follow the one before it"),
    ),
    "negative offset": (with_infos(raw_info("blk.0.w", offset=2**64 - 32)), "does not follow the one before"),
    "offset not aligned": (with_infos(raw_info("blk.0.w", offset=8)), "does not follow the one before"),
    "overlap": (
        with_infos(raw_info("blk.0.w", (16,)), raw_info("blk.1.w", offset=32)),
        "'blk.1.w' does not follow the one before",
    ),
    "same place": (with_infos(raw_info("blk.0.w"), raw_info("blk.1.w")), "'blk.1.w' does not follow the one before"),
    "unknown ggml type": (
        with_infos(raw_info("blk.0.w", kind=4)),
        unreadable("4 is not a valid GGMLQuantizationType"),
    ),
    "half a block": (
        with_infos(raw_info("blk.0.w", (16,), kind=2)),
        unreadable("tensor 'blk.0.w' ends inside a block of 32 values"),
    ),
    "tensor twice": (
        with_infos(raw_info("blk.0.w"), raw_info("blk.0.w", offset=32)),
        unreadable("it has a key or a tensor twice"),
    ),
    "2^60 byte tensor name": (with_infos(u64(HUGE)), beyond(HUGE, 110, 192)),
    "beyond block_count": (with_infos(*GOOD_INFOS, empty("blk.2.w")), "beyond llama.block_count = 2"),
    "huge layer number": (with_infos(*GOOD_INFOS, empty(f"blk.{10**30}.w")), "not like a decoder layer's"),
    "layer x": (with_infos(*GOOD_INFOS, empty("blk.x.w")), "'blk.x.w' is numbered, but not like"),
    "layer 01": (with_infos(*GOOD_INFOS, empty("blk.01.w")), "'blk.01.w' is numbered, but not like"),
    "layer -1": (with_infos(*GOOD_INFOS, empty("blk.-1.w")), "'blk.-1.w' is numbered, but not like"),
    "no layer": (with_infos(*GOOD_INFOS, empty("blk.w")), "'blk.w' is numbered, but not like"),
    "text to upset a terminal": (
        with_infos(*GOOD_INFOS, empty("blk.\x1b[2J\n.0.w" + "x" * 50)),
        r"'blk.\\x1b\[2J\\n.0.w",
    ),
    "encoder": (with_infos(*GOOD_INFOS, empty("enc.blk.0.w")), "'enc.blk.0.w' is numbered"),
    "other stack": (with_infos(*GOOD_INFOS, empty("posnet.0.w")), "'posnet.0.w' is numbered"),
    "missing layer": (with_infos(GOOD_INFOS[0]), "layer 1 has no tensors, though llama.block_count is 2"),
    "no tensors": (with_infos(), "layer 0 has no tensors"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_one_clear_error_at_once(tmp_path, name):
    content, match = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(CheckpointError, match=match) as caught:
        cut_gguf(path, tmp_path / "cut.gguf", [0])
    assert time.process_time() - started < 5
    assert str(caught.value).isprintable()
    assert str(path) in str(caught.value)
    assert os.listdir(tmp_path) == ["bad.gguf"]


def test_a_huge_file_of_zeros_does_not_hang(tmp_path):
    path = tmp_path / "zeros.gguf"
    path.write_bytes(raw_gguf([key("tokenizer.x", 9, u32(8) + u64((1 << 21) - 1))]))
    os.truncate(path, 1 << 33)
    started = time.process_time()
    with pytest.raises(CheckpointError):
        gguf_layer_count(path)
    assert time.process_time() - started < 10


def test_a_header_is_bounded_as_a_whole(tmp_path):
    path, half = tmp_path / "arrays.gguf", (1 << 27) + 1
    with path.open("wb") as file:
        file.write(b"GGUF" + u32(3) + u64(0, 2) + key("a", 9, u32(0) + u64(half)))
        file.seek(half, os.SEEK_CUR)
        file.write(key("b", 9, u32(0) + u64(half)))
        file.truncate(1 << 30)
    with pytest.raises(CheckpointError, match="and a header at most 268435456"):
        gguf_layer_count(path)


@pytest.mark.parametrize("name", ["block_count 0", "block_count 2^60", "2^60 strings", "overlap"])
def test_a_file_is_checked_before_transformers_reads_it(tmp_path, name):
    content, match = HOSTILE[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    for load in (load_config, load_base, load_tokenizer):
        with pytest.raises(CheckpointError, match=match):
            load(path)


FUZZ_BASE = with_key(
    key("general.type", 8, raw_string("model")),
    key("llama.attention.head_count", 9, u32(4) + u64(2) + u32(8, 8)),
    key("llama.leading_dense_block_count", 10, u64(1)),
    key("tokenizer.ggml.tokens", 9, u32(8) + u64(3) + raw_string("a") + raw_string("") + raw_string("bc")),
)


@given(st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_change_to_a_header_gets_past_the_checks_as_another_error(data):
    damaged = bytearray(FUZZ_BASE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        new = data.draw(st.one_of(st.binary(max_size=12), st.sampled_from([u64(HUGE), u64(2**64 - 1), u32(9), b""])))
        width = data.draw(st.sampled_from([0, 1, len(new)]))
        damaged[at : at + width] = new
        if not damaged:
            break
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "a.gguf"), Path(folder, "b.gguf")
        source.write_bytes(damaged)
        started = time.process_time()
        try:
            plan = cut_gguf(source, target, [1])
        except CheckpointError:
            assert os.listdir(folder) == ["a.gguf"]
        else:
            # Whatever was accepted must come out as a file that is accepted too.
            assert target.stat().st_size == plan.target_bytes
            assert gguf_layer_count(target) == plan.cut.num_layers - 1
        assert time.process_time() - started < 5


@given(st.binary(max_size=400))
@example(b"GGUF")
@settings(max_examples=200, deadline=None)
def test_no_bytes_at_all_get_past_the_checks_as_another_error(content):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.gguf")
        path.write_bytes(b"GGUF" + u32(3) + content)
        with pytest.raises(CheckpointError):
            plan_gguf_cut(path, [0])


def test_every_cut_short_of_the_real_header_is_refused(tmp_path):
    # 25 lengths over the header, which is 1.8 MB of a 98 MB file.
    with open(smollm2(), "rb") as file:
        header = file.read(1_785_664)
    path = tmp_path / "short.gguf"
    for length in range(0, len(header) + 1, 71_424):
        path.write_bytes(header[:length])
        with pytest.raises(CheckpointError):
            gguf_layer_count(path)


def test_a_layer_that_only_predicts_further_tokens_may_be_missing(tmp_path):
    path = make_gguf(
        tmp_path / "a.gguf", "glm4moe", 3, number("glm4moe.nextn_predict_layers", 1), None, 3, layer_names=["0", "1"]
    )
    for layer, left in ((1, 1), (2, 0)):
        cut_gguf(path, tmp_path / "cut.gguf", [layer], force=True)
        found = [value(tmp_path / "cut.gguf", f"glm4moe.{key}") for key in ("block_count", "nextn_predict_layers")]
        assert found == [2, left]


def test_is_gguf_looks_at_the_first_bytes(tmp_path):
    assert is_gguf(smollm2())
    (tmp_path / "a.gguf").write_bytes(b"PK\3\4")
    (tmp_path / "b.bin").write_bytes(b"GGUF")
    assert not is_gguf(tmp_path / "a.gguf")
    assert is_gguf(tmp_path / "b.bin")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "none")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert not is_gguf(tmp_path / "pipe")
        with pytest.raises(CheckpointError, match="is not a file"):
            plan_gguf_cut(tmp_path / "pipe", [0])


def test_the_tables_fit_each_other_and_the_installed_gguf():
    kinds = [tables.PER_LAYER, tables.PERIODS - tables.PER_LAYER, tables.ARRAYS, tables.SCALARS]
    assert len(set().union(*kinds)) == sum(map(len, kinds)), "a key is in two tables"
    assert tables.FIRST_SIZES_ALL | tables.TWO_KINDS <= tables.PER_LAYER
    assert set(tables.ARCHITECTURES) <= set(MODEL_ARCH_NAMES.values())
