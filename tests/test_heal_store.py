"""States of rows on disk."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_layerprune.errors import CheckpointError
from hf_layerprune.heal.store import Column, StateStore, fill, hash_rows, hash_tensors

WIDTH = 3


def column(source: str = "weights", name: str = "prefix", dtype: torch.dtype = torch.float32) -> Column:
    return Column(name, WIDTH, dtype, source)


def states_of(row: int, length: int) -> torch.Tensor:
    return torch.arange(length * WIDTH, dtype=torch.float32).view(length, WIDTH) + 1000 * row


def filled(store: StateStore, lengths: list[int], max_tokens: int = 8) -> list[list[int]]:
    batches: list[list[int]] = []

    def run(rows: list[int]) -> dict[str, list[torch.Tensor]]:
        batches.append(rows)
        return {"prefix": [states_of(row, lengths[row]) for row in rows]}

    fill(store, ["prefix"], store.missing("prefix"), run, max_tokens, "test", show=False)
    return batches


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 30),
    max_tokens=st.integers(1, 30),
    data=st.data(),
)
def test_what_is_read_is_what_was_written(
    lengths: list[int], shard_tokens: int, max_tokens: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(Path(folder), lengths, "rows", [column()], shard_bytes=shard_tokens * WIDTH * 4)
        batches = filled(store, lengths, max_tokens)
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens
        assert store.missing("prefix") == []
        rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
        for row, found in zip(rows, store.read("prefix", rows), strict=True):
            assert torch.equal(found, states_of(row, lengths[row]))


def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    lengths = [5, 4, 3, 2]
    store = StateStore(tmp_path, lengths, "rows", [column()], shard_bytes=WIDTH * 4 * 5)
    assert len(store.shards) == 3
    calls: list[list[int]] = []

    def run(rows: list[int]) -> dict[str, list[torch.Tensor]]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rows)
        return {"prefix": [states_of(row, lengths[row]) for row in rows]}

    with pytest.raises(KeyboardInterrupt):
        fill(store, ["prefix"], store.missing("prefix"), run, 5, "test", show=False)
    again = StateStore(tmp_path, lengths, "rows", [column()], shard_bytes=WIDTH * 4 * 5)
    assert again.missing("prefix") == [2]
    assert filled(again, lengths) == [[2, 3]]


def test_states_of_another_shape_are_not_stored(tmp_path: Path) -> None:
    store = StateStore(tmp_path, [2], "rows", [column()])
    with pytest.raises(ValueError, match="not"):
        store.write("prefix", 0, torch.zeros(3, WIDTH))
    with pytest.raises(ValueError, match="not"):
        store.write("prefix", 0, torch.zeros(2, WIDTH, dtype=torch.bfloat16))
    assert store.missing("prefix") == [0]
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_column_can_come_later_and_go(tmp_path: Path) -> None:
    store = StateStore(tmp_path, [2, 1], "rows", [column()])
    filled(store, [2, 1])
    store.add(column("other", "shared"))
    store.write("shared", 0, torch.ones(3, WIDTH))
    assert torch.equal(store.read("shared", [1])[0], torch.ones(1, WIDTH))
    store.forget("shared")
    assert store.missing("shared") == [0]
    assert torch.equal(store.read("prefix", [0])[0], states_of(0, 2))


@pytest.mark.parametrize(
    ("rows", "other"),
    [("others", column()), ("rows", column("changed")), ("rows", column(dtype=torch.bfloat16))],
)
def test_states_of_something_else_are_not_read(tmp_path: Path, rows: str, other: Column) -> None:
    filled(StateStore(tmp_path, [2], "rows", [column()]), [2])
    assert StateStore(tmp_path, [2], rows, [other]).missing("prefix") == [0]
    assert StateStore(tmp_path, [2], "rows", [column()]).missing("prefix") == []  # and what was there stays


def test_only_its_own_columns_are_deleted(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("precious")
    first, second = (StateStore(tmp_path / "cache", [2], "rows", [column(source)]) for source in "ab")
    filled(first, [2])
    filled(second, [2])
    second.delete()
    assert first.missing("prefix") == []
    first.delete()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.txt"]
    alone = StateStore(tmp_path / "alone", [2], "rows", [column()])
    alone.delete()
    assert not (tmp_path / "alone").exists()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("precious")
    with pytest.raises(CheckpointError, match="cache"):
        StateStore(tmp_path / "cache", [2], "rows", [column()])
    assert (tmp_path / "cache").read_text() == "precious"


def test_too_large_for_the_disk_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="free; free some space or write elsewhere"):
        StateStore(tmp_path, [10**12], "rows", [column()])
    assert list(tmp_path.iterdir()) == []


def test_hashes_tell_rows_apart() -> None:
    def rows(*ids: list[int], **more: list) -> Dataset:
        return Dataset.from_dict({"input_ids": list(ids)} | more)

    first = hash_rows(rows([1, 2], [3]))
    assert first == hash_rows(rows([1, 2], [3], labels=[[1, 2], [-100]]))
    others = [rows([1], [2, 3]), rows([1, 2], [4]), rows([3], [1, 2]), rows([1, 2], [3], seq_lengths=[[2], [1]])]
    assert len({first, *map(hash_rows, others)}) == 5


def test_hashes_tell_weights_apart() -> None:
    weight = torch.randn(3, 4)
    found = {
        hash_tensors([("a", weight)]),
        hash_tensors([("b", weight)]),
        hash_tensors([("a", weight.T)]),
        hash_tensors([("a", weight.bfloat16())]),
        hash_tensors([("a", weight)], "depth", 3),
        hash_tensors([("a", weight + 1e-6)]),
    }
    assert len(found) == 6
    assert hash_tensors([("a", weight.clone())]) in found
