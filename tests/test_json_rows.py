"""Rows in JSON files: read strictly, and stored with the types that they have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from hf_layerprune.errors import CheckpointError
from hf_layerprune.files import json_rows
from hf_layerprune.files.data_sets import read_json_files
from hf_layerprune.files.json_rows import read_rows
from hf_layerprune.files.row_types import MAX_COLUMNS, RowTypes

LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.integers(-(10**12), 10**12).map(lambda n: n / 1024)
    | st.text()
)
VALUES = st.recursive(LEAVES, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(), part, max_size=3))
ROWS = st.lists(st.dictionaries(st.sampled_from("abc"), VALUES), min_size=1, max_size=5)


def rows_of(path: Path, text: str | bytes) -> list[Any]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return [row for _, row in read_rows(path)]


@given(rows=st.lists(VALUES, max_size=5), indent=st.sampled_from([None, 1]), mark=st.booleans())
def test_a_list(rows: list[Any], indent: int | None, mark: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = ("\ufeff" if mark else "") + json.dumps(rows, indent=indent, ensure_ascii=False)
    assert rows_of(tmp_path_factory.getbasetemp() / "list.json", text) == rows


@given(rows=st.lists(st.dictionaries(st.text(), VALUES), max_size=5), end=st.sampled_from(["\n", "\r\n", "\n\n"]))
def test_lines(rows: list[Any], end: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    assert rows_of(path, end.join(json.dumps(row) for row in rows)) == rows


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, ", "is not JSON"),
        ('[{"a": 1} {"a": 2}]', "is not JSON"),
        ('[{"a": 1}]\n[{"a": 2}]', "is not JSON: Extra data at line 2 column 1"),
        ('[{"a": 1, "a": 2}]', "is not usable JSON: key 'a' is repeated"),
        ('[{"a": Infinity}]', "is not usable JSON: Infinity is not a JSON number"),
        (b'[{"a": "\xff"}]', "is not UTF-8"),
        (b'{"a": 1}\n{"a": "\xff"}', "line 2 is not UTF-8"),
        ('{"a": "\\ud800"}', "line 1 holds half a surrogate pair"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}", "line 1 is nested more than 64 levels"),
        ("x" * 300, "line 1 is longer than 256 bytes"),
    ],
)
def test_damaged_files(text: str | bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "MAX_ROW", 1 << 20 if "nested" in message else 256)
    with pytest.raises(CheckpointError, match=message):
        rows_of(tmp_path / "rows.json", text)


def test_a_huge_list_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with path.open("wb") as file:
        file.write(b'[{"text": "never closed')
        file.truncate(8 << 30)  # sparse
    with pytest.raises(CheckpointError, match="put one row on each line"):
        list(read_rows(path))
    with pytest.raises(CheckpointError, match="is larger than"):
        list(read_rows(path, max_bytes=1 << 20))
    with pytest.raises(CheckpointError, match="does not exist"):
        list(read_rows(tmp_path / "none.json"))
    with pytest.raises(CheckpointError, match="is not a file"):
        list(read_rows(tmp_path))


@given(rows=ROWS)
def test_rows_are_stored_as_they_are(rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kinds = {(name, _kind(value)) for row in rows for name, value in row.items() if value is not None}
    if len(kinds) > len({name for name, _ in kinds}) or not any(rows):
        with pytest.raises(CheckpointError, match=r"needs one type|only empty rows"):
            read_json_files({"train": [path]})
        return
    stored = read_json_files({"train": [path]})["train"]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    expected = [{name: row.get(name) for name in columns} for row in rows]
    assert [_rounded(row) for row in stored] == [_rounded(row) for row in expected]
    assert [_rounded(row) for row in read_json_files({"train": [path]}, streaming=True)["train"]] == _rounded(rows)


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def _rounded(value: Any) -> Any:
    """`datasets` reads the fractions inside of JSON columns with 15 digits."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.12g}") if type(value) in (int, float) else value


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}, {"a": None}, {"a": "x"}], "row 3: a is text, but a number in the rows before"),
        ([{"a": [1]}, {"a": {"b": 1}}], "row 2: a is an object, but a list"),
        ([{"a": True}, {"a": 1}], "row 2: a is a number, but true or false"),
        ([{"a": 2**63}], "row 1: a has a number of more than 64 bits"),
        ([{"a": [1, "x", [{"b": -(2**64)}]]}], "row 1: a has a number of more than 64 bits"),
        ([{"a\0b": 1}], "has a NUL in its name"),
        ([{str(i): i for i in range(MAX_COLUMNS + 1)}], "more than 1,000 columns"),
    ],
)
def test_rows_without_one_type(rows: list[dict[str, Any]], message: str) -> None:
    types = RowTypes()
    for number, row in enumerate(rows[:-1], 1):
        types.add_row(row, f"row {number}")
    with pytest.raises(CheckpointError, match=message):
        types.add_row(rows[-1], f"row {len(rows)}")


def test_whole_numbers_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows: list[dict[str, Any]] = [
        {"a": 2**63 - 1, "b": [1, "x"], "c": 0.5, "d": [0.5, 2**53 + 1]},
        {"a": -(2**63), "b": [{"c": 2**63 - 1}], "c": 2**53 + 1, "d": []},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_json_files({"train": [path]})["train"]) == rows


def test_a_change_of_the_file_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    for text in ("one", "two"):
        path.write_text(json.dumps({"text": text}))
        assert list(read_json_files({"train": [path]})["train"]["text"]) == [text]
