"""Training rows, in all the shapes that people have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict, Features, LargeList, List, Sequence, Value, load_from_disk

from hf_layerprune.calibration.documents import read_documents
from hf_layerprune.errors import CheckpointError, CutError
from hf_layerprune.heal.data import load_mixture, load_rows, pick_split, shape_rows
from hf_layerprune.heal.row_checks import check_rows
from hf_layerprune.heal.self_data import RowWriter

from .heal_makers import word_tokenizer
from .tiny_models import tiny_model

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Say hi.", "input": "", "output": "hi"},
]


def tokenizer(chat: bool) -> Any:
    made = word_tokenizer()
    made.chat_template = CHAT if chat else None
    return made


def shaped(rows: list[dict[str, Any]], chat: bool = False, **settings: Any) -> list[dict[str, Any]]:
    return shape_rows(Dataset.from_list(rows), tokenizer(chat), **settings).to_list()


def test_alpaca_rows_by_the_papers_template() -> None:
    for made in (shaped(ALPACA), shaped(ALPACA, chat=True, template="alpaca")):
        assert made == [
            {
                "prompt": "Below is an instruction that describes a task, paired with an input that provides further "
                "context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
                "### Input:\n1 2\n\n### Response:\n",
                "completion": "3",
            },
            {
                "prompt": "Below is an instruction that describes a task. Write a response that appropriately "
                "completes the request.\n\n### Instruction:\nSay hi.\n\n### Response:\n",
                "completion": "hi",
            },
        ]


def test_instructions_as_chats() -> None:
    dolly = [{"instruction": "Add.", "context": "1 2", "response": "3", "category": "sums"}]
    assert (
        shaped(dolly, chat=True)
        == shaped(ALPACA[:1], chat=True)
        == [
            {
                "prompt": [{"role": "user", "content": "Add.\n\n1 2"}],
                "completion": [{"role": "assistant", "content": "3"}],
            }
        ]
    )


def test_of_a_conversation_the_last_answer_is_learned() -> None:
    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": text} for role, text in turns]
    expected = [{"prompt": messages[:4], "completion": messages[4:5]}]
    assert shaped([{"messages": messages}, {"messages": messages[:2]}], chat=True) == expected
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text} for role, text in turns]
    assert shaped([{"conversations": sharegpt}], chat=True) == expected


def test_what_a_chat_template_reads_beside_the_messages_stays() -> None:
    for_it = {"tools": [{"type": "function", "function": {"name": "f"}}], "chat_template_kwargs": {"thinking": False}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    row = {"messages": messages, "id": 1} | for_it
    assert shaped([row], chat=True) == [{"prompt": messages[:1], "completion": messages[1:]} | for_it]


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}, {"input_ids": [1, 2]}])
def test_what_trl_takes_is_left_alone(row: dict[str, Any]) -> None:
    assert shaped([row]) == [row]


@pytest.mark.parametrize("kind", ["JSONL", "PARQUET", "CSV"])
def test_the_case_of_a_suffix_does_not_matter(kind: str, tmp_path: Path) -> None:
    path, rows = tmp_path / f"rows.{kind}", Dataset.from_list([{"text": "a"}])
    write = {"JSONL": rows.to_json, "PARQUET": rows.to_parquet, "CSV": rows.to_csv}
    write[kind](str(path))
    assert load_rows(str(path))["train"].to_list() == rows.to_list()
    if kind != "CSV":
        assert [document.text for document in read_documents(str(path), 0)] == ["a"]


def test_another_name_for_text() -> None:
    assert shaped([{"content": "a"}], text_field="content") == [{"content": "a"}]
    assert shaped([ALPACA[0] | {"body": "a"}], text_field="body") == [{"body": "a"}]


def test_all_answers_of_whole_conversations_stay() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    messages = [{"role": role, "content": text} for role, text in turns]
    rows = [{"messages": messages, "id": 1}, {"messages": messages[:1], "id": 2}]
    assert shaped(rows, chat=True, whole=True) == [{"messages": messages[:4]}]


GOOD = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a"}, {"text": None}], "row 1 of my rows has None in column text, which needs text"),
        ([{"text": 5}], "row 0 of my rows has 5 in column text"),
        (
            [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}],
            "row 1 .* None in column completion",
        ),
        ([{"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}], "text and messages side by side"),
        ([GOOD, {"input_ids": [5, 6, 128]}], r"row 1 .*'input_ids': \[5, 6, 128\].* needs token ids below 128"),
        ([GOOD | {"input_ids": [5, -1, 6]}], "row 0 .* in column input_ids and labels"),
        ([GOOD | {"input_ids": [5, None, 6]}], "row 0 .* in column input_ids and labels"),
        ([{"input_ids": "w5 w6"}], "row 0 .* 'w5 w6'} in column input_ids"),
        ([GOOD | {"labels": [6, 7]}], "as many in each column"),
        ([GOOD | {"labels": [-1, 6, 7]}], "or -100 for no label"),
        ([GOOD | {"completion_mask": [0, 1]}], "in column input_ids and labels and completion_mask"),
    ],
)
def test_values_that_can_not_be_trained_on(rows: list[dict[str, Any]], message: str) -> None:
    many = Dataset.from_list([rows[0]] * 1500 + rows[1:]) if len(rows) > 1 else Dataset.from_list(rows)
    with pytest.raises(CutError, match=message.replace("row 1 ", "row 1500 ")):
        check_rows(many, "my rows", "text", 128)


def test_values_that_can_be_trained_on() -> None:
    chat = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": None}]}
    for row in ({"text": ""}, chat, GOOD, {"input_ids": []}, {"prompt": "a", "completion": ""}):
        check_rows(Dataset.from_list([row]), "my rows", "text", 128)
        check_rows(Dataset.from_list([row]).to_iterable_dataset(), "my rows", "text", 128)
    types = {"input_ids": Sequence(Value("int32"), length=3), "labels": LargeList(Value("int64"))}
    masked = GOOD | {"completion_mask": [False, True, True]}
    check_rows(
        Dataset.from_list([masked], Features(types | {"completion_mask": List(Value("bool"))})), "my rows", "", 128
    )


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [{"question": "a", "answers": "b"}],
            {},
            "my rows has the columns question, answers, but training needs prompt",
        ),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "has no chat template for them; .* with plain text"),
        (
            [{"messages": [{"role": "user", "content": "a"}]}],
            {"chat": True},
            "no row of messages has an assistant's answer",
        ),
        ([{"messages": [{"content": "a"}]}], {"chat": True}, "can't use the rows of my rows: .*role"),
        ([{"conversations": ["a"]}], {"chat": True}, "can't use the rows of my rows"),
        (ALPACA, {"text_field": "body"}, "my rows has no column body, which --dataset_text_field names"),
        ([ALPACA[0], ALPACA[0] | {"output": None}], {}, "row 1 of my rows has None in column output"),
        (ALPACA, {"template": "chat"}, "no chat template; use template=alpaca"),
    ],
)
def test_rows_that_can_not_be_used(rows: list[dict[str, Any]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError if "can't use" in message else CutError, match=message):
        shaped(rows, name="my rows", **settings)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ALPACA[0] | {"text": "all of it"}, "used columns: instruction, input, output; not used: text"),
        ({"system": "s", "prompt": "a", "completion": "b"}, "used columns: prompt, completion; not used: system"),
        ({"text": "a", "id": 1}, "used columns: text; not used: id"),
        ({"text": "a"}, ""),
    ],
)
def test_columns_that_are_not_used_are_named(row: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "hf_layerprune"):
        shaped([row], chat=True)
    assert [record.message for record in caplog.records] == ([said] if said else [])


def test_what_datasets_saved_itself(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"text": "a"}, {"text": "b"}])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "two")
    load_from_disk(tmp_path / "two")["train"].map(lambda row: {"text": row["text"] * 2})  # is cached beside the rows
    for streaming in (False, True):
        assert list(load_rows(str(tmp_path / "one"), streaming=streaming)["train"]) == list(rows)
        found = load_rows(str(tmp_path / "two"), streaming=streaming)
        assert {name: list(part) for name, part in found.items()} == {"train": list(rows), "test": [{"text": "a"}]}


def test_conversations_without_an_answer_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    turns = [{"from": "human", "value": "a"}]
    kept = shaped([{"conversations": [*turns, {"from": role, "value": "b"}]} for role in ("gpt", "bot")], chat=True)
    assert len(kept) == 1
    assert "left out: 1 of 2 rows, since not each has an assistant's answer" in caplog.text


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    Dataset.from_list(ALPACA).to_parquet(tmp_path / "c[1].parquet")
    Dataset.from_list(ALPACA).to_csv(tmp_path / "d.csv")
    for name in ("a.json", "b.jsonl", "c[1].parquet"):
        assert pick_split(load_rows(str(tmp_path / name)), "train", name).to_list() == ALPACA
    assert load_rows(str(tmp_path / "d.csv"))["train"]["output"] == ["3", "hi"]
    (tmp_path / "e.txt").write_bytes("\ufeffone\r\n\r\n \ntwo".encode())
    for streaming in (False, True):
        lines = load_rows(str(tmp_path / "e.txt"), streaming=streaming)["train"]
        assert list(lines) == [{"text": "one"}, {"text": "two"}]


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"data file .*none\.json does not exist"):
        load_rows(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"bad\.json, line 1 is not JSON"):
        load_rows(str(tmp_path / "bad.json"))
    (tmp_path / "a.json").write_text(json.dumps(ALPACA))
    with pytest.raises(CutError, match=r"has no split 'test'; it has train"):
        pick_split(load_rows(str(tmp_path / "a.json")), "test", "a.json")


def test_damaged_tables_end_in_the_cause(tmp_path: Path) -> None:
    Dataset.from_list(ALPACA).to_parquet(tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:40] + b"\xff" * 40 + data[80:])
    (tmp_path / "b.csv").write_bytes(b'instruction,output\n"a,b\n')
    for name in ("a.parquet", "b.csv"):
        with pytest.raises(CheckpointError, match=rf"can't read data set .*{name}: (?!.*generating the dataset)"):
            load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    "line", ["null", "[1]", '{"text": 3}', '{"text": "a", "text": "b"}', '{"n": NaN}', '{"text": ']
)
def test_damaged_rows_in_a_folder_and_in_a_mixture(tmp_path: Path, line: str) -> None:
    from trl import DatasetMixtureConfig

    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "train.jsonl"
    path.write_text(f'{{"text": "a"}}\n{line}\n')
    with pytest.raises(CheckpointError, match=r"train\.jsonl, line 2"):
        load_rows(str(tmp_path / "rows"))
    for part in ({"path": str(tmp_path / "rows")}, {"path": "json", "data_files": str(path)}, {"path": str(path)}):
        with pytest.raises(CheckpointError, match=r"train\.jsonl, line 2"):
            load_mixture(DatasetMixtureConfig(datasets=[part]))


def test_a_folder_and_a_mixture_of_folders(tmp_path: Path) -> None:
    from trl import DatasetMixtureConfig

    for split in ("train", "test"):
        rows = [
            {"messages": [{"role": "user", "content": split}, {"role": "assistant", "calls": {split: i}}]}
            for i in (1, 2)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for streaming in (False, True):
        splits = load_rows(str(tmp_path), streaming=streaming)
        assert [row["messages"][1]["calls"] for row in splits["train"]] == [{"train": 1}, {"train": 2}]
        assert [row["messages"][0]["content"] for row in splits["test"]] == ["test", "test"]
        part = {"path": str(tmp_path), "split": "test"}
        mixed = load_mixture(DatasetMixtureConfig(datasets=[part, part], streaming=streaming))
        assert [row["messages"][1]["calls"] for row in mixed["train"]] == [{"test": 1}, {"test": 2}] * 2


def test_paths_in_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from YAML, where no shell replaces `~`; and `datasets` takes them for patterns."""
    from trl import DatasetMixtureConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("a1", "a[1]"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "b.jsonl").write_text(json.dumps({"text": folder}) + "\n")
        Dataset.from_list([{"text": folder}]).to_parquet(tmp_path / folder / "c.parquet")
    for kind, name in (("json", "b.jsonl"), ("parquet", "c.parquet")):
        for files in (f"~/a1/{name}", [f"~/a1/{name}"], {"train": f"~/a1/{name}"}):
            part = {"path": kind, "data_files": files}
            assert load_mixture(DatasetMixtureConfig(datasets=[part]))["train"].to_list() == [{"text": "a1"}]
        part = {"path": kind, "data_dir": "~/a[1]"}
        with pytest.raises(CheckpointError, match=r"a\[1\] has one of"):
            load_mixture(DatasetMixtureConfig(datasets=[part]))
    part = {"path": "json", "data_files": "~/b[1].jsonl"}
    with pytest.raises(CheckpointError, match="no file matches"):
        load_mixture(DatasetMixtureConfig(datasets=[part]))


def test_what_a_mixture_holds_out_is_drawn_by_the_seed(tmp_path: Path) -> None:
    from trl import DatasetMixtureConfig

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": str(i)}) + "\n" for i in range(60)))

    def held_out(seed: int) -> list[str]:
        part = {"path": "json", "data_files": str(path)}
        splits = load_mixture(DatasetMixtureConfig(datasets=[part], test_split_size=0.25), seed)
        assert set(splits["train"]["text"]) | set(splits["test"]["text"]) == {str(i) for i in range(60)}
        return list(splits["test"]["text"])

    assert len(held_out(1)) == 15
    assert held_out(1) == held_out(1)
    assert held_out(1) != held_out(2)


def test_half_of_the_written_rows_begin_with_a_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU, where a part has as many rows as are usually asked for."""
    began: dict[bool, int] = {}

    def write(model: Any, begins: Any, size: int, length: int, seed: int) -> torch.Tensor:
        began[begins is not None] = began.get(begins is not None, 0) + size
        return torch.zeros(size, length, dtype=torch.long)

    monkeypatch.setattr("hf_layerprune.heal.self_data.generate_text", write)
    for most, count in ((1024, 512), (64, 512), (64, 100), (64, 129), (64, 1)):
        monkeypatch.setattr("hf_layerprune.heal.self_data._ROWS_PER_PART", most)
        began.clear()
        rows = RowWriter(tiny_model("llama"), word_tokenizer(), tmp_path / f"{most}-{count}", 0).generate_rows(
            count, 4
        )
        assert len(rows) == count == sum(began.values())
        assert abs(began[True] - began.get(False, 0)) <= most // 32 + 1


@pytest.mark.parametrize("damage", ["{", '["a"]', "1", '{"input_ids": [3]}', "null"])
def test_rows_of_an_earlier_run_that_are_damaged(tmp_path: Path, damage: str) -> None:
    model = tiny_model("llama")

    def write() -> Dataset:
        return RowWriter(model, word_tokenizer(), tmp_path, 0).generate_rows(2, 8)

    rows = write().to_list()
    assert [len(row["input_ids"]) for row in rows] == [8, 8]
    _, part = tmp_path.glob("*/part-*")
    part.write_text(f"{part.read_text()[:-1]}, {damage}]")
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        write()


def test_answers_are_rewritten_by_greedy_decoding(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    prompts = ["w5 w6 w7", "w9", "w11 w12 w13 w14"]
    given = Dataset.from_list([{"prompt": prompt, "completion": "w3"} for prompt in prompts])
    wanted = {}
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        own = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :].tolist()
        wanted[prompt] = own
    ends = wanted[prompts[0]][3]  # the first answer ends here, and others only if they say the same
    model.generation_config.eos_token_id = ends
    writer = RowWriter(model, tokenizer, tmp_path, 0)
    found = writer.rewrite_answers(given, 6, 0.0).to_list()
    expected = [
        {"prompt": prompt, "completion": tokenizer.decode(ids[: ids.index(ends)], skip_special_tokens=True)}
        for prompt, ids in wanted.items()
        if ends in ids[1:] and ids.index(ends)
    ]
    assert found == expected
    assert writer.rewrite_answers(given, 6, 0.0).to_list() == found  # from its parts


def test_prompts_that_leave_no_room_for_an_answer_are_left_out(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    own = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    model.generation_config.eos_token_id = next(token for token in own[1:] if token != own[0])
    model.config.max_position_embeddings = 9
    given = Dataset.from_list([{"prompt": prompt, "completion": "w3"} for prompt in ("w5 w6 w7", "w7 " * 6)])
    writer = RowWriter(model, tokenizer, tmp_path, 0)
    assert [row["prompt"] for row in writer.rewrite_answers(given, 6, 0.0).to_list()] == ["w5 w6 w7"]
    with pytest.raises(CutError, match="no prompt leaves room for rewrite_max_tokens=7 among the 9 positions"):
        writer.rewrite_answers(given, 7, 0.0)


def test_answers_are_rewritten_with_the_tools_of_their_rows(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    tokenizer.chat_template = "{% if tools %}w5 {% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}"
    ids = tokenizer("w5 w6 w7", return_tensors="pt").input_ids
    own = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 3:].tolist()
    model.generation_config.eos_token_id = end = next(token for token in own if token != own[0])
    row = {"prompt": [{"role": "user", "content": "w6 w7"}], "tools": [{"type": "function"}]}
    answer = {"role": "assistant", "content": tokenizer.decode(own[: own.index(end)], skip_special_tokens=True)}
    given = Dataset.from_list([row | {"completion": [answer | {"content": "w3"}], "id": 1}])
    assert RowWriter(model, tokenizer, tmp_path, 0).rewrite_answers(given, 6, 0.0).to_list() == [
        row | {"completion": [answer]}
    ]
