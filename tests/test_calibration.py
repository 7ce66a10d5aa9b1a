"""Calibration sets: files, data sets on the Hub, and text that a model writes itself."""

from __future__ import annotations

import json
import ntpath
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, strategies as st
from transformers import AutoModelForCausalLM

from hf_layerprune import CheckpointError, CutError, LayerPruneError, rank_layers
from hf_layerprune.calibration.documents import check_source, read_documents, split_source
from hf_layerprune.calibration.rows import CalibrationSet, check_vocabulary, load_calibration
from hf_layerprune.calibration.self_text import generate_text
from hf_layerprune.heal.data import load_rows
from hf_layerprune.measure.texts import find_text
from hf_layerprune.runtime.windows import max_positions

from .measure_models import byte_tokenizer, write_model
from .tiny_models import tiny_model

TEXT = "".join(f"Line {i} of a running text.\n" for i in range(200))
EOS = 2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def test_a_running_text_is_cut_into_rows(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT)
    found = load_calibration(str(path), tokenizer, samples=8, length=64, seed=1)
    whole = tokenizer(TEXT).input_ids
    windows = [whole[start : start + 64] for start in range(0, len(whole), 64)]
    assert found.input_ids.shape == (8, 64)
    positions = [windows.index(row) for row in found.input_ids.tolist()]
    assert positions == sorted(set(positions))
    assert positions != list(range(8)), "rows are drawn from the whole text"
    assert found.record() == {
        "source": path.name, "samples": 8, "length": 64, "seed": 1, "fingerprint": found.fingerprint,
    }  # fmt: skip
    again = load_calibration(str(path), tokenizer, samples=8, length=64, seed=1)
    other = load_calibration(str(path), tokenizer, samples=8, length=64, seed=2)
    assert again.fingerprint == found.fingerprint != other.fingerprint


def test_rows_begin_as_the_tokenizer_does(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(TEXT)
    found = load_calibration(str(path), byte_tokenizer(bos=True), samples=8, length=65, seed=1).input_ids
    assert set(found[:, 0].tolist()) == {1}
    without = load_calibration(str(path), byte_tokenizer(), samples=8, length=64, seed=1).input_ids
    assert found[:, 1:].equal(without)


def test_a_byte_order_mark_is_no_text(tokenizer: Any, tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(200))
    for name, encoding in (("a.txt", "utf-8"), ("b.txt", "utf-8-sig")):
        (tmp_path / name).write_text(text, encoding=encoding)
    one, two = (load_calibration(str(tmp_path / name), tokenizer, samples=9, length=64) for name in ("a.txt", "b.txt"))
    assert one.fingerprint == two.fingerprint


@pytest.mark.parametrize("kind", ["jsonl", "json", "ndjson", "JSONL"])
def test_documents_are_joined(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / f"rows.{kind}"
    rows = [{"text": "no", "output": f"answer number {i}"} for i in range(100)]
    path.write_text(json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows))
    found = load_calibration(f"{path}:output", tokenizer, samples=4, length=80)
    documents = {f"answer number {i}" for i in range(100)}
    for row in found.input_ids.tolist():
        whole = tokenizer.decode(row).split("</s>")[1:-1]
        assert len(whole) >= 3
        assert set(whole) <= documents
    assert load_calibration(str(path), tokenizer, samples=1, length=80).input_ids.shape == (1, 80)


def test_chats(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(20)))
    talker = byte_tokenizer()
    talker.chat_template = {"rag": "{{ messages }}"}
    for other in (tokenizer, talker):
        with pytest.raises(CheckpointError, match="no chat template"):
            load_calibration(f"{path}:messages", other, samples=1, length=20)
    talker.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}{% endfor %}"
    found = load_calibration(f"{path}:messages", talker, samples=1, length=64)
    assert "<s>user: hello<s>assistant: good day<s>user" in talker.decode(found.input_ids[0])


@given(st.integers(2, 40), st.integers(1, 9), st.floats(0.01, 0.99))
def test_split_and_batches(rows: int, size: int, held_out: float) -> None:
    found = CalibrationSet.from_ids(torch.arange(rows * 3).view(rows, 3), "numbers")
    rest, held = found.split(held_out)
    assert torch.equal(torch.cat([rest.input_ids, held.input_ids]), found.input_ids)
    assert len(rest) >= 1
    assert len(held) >= 1
    assert rest.fingerprint != held.fingerprint
    assert torch.equal(torch.cat([ids for ids, _ in found.batches(size)]), found.input_ids)
    assert max(len(ids) for ids, _ in found.batches(size)) <= size


def test_fingerprint_is_of_tokens_and_shape() -> None:
    ids = torch.arange(12)
    one, two = CalibrationSet.from_ids(ids.view(3, 4), "a"), CalibrationSet.from_ids(ids.view(4, 3), "a")
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == CalibrationSet.from_ids(ids.view(3, 4).to(torch.int32), "b").fingerprint
    with pytest.raises(CutError, match="one calibration row"):
        CalibrationSet.from_ids(ids[None], "a").split(0.5)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "too short: 0 tokens"),
        ("a.txt", b" \n\n ", "too short: 0 tokens"),
        ("a.txt", b"\x89PNG\r\n\x1a\n\xff\xd8", "is not UTF-8"),
        ("a.txt", b"text\0text" * 90, "is binary"),
        ("a.bin", b"\xff\xfe\x00", "is not UTF-8"),
        ("a.txt", b"short", "too short: 6 tokens make 0 rows of 64"),
        ("a.txt", b"x" * 200, "tokens make 3 rows of 64, not 5; use a smaller"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("a.jsonl", b'{"body": "a", "title": "b"}\n', "has no text in 'text', only body, title"),
        ("a.jsonl", b"[1]\n", "only a number"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "only a list"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}', "too short"),
        ("a.json", b"", "too short: 0 tokens"),
        ("a.jsonl", b'{"text": " "}\n' * 900, "too short: 0 tokens"),
        ("a.jsonl", b'{"text": null}\n', "has no text in 'text', but null"),
        ("a.md:text", b"text" * 900, "is read as one text, without columns; omit :text"),
        ("a.json", b'[{"text": "a"}, 3]', "row 2 has no text in 'text', only a number"),
    ],
)
def test_bad_files(name: str, content: bytes, message: str, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / name.partition(":")[0]).write_bytes(content)
    with pytest.raises(LayerPruneError, match=message):
        load_calibration(str(tmp_path / name), tokenizer, samples=5, length=64)


def test_bad_settings(tokenizer: Any, model: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.txt does not exist"):
        load_calibration(str(tmp_path / "nothing.txt"), tokenizer)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_calibration("./no/such/folder", tokenizer)
    with pytest.raises(CutError, match="pass the model"):
        load_calibration("self", tokenizer)
    with pytest.raises(CutError, match="more than the 512 positions"):
        load_calibration("self", tokenizer, model=model, length=513)
    with pytest.raises(CutError, match="self_length=513 is more than the 512 positions"):
        generate_text(model, tokenizer, 1, 513, 0)


def test_tokens_of_another_model(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("zebra " * 100)
    with pytest.raises(CheckpointError, match="vocabulary ends at 127"):
        load_calibration(str(tmp_path / "a.txt"), tokenizer, samples=1, length=20, model=tiny_model("llama"))
    check_vocabulary(CalibrationSet.from_ids(torch.full((1, 4), 127), "last"), tiny_model("llama"))


# --- text that the model writes itself ------------------------------------------------------------------


def test_a_model_writes(model: Any, tokenizer: Any) -> None:
    model.model.layers[0].train()
    habits, modes = model.generation_config, [module.training for module in model.modules()]
    state = torch.random.get_rng_state()
    found = load_calibration("self", tokenizer, samples=6, length=24, seed=3, model=model)
    assert found.input_ids.shape == (6, 24)
    assert (found.input_ids[:, 0] == 1).all(), "a text begins with the token that begins texts"
    assert len({tuple(row) for row in found.input_ids.tolist()}) == 6
    assert (
        load_calibration("self", tokenizer, samples=6, length=24, seed=3, model=model).fingerprint == found.fingerprint
    )
    assert (
        load_calibration("self", tokenizer, samples=6, length=24, seed=4, model=model).fingerprint != found.fingerprint
    )
    assert model.generation_config is habits
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", ["pegasus", "roc_bert", "gemma4_text"])
def test_a_config_without_special_tokens_or_with_layers_of_several_sizes(model_type: str) -> None:
    assert generate_text(tiny_model(model_type), None, 2, 8, 0).shape == (2, 8)


@pytest.mark.parametrize("model_type", ["whisper", "roberta", "xmod", "gpt2"])
def test_rows_as_long_as_the_context(model_type: str) -> None:
    """Whisper names the field otherwise, and RoBERTa counts positions from behind the padding token's id."""
    model = tiny_model(model_type)
    most = max_positions(model.config)
    assert most is not None
    model(torch.full((1, most), 5), use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, most + 1), 5), use_cache=False)
    assert generate_text(model, None, 1, most, 0).shape == (1, most)
    with pytest.raises(CutError, match=f"more than the {most} positions"):
        generate_text(model, None, 1, most + 1, 0)


def test_batch_size_does_not_matter(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = generate_text(model, tokenizer, 5, 20, 0)
    monkeypatch.setattr("hf_layerprune.calibration.self_text._MAX_ROWS", 2)
    assert torch.equal(generate_text(model, tokenizer, 5, 20, 0), found)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2", "qwen3_moe", "mamba2", "janus"])
def test_what_is_written_follows_the_models_distribution(model_type: str) -> None:
    """Decoded with a cache and our attention; judged by one plain forward pass over what was written.

    Janus has a `generate` of its own.
    """
    model = tiny_model(model_type)
    if model_type in ("llama", "qwen3_moe"):
        model.set_attn_implementation("sdpa")
    rows = generate_text(model, None, 48, 12, 0)
    draws = torch.rand(48, 11, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cumulative = model(rows, use_cache=False).logits[:, :-1].float().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, draws[..., None] * cumulative[..., -1:])[..., 0]
    # A draw on the edge between two tokens may fall either way.
    assert (expected == rows[:, 1:]).float().mean() > 0.99


def test_an_end_of_text_does_not_end_a_row(model: Any) -> None:
    rows = generate_text(model, None, 64, 64, 0)
    assert ((rows[:, 1:-1] == EOS).sum(1) > 0).any()
    assert (rows[:, 1:] != 0).float().mean() > 0.9, "nothing is padding"


def test_a_chat_begins_with_an_empty_turn(model: Any) -> None:
    talker = byte_tokenizer()
    talker.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    rows = generate_text(model, talker, 3, 16, 0)
    assert all(talker.decode(row).startswith("<s>user: ") for row in rows)


def test_padding_of_the_vocabulary_is_not_written(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "wide", vocabulary=300))
    assert generate_text(model, byte_tokenizer(), 32, 32, 0).max() < 259
    assert generate_text(model, None, 32, 32, 0).max() >= 259


# --- folders --------------------------------------------------------------------------------------------


def test_a_folder(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": f"train {i}"}) + "\n" for i in range(60)))
    found = load_calibration(str(tmp_path), tokenizer, samples=2, length=32)
    assert "train " in tokenizer.decode(found.input_ids[0])
    with pytest.raises(CheckpointError, match="has no split 'test'; it has train"):
        load_calibration(f"{tmp_path}:test", tokenizer, samples=2, length=32)
    (tmp_path / "train.jsonl").write_text('null\n{"text": "a"}\n')
    with pytest.raises(CheckpointError, match=r"train\.jsonl, line 1 is null"):
        load_calibration(str(tmp_path), tokenizer, samples=2, length=32)


def test_a_model_is_no_text(tmp_path: Path) -> None:
    folder = str(write_model(tmp_path / "model"))
    refused = pytest.raises(CheckpointError, match="is a model folder; specify a data set, or a file with text")
    with refused:
        next(read_documents(folder, seed=0))
    with refused:
        load_rows(folder)


def test_files_and_folders_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those whose name is a pattern, has spaces, or has the mark of a configuration."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, text in (("set/train.parquet", "one"), ("a[1]@b.parquet", "two"), ("a1@b.parquet", "three")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Dataset.from_list([{"text": text, "a:b": f"{text} more"}]).to_parquet(tmp_path / name)
    for name in ("set@1", "set[1]", "set1", "my set"):
        shutil.copytree(tmp_path / "set", tmp_path / name)
    for source, text in (
        ("~/set", "one"), ("~/set:train:a:b", "one more"), ("~/a[1]@b.parquet", "two"), ("~/a[1]@b.parquet:a:b", "two more"),
        ("~/set@1", "one"), ("~/set@default", "one"), ("~/s*/train.parquet", "one"),
        ("~/my set", "one"), ("~/my set@default", "one"), ("~/my s*/train.parquet", "one"),
    ):  # fmt: skip
        check_source(source)
        assert {document.text for document in read_documents(source, 0)} == {text}
    for read in (lambda source: list(read_documents(source, 0)), load_rows):
        with pytest.raises(CheckpointError, match="rename the folder"):
            read("~/set[1]")  # in place of which `datasets` would read set1
    with pytest.raises(CheckpointError, match="~nobody-here/x does not exist"):
        check_source("~nobody-here/x")


@pytest.mark.parametrize("text", ["the text itself " * 60, "the text itself"])
def test_a_text_in_place_of_its_file_is_told(base: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=r"calibration file the text itself.* does not exist; specify a"):
        rank_layers(str(base), criteria="kl", calibration=text)
    with pytest.raises(CutError, match=r"text the text itself.* is not a file; specify one"):
        find_text(text)


def test_a_model_in_memory_in_place_of_its_name_is_told() -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(CutError, match=r"base=.*must be a Hub id or a path; save a model that is in memory first"):
        rank_layers(model)


def test_a_colon_after_a_drive_is_part_of_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.splitdrive", ntpath.splitdrive)
    for source, name, part in (
        (r"C:\data\x.jsonl", r"C:\data\x.jsonl", ""), ("C:/x.jsonl:a:b", "C:/x.jsonl", "a:b"),
        (r"\\server\share\x.txt", r"\\server\share\x.txt", ""), ("org/rows@en:train:text", "org/rows@en", "train:text"),
    ):  # fmt: skip
        assert split_source(source) == (name, part)
    with pytest.raises(CheckpointError, match=r"calibration file C:/none\.jsonl does not exist"):
        check_source("C:/none.jsonl")


def test_a_file_larger_than_memory_is_refused_before_it_is_read(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "web.txt"
    with path.open("wb") as file:
        file.truncate(6 << 30)  # sparse
    with pytest.raises(CheckpointError, match=r"web\.txt"):
        load_calibration(str(path), tokenizer, samples=2, length=8)


@pytest.mark.parametrize("source", ["/home/alice/rows.jsonl:text", "org/rows:train:text", "self"])
def test_the_record_reveals_no_path(source: str) -> None:
    record = CalibrationSet.from_ids(torch.zeros(2, 4, dtype=torch.long), source).record()
    assert record["source"] == source.removeprefix("/home/alice/")
