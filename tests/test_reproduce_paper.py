"""`recipes/reproduce_paper/`: rows that can be run, the paper's numbers, a row from end to end, and going on after a break."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_layerprune.errors import LayerPruneError
from hf_layerprune.files.locks import lock_folder, unlock_folder
from hf_layerprune.layer_ranges import parse_layers
from hf_layerprune.measure.requests import EvalRequest
from hf_layerprune.stages.prune import PruneRequest

from .heal_makers import load_recipe
from .measure_models import byte_tokenizer, write_model, write_tasks

FOLDER = Path(__file__).parents[1] / "recipes" / "reproduce_paper"
RUN = FOLDER / "run.py"
# Table 1 of arXiv:2411.15558.
CRITERIA = "dense reverse_order random perplexity magnitude_l1 magnitude_l2 block_influence taylor".split()
TABLE_1 = {
    "vicuna": (0.5484, 0.4909, 0.2933, 0.4553, 0.2986, 0.2944, 0.3927, 0.2955),
    "qwen": (0.5973, 0.5037, 0.2954, 0.4078, 0.3890, 0.3567, 0.4190, 0.4871),
    "gemma": (0.5892, 0.5032, 0.4635, 0.4724, 0.4604, 0.4202, 0.4948, 0.5073),
    "llama": (0.6299, 0.5268, 0.3110, 0.4772, 0.3018, 0.3015, 0.4080, 0.4796),
}


# The runner's modules find each other as those of any script do.
sys.path.append(str(FOLDER))
plans, results, run = (import_module(name) for name in ("plans", "results", "run"))
ROWS = plans.read_rows()
EVERY_MISTAKE = tuple(plans.defaults()["mistakes"])


# --- rows ----------------------------------------------------------------------------------------------


def test_tables_have_the_rows_that_the_paper_has() -> None:
    counts = Counter(name.partition("/")[0] for name in ROWS)
    assert counts == {
        "table1": 4 * 8, "tableA": 4 * 7, "table2": 3 * 6, "tableB": 6, "table4": 6, "table5": 16, "tableC": 16,
        "table6": 10, "table7": 3,
    }  # fmt: skip


@pytest.mark.parametrize("mistakes", [(), EVERY_MISTAKE], ids=["right", "as the paper"])
def test_every_field_of_every_row_is_a_real_option(mistakes: tuple[str, ...]) -> None:
    settings = {}
    for name, row in ROWS.items():
        plan = plans.make_plan(row, plans.Options(mistakes=mistakes))
        if plan.cut is not None:
            assert PruneRequest(base=plan.model, output="x", **plan.cut).criterion == row.criterion
        evaluate = {key: value for key, value in plan.evaluate.items() if key not in ("texts", "merged_in_4_bits")}
        assert EvalRequest(plan.model, **evaluate).tasks == ("paper",)
        if plan.tune is not None:
            assert plan.tune["method"] == row.method
            settings[name] = plan.tune
    known = {option.dest for option in load_recipe().make_parser()._actions}
    assert not {(row, setting) for row, tune in settings.items() for setting in tune if setting not in known}


def test_hyperparameters_are_the_papers() -> None:
    for name, row in ROWS.items():
        plan = plans.make_plan(row, plans.Options(mistakes=EVERY_MISTAKE))
        if plan.tune is None:
            continue
        tune = plan.tune
        assert tune["per_device_train_batch_size"] * tune["gradient_accumulation_steps"] == 64, name
        assert (tune["learning_rate"], tune["num_train_epochs"], tune["warmup_steps"]) == (1e-5, 2, 100), name
        assert (tune["lr_scheduler_type"], tune["weight_decay"], tune["max_grad_norm"]) == ("linear", 0.0, 1.0), name
        assert tune["max_length"] == {"alpaca": 256, "dolly": 1024, "mmlu": 512}[row.data], name
        assert plan.data.get("test_rows") == {"alpaca": 2000, "dolly": 200, "mmlu": None}[row.data], name
        if "lora" in row.method:
            assert (tune["lora_r"], tune["lora_alpha"], tune["lora_dropout"]) == (8, 16, 0.05), name


def test_mistakes_are_off_unless_they_are_asked_for() -> None:
    for name, row in ROWS.items():
        plan = plans.make_plan(row, plans.Options())
        assert plan.mistakes == ()
        assert plan.cut is None or plan.cut.get("variant", "original") == "original", name
        assert "wikitext" not in (plan.cut or {}).get("calibration", ""), name
        assert not plan.evaluate.get("merged_in_4_bits"), name
        assert not (plan.data or {}).get("whole_sequence"), name
        if row.method in ("lora", "qlora"):
            assert "learning_rate" not in plan.tune, name  # the recipe's own for LoRA


@pytest.mark.parametrize(
    ("name", "mistakes"),
    [
        ("table1/llama-taylor", ["paper_criterion", "lora_learning_rate"]),
        ("table1/llama-random", ["paper_criterion", "lora_learning_rate"]),
        ("table1/qwen-perplexity", ["perplexity_on_test", "lora_learning_rate"]),
        ("table2/llama-qlora", ["lora_learning_rate", "qlora_in_4_bits"]),
        ("table2/llama-lm_head_last3", []),
        ("table7/llama-dolly", ["dolly_mask"]),
        ("table1/llama-dense", []),
    ],
)
def test_mistakes_concern_the_rows_they_were_made_in(name: str, mistakes: list[str]) -> None:
    assert plans.relevant_mistakes(ROWS[name]) == mistakes
    right, wrong = (plans.make_plan(ROWS[name], plans.Options(mistakes=m)) for m in ((), EVERY_MISTAKE))
    assert wrong.mistakes == tuple(mistakes)
    assert (right.key == wrong.key) == (not mistakes)


def test_numbers_of_the_paper_are_carried() -> None:
    for model, numbers in TABLE_1.items():
        for criterion, number in zip(CRITERIA, numbers, strict=True):
            assert ROWS[f"table1/{model}-{criterion}"].paper["mean"] == number
    for row in ROWS.values():
        assert row.figures(), row.name
        if "tasks" in row.paper:  # the mean that is printed is that of the tasks
            tasks = row.paper["tasks"].values()
            assert len(tasks) == 8
            assert sum(tasks) / 8 == pytest.approx(row.paper["mean"], abs=6e-5), row.name
        if "removed" in row.paper:
            assert len(parse_layers(row.paper["removed"])) == 8, row.name
    assert ROWS["table4/llama-lm_head_last3"].figures() == {
        "trainable_millions": 1179.68, "memory_gb": 48.02, "seconds": 7931,
    }  # fmt: skip


def test_numbers_that_are_known_to_be_wrong_are_put_right() -> None:
    wrong = {name for name, row in ROWS.items() if row.corrected}
    assert wrong == {"table1/qwen-block_influence", *(f"table6/llama-taylor-{n}" for n in ("01", "05", "10"))}
    for name in wrong:
        assert ROWS[name].notes
        assert ROWS[name].figures()["mean"] != ROWS[name].paper["mean"]
    cells = results.format_line(results.make_lines(ROWS["table6/llama-taylor-05"], None)[0], None)
    assert cells == ["mean", "0.4796 (printed: 0.3600)", "not run", "", ""]


def test_rows_with_the_same_settings_share_a_run() -> None:
    def key(name: str) -> str:
        return plans.make_plan(ROWS[name], plans.Options()).key

    assert key("table1/llama-reverse_order") == key("table2/llama-lora") == key("table4/llama-lora")
    assert key("table2/llama-lm_head_last3") == key("table7/llama-alpaca") == key("table4/llama-lm_head_last3")
    assert key("table1/llama-taylor") == key("tableB/llama-lora")
    assert (
        key("table5/llama-lora-taylor-step4") != key("table5/llama-lora-taylor-one_shot") == key("tableB/llama-lora")
    )
    cuts = {plans.make_plan(row, plans.Options()).cut_name for name, row in ROWS.items() if name.startswith("tableB/")}
    assert len(cuts) == 1


def test_rows_that_were_not_run_are_in_the_table(tmp_path: Path) -> None:
    text = results.markdown(ROWS, results.Results.read(tmp_path / "none.json"))
    assert text.count("not run") >= len(ROWS)


# --- the command line ----------------------------------------------------------------------------------


def test_help_and_list_import_no_torch() -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['run.py', *sys.argv[1:]]\n"
        f"try:\n    runpy.run_path({str(RUN)!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    for word in ("--help", "--list"):
        environment = os.environ | {"PYTHONPATH": str(FOLDER)}
        done = subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert re.search(
        r"^table1/llama-taylor +not run +mean 0\.4796 +\[paper_criterion, lora_learning_rate\]$", done.stdout, re.M
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name rows, or give --all; --list shows what there is"),
        (["tabel1"], "no row is called tabel1; the tables are table1, table2"),
        (["--rows-matching", "("], "is not a regular expression"),
        (["--rows-matching", "opt-"], "no row's name has opt- in it"),
        (["table7", "--mistakes", "all,none"], "unknown mistake 'all'"),
        (["table7", "--tasks-from", "/nowhere"], "/nowhere does not exist"),
        (["table7", "--set", "max_length"], "--set max_length must be NAME=VALUE"),
        (["table7", "--model", "llama-9b=x"], "no row has a model 'llama-9b'"),
        (["table7", "--set", "max_lenght=8"], "--set max_lenght: recipes/sft_tail.py has no such setting"),
        (["table7", "--set", "max_length=abc"], "invalid int value: 'abc'"),
        (["table7", "--set", "drop=0.5"], "--set drop: each row has its own"),
        (["table7", "--set", "output_dir=x"], "--set output_dir: each row has its own"),
        (["table7", "--limit", "0"], "'0' must be a whole number, 1 or more"),
        (["table7", "--device", "gpu"], "'gpu' is not a device of this machine"),
    ],
)
def test_refused_words(tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = run.main([*words, "--output", str(tmp_path / "out")])
    except SystemExit as end:  # argparse
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(("content", "message"), [("- 1", "must be a mapping"), ("a: [", "is not valid YAML")])
def test_a_file_that_is_not_an_accelerate_config(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "engine.yaml").write_text(content)
    words = ["--accelerate-config", str(tmp_path / "engine.yaml"), "--output", str(tmp_path / "out")]
    assert run.main(["table7", *words]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said
    assert "specify an accelerate config" in said


def test_damaged_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text('{"schema_version": 1')
    assert run.main(["--list", "--output", str(tmp_path)]) == 1
    assert "results.json is not JSON" in capsys.readouterr().err


def test_two_runs_keep_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = lock_folder(tmp_path)
    assert run.main(["table7", "--output", str(tmp_path)]) == 1
    unlock_folder(lock)
    assert "another run is using" in capsys.readouterr().err


# --- numbers -------------------------------------------------------------------------------------------


def test_a_difference_within_the_standard_error() -> None:
    row = ROWS["table1/llama-taylor"]
    for ours, verdict in ((0.4800, "yes"), (0.4700, "no, 4.8 s.e."), (0.4777, "yes"), (0.4774, "no, 1.1 s.e.")):
        found = {"values": {"mean": {"value": ours, "stderr": 0.002}}, "differences": [], "mistakes": []}
        cells = results.format_line(results.make_lines(row, found)[0], found)
        assert cells[1:4] == ["0.4796", f"{ours:.4f} ± 0.0020", f"{ours - 0.4796:+.4f}"]
        assert cells[4] == verdict
    found["differences"] = ["8 steps"]
    assert results.format_line(results.make_lines(row, found)[0], found)[4] == "not the same run"


def test_layers_of_several_rounds_are_counted_in_the_base() -> None:
    dropped_in_base = import_module("stages").dropped_in_base
    rounds = [{"layers": 8, "dropped": [0, 3]}, {"layers": 6, "dropped": [0, 1]}, {"layers": 4, "dropped": [3]}]
    assert dropped_in_base(rounds[:1]) == [0, 3]
    assert dropped_in_base(rounds) == [0, 1, 2, 3, 7]


@pytest.mark.parametrize(("drop", "rounds"), [(0.25, [20, 5]), (30, [20, 10]), (0.29, [20, 9])])
def test_rounds_drop_as_many_layers_as_one_cut(tmp_path: Path, drop: float, rounds: list[int]) -> None:
    """An integer is a number of layers, and 0.29 of 100 are 29, though 0.29 * 100 is below that."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 100}))
    plan = plans.Plan(str(tmp_path), {"drop": drop}, 20, None, None, {})
    assert list(import_module("stages").Runner(tmp_path)._drops_per_round(plan)) == rounds


def test_other_content_of_a_file_is_another_run(tmp_path: Path) -> None:
    """Under the same name; what is on the Hub has a name alone."""
    files = {name: tmp_path / name for name in ("rows.jsonl", "text.txt", "calibration.txt")}
    (tmp_path / "tasks").mkdir()
    files["tasks"] = tmp_path / "tasks" / "one.jsonl"
    for path in files.values():
        path.write_text("before")
    plan = plans.Plan(
        "org/base",
        {"criterion": "taylor", "calibration": f"{files['calibration.txt']}:text"},
        None,
        {"method": "lora"},
        {"name": str(files["rows.jsonl"])},
        {"texts": {"wikitext2": str(files["text.txt"])}, "tasks_from": str(tmp_path / "tasks")},
    )
    names = {(plan.key, plan.cut_name)}
    for path in files.values():
        path.write_text("after, and of another size")
        names.add((plan.key, plan.cut_name))
    assert len(names) == 5
    assert len({cut for _, cut in names}) == 2, "the training rows do not decide the cut"


def test_processes_share_a_batch() -> None:
    training = import_module("training")
    settings = {"gradient_accumulation_steps": 16, "fp16": True}
    assert training.engine_settings(settings, {"num_processes": 4}, True) == {"gradient_accumulation_steps": 4}
    assert training.engine_settings(settings, {}, True) == {}
    assert training.engine_settings(settings, {}, False) == {"use_cpu": True, "fp16": False, "bf16": False}
    with pytest.raises(LayerPruneError, match="3 processes can't share 16 batches a step"):
        training.engine_settings(settings, {"num_processes": 3}, True)


def test_dolly_as_the_paper_trains_on_it(tmp_path: Path) -> None:
    rows = [{"instruction": "say", "context": "", "response": "yes" * n, "category": "x"} for n in (1, 40, 2, 3) * 5]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    prepare_rows = import_module("training_rows").prepare_rows
    tokenizer = byte_tokenizer(bos=True)
    common = {"name": str(tmp_path / "rows.json"), "test_rows": 200, "longest": 220}
    prepare_rows(common, tmp_path / "right", tokenizer)
    prepare_rows(common | {"whole_sequence": True}, tmp_path / "wrong", tokenizer)
    right, wrong = (
        [json.loads(line) for split in ("train", "test") for line in (tmp_path / name / f"{split}.jsonl").open()]
        for name in ("right", "wrong")
    )
    assert len(right) == len(wrong) == 15  # five are too long
    assert {row["completion"] for row in right} == {"yes", "yesyes", "yesyesyes"}
    for one, other in zip(right, wrong, strict=True):
        assert tokenizer.decode(other["input_ids"]) == "<s>" + one["prompt"] + one["completion"]
        assert other["completion_mask"] == [0] + [1] * (len(other["input_ids"]) - 1)  # all but what begins the text


def test_questions_become_rows(tmp_path: Path) -> None:
    rows = [{"question": f"Which is {i}?", "choices": ["one", "two"], "answer": i % 2} for i in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = {"name": str(tmp_path / "rows.json"), "shape": "choices", "split": "auxiliary_train", "config": "all"}
    import_module("training_rows").prepare_rows(data, tmp_path / "out", byte_tokenizer())
    found = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").open()]
    assert len(found) == 9
    for row in found:
        odd = int(re.search(r"\d", row["prompt"])[0]) % 2
        assert row["prompt"].endswith("? (A) one (B) two\nAnswer:")
        assert row["completion"] == (" (B)" if odd else " (A)")


# --- from end to end -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of a row on a tiny model."""
    folder = tmp_path_factory.mktemp("paper")
    write_model(folder / "tiny")
    write_tasks(folder / "tasks", questions=6)
    draw = random.Random(0)
    rows = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join("abc" * draw.randint(1, 4))}
        for n in range(40)
    ]
    (folder / "rows.json").write_text(json.dumps(rows))
    said: dict[str, Any] = {
        "model": folder / "tiny", "data": folder / "rows.json", "tasks-from": folder / "tasks", "max-steps": 2,
        "limit": 4, "text": f"wikitext2={folder / 'tasks' / 'words.txt'}", "windows": 2, "output": folder / "out",
        "calibration": folder / "tasks" / "words.txt",
    }  # fmt: skip
    settings = {"max_length": 300, "gradient_accumulation_steps": 1, "disable_tqdm": "true"}
    return [
        "table6/llama-block_influence-05", "--keep-models",
        *(part for name, value in said.items() for part in (f"--{name}", str(value))),
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(words: list[str]) -> Path:
    """The output of a whole run."""
    assert run.main(words) == 0
    return Path(words[words.index("--output") + 1])


def _only_run(output: Path) -> Path:
    (folder,) = (output / "runs").iterdir()
    return folder


def test_a_row_from_end_to_end(done: Path) -> None:
    found = json.loads((done / "results.json").read_text())
    (one,) = found["runs"].values()
    assert list(found["rows"]) == ["table6/llama-block_influence-05"]
    lineage = json.loads((_only_run(done) / "lineage.json").read_text())
    prune, heal = lineage["entries"]
    assert (prune["settings"]["criterion"], prune["settings"]["drop"]) == ("block_influence", 0.25)
    assert (prune["calibration"]["samples"], prune["calibration"]["length"]) == (5, 128)
    assert parse_layers(one["removed"]) == prune["settings"]["drop_layers"]
    assert one["left"] == 6
    assert (heal["settings"]["method"], heal["settings"]["max_steps"]) == ("lora", 2)
    assert heal["weights"] == one["weights"]
    metrics = json.loads((_only_run(done) / "metrics.json").read_text())
    accuracies = {r["task"]: r["value"] for r in metrics["results"] if r["metric"] == "acc"}
    assert set(accuracies) == {"asked", "begun", "mixed"}
    assert one["values"]["mean"]["value"] == pytest.approx(sum(accuracies.values()) / 3)
    assert {r["weights"] for r in metrics["results"]} == {one["weights"]}
    # LoRA of rank 8 on seven matrices of six layers: 8 x (in + out) each.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    assert one["values"]["trainable_millions"]["value"] * 1e6 == 6 * sum(8 * (a + b) for a, b in shapes)
    perplexity = next(r["value"] for r in metrics["results"] if r["metric"] == "perplexity")
    assert one["values"]["wikitext2"]["value"] == perplexity
    table = (done / "results.md").read_text()
    assert re.search(
        r"\| `llama-block_influence-05` \| [\d,-]+ \| mean \| 0\.4300 \| 0\.\d{4} ± 0\.\d{4} \| [+-]0\.\d{4} \| not the same run \|",
        table,
    )
    assert "Rows run: 1 of 135." in table


def test_what_is_done_is_not_done_again(done: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*") if path.is_file()}
    start = time.perf_counter()
    assert run.main(words) == 0
    assert time.perf_counter() - start < 5
    assert {path: path.stat().st_mtime_ns for path in (done / "runs").rglob("*") if path.is_file()} == before
    capsys.readouterr()
    assert run.main([*words, "--list"]) == 0
    assert re.match(r"table6/llama-block_influence-05  done +mean 0\.4300, ours 0\.", capsys.readouterr().out)


def test_a_row_that_was_broken_off_goes_on(done: Path, words: list[str]) -> None:
    """As if it had been killed while it was measured: the numbers are the same, and nothing is trained again."""
    results_file, folder = done / "results.json", _only_run(done)
    whole = json.loads(results_file.read_text())
    results_file.unlink()
    (folder / "metrics.json").unlink()
    (done / "answers").joinpath(next(iter(sorted(os.listdir(done / "answers"))))).unlink()
    log = (folder / "round-1" / "heal" / "log.txt").read_bytes()
    assert run.main(words) == 0
    again = json.loads(results_file.read_text())
    (one,), (other,) = whole["runs"].values(), again["runs"].values()
    assert one["values"] == other["values"]
    assert (folder / "round-1" / "heal" / "log.txt").read_bytes() == log
    assert not list(done.rglob("*.partial*"))


def test_what_is_missing_is_found_before_anything_is_made(words: list[str], tmp_path: Path) -> None:
    place = words.index("--text")
    without = [*words[:place], *words[place + 2 :], "--output", str(tmp_path / "out")]
    assert run.main(without) == 1  # Table 6 asks for WikiText-2, and there is no network
    assert not (tmp_path / "out" / "cuts").exists()
    assert not (tmp_path / "out" / "results.json").exists()


def test_training_that_fails_says_why(tmp_path: Path) -> None:
    runner = import_module("stages").Runner(tmp_path)
    script = "import sys; print('loading', flush=True); sys.exit('error: method=qlora needs bitsandbytes')"
    with pytest.raises(LayerPruneError, match=r"training failed: method=qlora needs bitsandbytes \(log: "):
        runner._launch([sys.executable, "-c", script], tmp_path / "log.txt")
    with pytest.raises(LayerPruneError, match=r"training failed: it ended with code 3 \(log: "):
        runner._launch([sys.executable, "-c", "import sys; sys.exit(3)"], tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text().startswith("loading")


def test_settings_file_is_plain_yaml(done: Path) -> None:
    settings = yaml.safe_load((_only_run(done) / "round-1" / "heal" / "settings.yaml").read_text())
    assert settings["resume_from_checkpoint"] == "true"
    assert settings["warmup_steps"] == 0
    assert {field.name for field in dataclasses.fields(plans.Plan)} == set(
        json.loads((_only_run(done) / "plan.json").read_text())
    )


def test_training_that_was_broken_off_goes_on_and_claims_no_time(done: Path, words: list[str]) -> None:
    results_file, round_folder = done / "results.json", _only_run(done) / "round-1"
    (whole,) = json.loads(results_file.read_text())["runs"].values()
    results_file.unlink()
    (round_folder / "round.json").unlink()
    for name in ("model", "adapter", "checkpoint-2"):
        shutil.rmtree(round_folder / "heal" / name)
    assert run.main(words) == 0
    (one,) = json.loads(results_file.read_text())["runs"].values()
    assert one["values"]["trainable_millions"] == whole["values"]["trainable_millions"]
    assert whole["values"].keys() - one["values"].keys() == {"seconds"}
