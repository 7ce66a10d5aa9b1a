"""Files of tasks and texts: what they mean, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings, strategies as st
from jinja2.exceptions import SecurityError, UndefinedError
from tokenizers import processors

from hf_layerprune import CutError, LayerPruneError
from hf_layerprune.measure import harness, tasks
from hf_layerprune.measure.tasks import PAPER, load_tasks, read_task
from hf_layerprune.measure.texts import check_same_tokens, find_text, split_windows
from hf_layerprune.runtime.windows import special_prefix

from .measure_models import byte_tokenizer, write_tasks

QUESTION = {"query": "Question: Is it so?", "choices": ["yes", "no"], "gold": 0}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_a_folder_of_tasks(tmp_path: Path) -> None:
    write_tasks(tmp_path)
    assert list(load_tasks(None, tmp_path)) == ["asked", "begun", "mixed"]
    assert list(load_tasks(["mixed", "asked"], tmp_path)) == ["mixed", "asked"]
    for name, prompt in (("asked", "{{query}}\nAnswer:"), ("begun", "query")):
        assert read_task(tmp_path / f"{name}.jsonl").fields["doc_to_text"] == prompt


def test_a_file_that_is_not_asked_for_is_left_alone(tmp_path: Path) -> None:
    """Training rows may lie beside the questions."""
    write_tasks(tmp_path)
    write(tmp_path / "rows.jsonl", {"text": "Not a question."})
    assert list(load_tasks(["asked"], tmp_path)) == ["asked"]
    with pytest.raises(LayerPruneError, match=r"rows.jsonl, line 1 .*: a question is"):
        load_tasks(["rows"], tmp_path)
    with pytest.raises(LayerPruneError, match=r"rows.jsonl, line 1 .*: a question is"):
        load_tasks(None, tmp_path)


def test_the_harness_asks_what_the_file_says(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", QUESTION, {"query": "Question: {{7*7}}?", "choices": ["49", "7 {% x"], "gold": 1})
    write(tmp_path / "two.jsonl", {"query": "12", "choices": ["34", "[5]", "6"], "gold": 2.0})
    found = load_tasks(None, tmp_path)
    asked = {}
    for name, loaded in found.items():
        (task,) = loaded["tasks"].values()
        task.build_all_requests(rank=0, world_size=1)
        asked[name] = [request.args for request in task.instances]
    text = "Question: {{7*7}}?\nAnswer:"
    assert asked["one"][:2] == [("Question: Is it so?\nAnswer:", " yes"), ("Question: Is it so?\nAnswer:", " no")]
    assert asked["one"][2:] == [(text, " 49"), (text, " 7 {% x")]
    assert asked["two"] == [("12", " 34"), ("12", " [5]"), ("12", " 6")]
    assert read_task(tmp_path / "two.jsonl").rows[0]["gold"].__class__ is int  # pandas may write 2.0
    assert all(len(tasks.task_dataset(loaded)) == 64 for loaded in found.values())


def test_a_question_is_not_among_its_own_examples(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", *({"query": f"{i}:", "choices": ["a", "b"], "gold": i % 2} for i in range(6)))
    loaded = load_tasks(None, tmp_path)["one"]
    harness.prompts_hash("one", loaded, None, 4)
    (task,) = loaded["tasks"].values()
    assert all(one.args[0].count(one.doc["query"]) == 1 and one.args[0].count(":") == 5 for one in task.instances)


@pytest.mark.parametrize(
    ("acc", "target", "chance"),
    [
        (1.0, 2, 0.25),
        (0, " yes", 0.25),
        (0.0, [0, 2], 0.5),
        (0.37, 0, None),
        (None, 0, None),
    ],  # the fourth: truthfulqa_mc2
)
def test_chance_is_known_where_answers_are_right_or_wrong(acc: Any, target: Any, chance: float | None) -> None:
    answered = {"arguments": [("", "")] * 4, "target": target, "acc": acc}
    assert harness._chance({"one": answered}) == chance


def test_a_file_beside_it_sets_the_prompt(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", QUESTION)
    (tmp_path / "one.yaml").write_text(
        'doc_to_text: "Q {{query}} A"\ntarget_delimiter: ": "\nmetadata: {version: 7}\n'
    )
    (task,) = load_tasks(["one"], tmp_path)["one"]["tasks"].values()
    task.build_all_requests(rank=0, world_size=1)
    assert task.instances[1].args == ("Q Question: Is it so? A", ": no")
    assert task.VERSION == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", r'a question is \{"query"'),
        ({"query": "a", "choices": ["b", "c"]}, "a question is"),
        (QUESTION | {"gold": 2}, r"line 2: gold is 2, but the choices are 0\.\.1"),
        (QUESTION | {"gold": -1}, "at gold: the index of the right choice"),
        (QUESTION | {"gold": "0"}, "at gold: the index of the right choice"),
        (QUESTION | {"gold": True}, "at gold: the index of the right choice"),
        (QUESTION | {"query": " "}, "at query: a text that is not empty"),
        (QUESTION | {"choices": ["a"]}, "at least two texts"),
        (QUESTION | {"choices": ["a", ""]}, "none of them empty"),
        (QUESTION | {"choices": "ab"}, "at least two texts"),
    ],
)
def test_bad_lines(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "bad.jsonl", QUESTION, line)
    with pytest.raises(LayerPruneError, match=message) as caught:
        read_task(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no .jsonl file"),
        ({"a.jsonl": ""}, "a.jsonl has no questions"),
        ({"a.txt": "text", "a.jsonl": json.dumps(QUESTION)}, "have the same name"),
        ({"a.txt": "text", "a.k.txt": "text", "a.jsonl": json.dumps(QUESTION)}, "have the same name"),
        *(
            (
                {"a.jsonl": json.dumps(QUESTION), "a.yaml": f"{field}: x"},
                "a.yaml .*: only texts doc_to_text, .* can be set",
            )
            for field in ("task", "doc_to_choice", "doc_to_target", "dataset_path", "process_docs")
        ),
        *(
            (
                {"a.jsonl": json.dumps(QUESTION), "a.yaml": yaml.safe_dump(fields)},
                rf"a\.yaml .* at {next(iter(fields))}: ",
            )
            for fields in ({"doc_to_text": 5}, {"doc_to_text": None}, {"description": ["a"]}, {"metadata": "x"})
        ),
        (
            {"a.jsonl": json.dumps(QUESTION), "a.yaml": "doc_to_text: '{% if %}'"},
            "a.yaml: the template doc_to_text can't be used",
        ),
        ({"a.jsonl": json.dumps(QUESTION), "a.yaml": "[1]"}, "must be a mapping whose keys are text"),
        (
            {"a.jsonl": json.dumps(QUESTION), "a.yaml": 'metadata: &a {version: [*a, "\\ud800"]}'},
            "a.yaml holds half a surrogate pair",
        ),
        ({"a.jsonl": json.dumps(QUESTION), "a.yaml": "doc_to_text: !function os.system"}, "a.yaml is not valid YAML"),
    ],
)
def test_bad_folders(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(LayerPruneError, match=message):
        load_tasks(None, tmp_path)
    with pytest.raises(LayerPruneError, match="is not a folder"):
        load_tasks(None, tmp_path / "nowhere")


@given(st.text(), st.lists(st.text(), max_size=4), st.integers() | st.booleans() | st.none() | st.text(max_size=3))
@settings(max_examples=200, deadline=None)
def test_any_line_is_a_question_or_refused(tmp_path_factory: pytest.TempPathFactory, query, choices, gold) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    good = bool(query.strip()) and len(choices) >= 2 and all(choice.strip() for choice in choices)
    good = good and type(gold) is int and 0 <= gold < len(choices)
    write(path, {"query": query, "choices": choices, "gold": gold})
    if not good:
        with pytest.raises(LayerPruneError):
            read_task(path)
        return
    assert read_task(path).rows == [{"query": query, "choices": choices, "gold": gold}]


def test_names_of_the_harness(tmp_path: Path) -> None:
    """The paper's eight are there, and an unknown name has neighbours."""
    write_tasks(tmp_path)
    for name, near in (("hellaswagg", "hellaswag"), ("arc_eesy", "arc_easy"), ("aksed", "asked"), ("papper", "paper")):
        message = f"'{name}' is neither a task of lm-evaluation-harness nor a .jsonl file in .*; did you mean .*{near}"
        with pytest.raises(LayerPruneError, match=message):
            load_tasks(["asked", name], tmp_path)
    with pytest.raises(LayerPruneError, match="'§§§' is not a task of the harness; lm-eval ls tasks"):
        load_tasks(["§§§"])
    manager = tasks._task_manager()
    assert set(PAPER) <= set(manager.all_tasks)
    assert {"mmlu", "cmmlu"} <= set(manager.all_groups)


def test_tasks_whose_data_is_far_away() -> None:
    message = "can't load task piqa: .*; go online, or specify files with --tasks-from FOLDER"
    with pytest.raises(LayerPruneError, match=message):
        load_tasks(["paper"])


# --- texts --------------------------------------------------------------------------------------------------


def test_windows_follow_each_other(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    tokenizer = byte_tokenizer()
    rows, begun = split_windows(text, tokenizer, 64)
    assert (rows.shape, begun) == ((15, 64), False)
    assert tokenizer.decode(rows.flatten()) == text[: 15 * 64]
    few, _ = split_windows(text, tokenizer, 64, 3)
    assert few.equal(rows[:3])


def test_windows_begin_as_the_tokenizer_does() -> None:
    tokenizer = byte_tokenizer(bos=True)
    assert special_prefix(tokenizer) == (1,)
    rows, begun = split_windows("abcdefgh" * 10, tokenizer, 9)
    assert begun
    assert rows.shape == (10, 9)
    assert set(rows[:, 0].tolist()) == {1}
    assert tokenizer.decode(rows[3, 1:]) == "abcdefgh"
    assert split_windows("abc", tokenizer, 2)[0].tolist() == [[1, token] for token in tokenizer("abc").input_ids[1:]]


def test_windows_begin_with_all_that_the_tokenizer_puts_first() -> None:
    tokenizer = byte_tokenizer()  # with two, as in GLM
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> <s> $A", special_tokens=[("<pad>", 0), ("<s>", 1)]
    )
    rows, begun = split_windows("abc", tokenizer, 3)
    assert begun
    assert rows.tolist() == [[0, 1, token] for token in tokenizer("abc").input_ids[2:]]
    with pytest.raises(CutError, match="2 special tokens and no text; use 3 or more"):
        split_windows("abc", tokenizer, 2)


def test_bad_texts(tmp_path: Path) -> None:
    with pytest.raises(LayerPruneError, match="the text has 5 tokens, but a window has 64"):
        split_windows("short", byte_tokenizer(), 64)
    for name in ("nowhere.txt", str(tmp_path)):
        with pytest.raises(LayerPruneError, match=f"text {name} is not a file; specify one, or wikitext2"):
            find_text(name)
    for content, message in (
        (b" \n", "a.txt is empty"),
        (b"\xff\xfe", "a.txt is not UTF-8: invalid start byte at byte 0"),
    ):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(LayerPruneError, match=message):
            find_text(str(tmp_path / "a.txt"))
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}')
    with pytest.raises(LayerPruneError, match=r"rows\.jsonl holds rows, and not a plain text"):
        find_text(str(tmp_path / "rows.jsonl"))
    with pytest.raises(LayerPruneError, match=r"wikitext2 can't be downloaded: .*; specify a text file instead"):
        find_text("wikitext2")
    with pytest.raises(LayerPruneError, match="into different tokens"):
        check_same_tokens(byte_tokenizer(), byte_tokenizer(bos=True), "some text")


ESCAPES = (
    "{{ cycler.__init__.__globals__.os.system('touch {proof}') }}",
    "{{ query.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__cl' ~ 'ass__'] }}",
    "{{ query|attr('__class__') }}",
    "{% set x = lipsum.__globals__['os'].popen('touch {proof}') %}{{ x.read() }}",
    "{{ self._TemplateReference__context }}",
)


@pytest.mark.parametrize("field", ["doc_to_text", "description", "target_delimiter"])
@pytest.mark.parametrize("template", ESCAPES)
def test_a_template_of_a_task_runs_no_code(tmp_path: Path, field: str, template: str) -> None:
    folder, proof = tmp_path / "tasks", tmp_path / "proof"
    folder.mkdir()
    write(folder / "one.jsonl", QUESTION)
    (folder / "one.yaml").write_text(yaml.safe_dump({field: template.replace("{proof}", str(proof))}))
    with pytest.raises(LayerPruneError, match=rf"one.yaml: the template {field} can't be used"):
        load_tasks(None, folder)
    assert not proof.exists()


@pytest.mark.parametrize("template", ESCAPES)
def test_the_harness_renders_in_the_sandbox(tmp_path: Path, template: str) -> None:
    """Whatever comes in by another way than a file beside the questions."""
    tasks.require_harness()
    from lm_eval.utils import apply_template

    proof = tmp_path / "proof"
    with pytest.raises((SecurityError, UndefinedError)):
        apply_template(template.replace("{proof}", str(proof)), dict(QUESTION))
    assert not proof.exists()
    assert apply_template("{{query|regex_replace('Question: ', '')}}", dict(QUESTION)) == "Is it so?"
