"""States of rows on disk."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings, strategies as st

from hf_layerprune.errors import CheckpointError
from hf_layerprune.heal.store import StateCache, create_cache_folders, hash_rows, hash_tensors

WIDTH = 3


def states_of(row: int, length: int) -> torch.Tensor:
    return torch.arange(length * WIDTH, dtype=torch.float32).view(length, WIDTH) + 1000 * row


def cache_of(folder: Path, lengths: list[int], shard_tokens: int = 100) -> StateCache:
    with mock.patch("hf_layerprune.heal.store.SHARD_BYTES", shard_tokens * WIDTH * 4):
        cache = StateCache(folder, lengths, WIDTH * 4)
    create_cache_folders([cache])
    return cache


def filled(cache: StateCache, lengths: list[int], max_tokens: int = 8, share: tuple[int, int] = (0, 1)) -> list:
    batches: list[list[int]] = []

    def run(rows: list[int]) -> list[torch.Tensor]:
        batches.append(rows)
        return [states_of(row, lengths[row]) for row in rows]

    cache.fill(run, max_tokens, "test", share)
    return batches


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=20),
    shard_tokens=st.integers(1, 30),
    max_tokens=st.integers(1, 30),
    processes=st.integers(1, 3),
    data=st.data(),
)
def test_what_is_read_is_what_was_written(
    lengths: list[int], shard_tokens: int, max_tokens: int, processes: int, data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cache = cache_of(Path(folder) / "states", lengths, shard_tokens)
        assert all(sum(lengths[row] for row in rows[:-1]) < shard_tokens for rows in cache.shards)
        batches = [
            batch for rank in range(processes) for batch in filled(cache, lengths, max_tokens, (rank, processes))
        ]
        assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or len(batch) * max(lengths[row] for row in batch) <= max_tokens
        assert cache.missing() == []
        rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=8))
        for row, found in zip(rows, cache.read(rows), strict=True):
            assert torch.equal(found, states_of(row, lengths[row]))


def test_what_was_interrupted_goes_on(tmp_path: Path) -> None:
    lengths = [5, 4, 3, 2]
    cache = cache_of(tmp_path / "states", lengths, 5)
    assert cache.shards == [[0], [1, 2], [3]]
    calls: list[list[int]] = []

    def run(rows: list[int]) -> list[torch.Tensor]:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rows)
        return [states_of(row, lengths[row]) for row in rows]

    with pytest.raises(KeyboardInterrupt):
        cache.fill(run, 5, "test")
    again = cache_of(tmp_path / "states", lengths, 5)
    assert again.missing() == [1, 2]  # the second shard was not complete
    assert filled(again, lengths) == [[1, 2], [3]]


def test_only_its_own_folder_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "thesis.txt").write_text("precious")
    first, second = (cache_of(tmp_path / "cache" / name, [2]) for name in "ab")
    filled(first, [2])
    filled(second, [2])
    second.delete()
    assert first.missing() == []
    first.delete()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["thesis.txt"]
    cache_of(tmp_path / "alone" / "states", [2]).delete()
    assert not (tmp_path / "alone").exists()


@pytest.mark.skipif(os.name != "posix", reason="folders are locked with flock")
def test_the_last_run_that_uses_a_folder_deletes_it(tmp_path: Path) -> None:
    first, second = (cache_of(tmp_path / "cache" / "states", [2]) for _ in range(2))
    create_cache_folders([first])
    filled(first, [2])
    create_cache_folders([second])
    first.delete()
    assert second.missing() == []
    second.delete()
    assert not (tmp_path / "cache").exists()


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("precious")
    with pytest.raises(CheckpointError, match="cache"):
        cache_of(tmp_path / "cache" / "states", [2])
    assert (tmp_path / "cache").read_text() == "precious"


def test_too_large_for_the_disk_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="free; free some space or write elsewhere"):
        cache_of(tmp_path / "states", [10**12])
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
