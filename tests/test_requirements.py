"""Requirements: what a bound means, what is refused, and what a miss stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

from hf_layerprune import CutError, LayerPruneError
from hf_layerprune.cli import main
from hf_layerprune.records.figures.metric_names import METRICS, SHARE
from hf_layerprune.records.figures.results import build_results
from hf_layerprune.records.metrics import Metrics
from hf_layerprune.records.requirements import Bound, RequireOptions, check_bounds, check_measurable, parse_bounds

from .measure_models import find, write_model, write_tasks

OWN, DENSE, EARLIER = "a" * 64, "b" * 64, "d" * 64
NAMES = st.sampled_from([*METRICS, "piqa", "words:perplexity", "piqa:acc", "perplexity_ratio", "mmlu_ratio"])
SIGNS = st.sampled_from(["<=", ">=", "<", ">"])
LIMITS = st.floats(1e-9, 1) | st.integers(0, 1).map(float)


def numbers() -> Metrics:
    """Numbers as `eval` and `bench` leave them."""
    metrics = Metrics(OWN)
    for weights, role in ((OWN, "healed"), (EARLIER, "cut"), (DENSE, "dense")):
        metrics.models[weights] = {"role": role, "name": role, "layers": 4, "parameters": 8}
    common: dict[str, Any] = {"date": "2026-11-26", "versions": {}, "settings": {}}
    for weights, scale in ((OWN, 1.0), (DENSE, 0.5)):
        for task, metric, value in (
            ("one", "perplexity", 20.0), ("two", "perplexity", 30.0), ("piqa", "acc_norm", 0.7), ("piqa", "acc", 0.6),
        ):  # fmt: skip
            kind = "text" if metric == "perplexity" else "accuracy"
            record = {"weights": weights, "kind": kind, "task": task, "metric": metric, "value": value * scale}
            metrics.add(results=[common | record])
            if weights == OWN:
                both = {"weights": OWN, "base": DENSE, "kind": kind, "task": task, "metric": metric, "settings": {}}
                difference = {"difference": value / 2, "date": "2026-11-26"}
                metrics.add(comparisons=[both | difference | {"share": 2.0}])
                for other in ({"weights": EARLIER}, {"base": EARLIER}, {"task": "three"}, {"settings": {"limit": 5}}):
                    metrics.add(comparisons=[both | difference | {"share": 9.0} | other])
    for batch in (1, 4):
        speed = {"weights": OWN, "kind": "speed", "metric": "decode_tokens_per_second", "value": 10.0 * batch}
        metrics.add(results=[common | speed | {"settings": {"batch": batch, "prompt_tokens": 8, "new_tokens": 2}}])
    return metrics


@given(st.lists(st.builds(Bound, NAMES, SIGNS, LIMITS), min_size=1, max_size=5))
def test_what_is_written_is_read(bounds: list[Bound]) -> None:
    assert list(parse_bounds(",".join(map(str, bounds)))) == bounds
    assert list(parse_bounds(" , ".join(f"{one.name} {one.operator} {one.limit!r}" for one in bounds))) == bounds


@given(st.text(st.sampled_from("kla_:<>=,.0159e-+ nif\x1b"), max_size=30) | st.text(max_size=20))
def test_any_text_is_bounds_or_refused_in_one_line(text: str) -> None:
    try:
        bounds, refusal = RequireOptions(require=text).require, "none"
    except CutError as error:
        bounds, refusal = (), str(error)
    assert all(abs(one.limit) < float("inf") for one in bounds)
    assert parse_bounds(",".join(map(str, bounds)) or "none") == bounds
    assert len(refusal.splitlines()) == 1
    assert len(refusal) < 600


def test_how_limits_are_written() -> None:
    assert parse_bounds("kl<=1E-3") == parse_bounds("kl<=0.001")
    assert parse_bounds("likelihood>=-2.5")[0].limit == -2.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("perplexity", "must be bounds such as .*, separated by commas$"),
        ("", "must be bounds"),
        ("kl<=1,,acc>=0.5", "; '' is none"),
        ("kl==1", "must be bounds"),
        ("kl<=1<=2", "must be bounds"),
        ("piqa>=0.6,kl<=much", "must be bounds such as .*, separated by commas; 'kl<=much' is none"),
        ("kl<=nan", "must be bounds"),
        ("kl<=1e999", "must be bounds"),
        ("top1_agreement>=80", "a share from 0 to 1; write 0.8 for 80 %"),
        ("piqa:acc>=60", "piqa:acc is a share"),
        ("acc>=-1", "acc is a share"),
        ([3], "must be bounds"),
        (3, "must be bounds"),
    ],
)
def test_malformed(text: Any, message: str) -> None:
    with pytest.raises(CutError, match=message):
        RequireOptions(require=text)


@pytest.mark.parametrize(
    ("text", "met", "said"),
    [
        ("perplexity<=30", True, "is met: 20 (one), 30 (two)"),
        ("perplexity<30", False, "is missed: 30 (two)"),
        ("one:perplexity<=20", True, "is met: 20"),
        ("one<=19.5", False, "is missed: 20"),
        ("perplexity_ratio<=2", True, "is met: 2 (one), 2 (two)"),
        ("perplexity_ratio<=1.2", False, "is missed: 2 (one), 2 (two)"),
        ("piqa>=0.7", True, "is met: 0.7"),
        ("piqa:acc>=0.7", False, "is missed: 0.6"),
        ("piqa_ratio>2", False, "is missed: 2"),
        ("acc>=0.6", True, "is met: 0.6 (piqa)"),
        ("decode_tokens_per_second>=20", False, "is missed: 10 (batch 1, prompt_tokens 8, new_tokens 2)"),
        ("decode_tokens_per_second_ratio>=1", False, "not measured; run hf-layerprune bench MODEL --base BASE"),
        ("kl<=1", False, "not measured; run hf-layerprune eval MODEL --base BASE --text TEXT"),
        ("piqa:f1>=1", False, "not measured; run hf-layerprune eval MODEL --tasks piqa"),
        ("mmlu>=0.5", False, "not measured; run hf-layerprune eval MODEL --tasks mmlu"),
    ],
)
def test_what_a_bound_is_held_against(text: str, met: bool, said: str) -> None:
    (outcome,) = check_bounds(parse_bounds(text), numbers())
    assert outcome.met is met
    assert outcome.text.startswith(text)
    assert outcome.text.endswith(said)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("piqaa>=0.5", "'piqaa' is neither a metric nor a task or text that is measured; known are arc_easy, .*piqa"),
        ("kl<=1", "not measured; run hf-layerprune eval MODEL --base BASE --text TEXT"),
        ("arc_easy_ratio>=0.9", "not measured; run hf-layerprune eval MODEL --base BASE --tasks arc_easy"),
        ("bytes_on_disk<=5", "not measured; run hf-layerprune bench MODEL"),
        ("three:acc>=0.5", "not measured; run hf-layerprune eval MODEL --tasks three"),
        ("three:kl<=1", "not measured; run hf-layerprune eval MODEL --base BASE --text three"),
    ],
)
def test_what_would_not_be_measured_is_refused_before(text: str, message: str) -> None:
    with pytest.raises(CutError, match=message):
        check_measurable(parse_bounds(text), numbers(), tasks=["arc_easy"], texts=["three"], base=False)
    check_measurable(
        parse_bounds("arc_easy>=0.5,nll<=3,three<=9,three:nll<=3,arc_easy:perplexity<=9,arc_easy:bleu>=1,piqa>=0.5"),
        numbers(),
        tasks=["arc_easy"],
        texts=["three"],
        base=False,
    )
    check_measurable(
        parse_bounds("kl<=1,arc_easy_ratio>=0.9"), numbers(), tasks=["arc_easy"], texts=["three"], base=True
    )


def test_a_file_whose_requirements_or_numbers_mean_nothing(tmp_path: Path) -> None:
    metrics = numbers()
    metrics.bounds = parse_bounds("perplexity<=25")
    metrics.write(tmp_path)
    assert Metrics.load(tmp_path) == metrics
    data = json.loads((tmp_path / "metrics.json").read_text())
    assert data["requirements"] == [
        {
            "require": "perplexity<=25",
            "met": False,
            "measured": [{"value": 20.0, "on": "one"}, {"value": 30.0, "on": "two"}],
        }
    ]
    data["requirements"][0]["require"] = "perplexity"
    (tmp_path / "metrics.json").write_text(json.dumps(data))
    with pytest.raises(LayerPruneError, match="has invalid requirements: must be bounds"):
        Metrics.load(tmp_path)
    data["requirements"] = []
    for record, name in ((data["results"][0], "weights"), (data["comparisons"][0], "base")):
        known, record[name] = record[name], "c" * 64
        (tmp_path / "metrics.json").write_text(json.dumps(data))
        with pytest.raises(LayerPruneError, match="a number of cccccccccccc, which `models` does not list"):
            Metrics.load(tmp_path)
        record[name] = known


def test_shares_are_the_metrics_of_that_unit() -> None:
    for name, metric in METRICS.items():
        if name == "f1":  # SQuAD v2's is a percentage
            assert parse_bounds("squadv2:f1>=70")
        elif metric.unit == SHARE:
            with pytest.raises(ValueError, match="is a share"):
                parse_bounds(f"{name}>=1.5")
        if name not in ("kl", "top1_agreement"):
            assert parse_bounds(f"{name}_ratio<=1.5")


# --- over the command line ----------------------------------------------------------------------------------


def test_eval_stops_at_a_miss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, cut = write_model(tmp_path / "base"), tmp_path / "cut"
    assert main(["prune", str(base), str(cut), "--drop-layers", "3-4"]) == 0
    text = write_tasks(tmp_path / "tasks") / "words.txt"
    words = ["eval", str(cut), "--text", str(text), "--length", "64", "--windows", "2", "--quiet"]
    capsys.readouterr()
    assert main([*words, "--require", "perplexity_ratio<=1.2"]) == 2
    assert "not measured; run hf-layerprune eval MODEL --base BASE" in capsys.readouterr().err
    assert not (cut / "metrics.json").exists()
    words += ["--base", str(base)]
    assert main([*words, "--require", "perplexity_ratio<=0.5, top1_agreement>=0.999, kl<=1000"]) == 1
    out, err = capsys.readouterr()
    assert err.endswith("hf-layerprune: missed: perplexity_ratio<=0.5, top1_agreement>=0.999\n")  # once on a terminal
    assert "perplexity_ratio<=0.5 is missed: " in out
    assert "kl<=1000 is met: " in out
    recorded = json.loads((cut / "metrics.json").read_text())["requirements"]
    assert [one["met"] for one in recorded] == [False, False, True]
    assert (
        recorded[2]["measured"][0]["value"]
        == find(Metrics.load(cut), Metrics.load(cut).weights, "kl", "words")["value"]
    )
    # Later numbers are held against the same bounds, and others replace them.
    assert main(words) == 0
    assert len(Metrics.load(cut).bounds) == 3
    assert main([*words, "--require", "kl<=1000"]) == 0
    assert Metrics.load(cut).bounds == parse_bounds("kl<=1000")
    assert main([*words, "--require", "none"]) == 0
    assert "requirements" not in json.loads((cut / "metrics.json").read_text())


CONDITIONS = {"dataset": "e" * 64, "dtype": "float32", "device": "cpu", "shots": 0, "task_version": "1"}


def piqa(weights: str, **fields: Any) -> dict[str, Any]:
    same = {"kind": "accuracy", "task": "piqa", "metric": "acc", "value": 0.5, "date": "2026-11-26", "versions": {}}
    return same | {"weights": weights, "settings": {}} | CONDITIONS | fields


AGAIN = [{"dataset": "f" * 64}, {"dtype": "bfloat16"}, {"device": "cuda: H100"}, {"shots": 5}, {"task_version": "2"}]


@pytest.mark.parametrize("whose", ["the model's", "the base's"])
@pytest.mark.parametrize("other", AGAIN, ids=str)
def test_what_was_measured_otherwise_is_not_compared(other: dict[str, Any], whose: str) -> None:
    """Neither by a difference from before, nor by standing in one row."""
    metrics = numbers()
    metrics.add(results=[piqa(OWN), piqa(DENSE)])
    pair = piqa(OWN) | {"base": DENSE, "difference": 0.1, "share": 1.2}
    metrics.add(comparisons=[{name: pair[name] for name in pair if name not in ("value", "versions", *CONDITIONS)}])
    assert check_bounds(parse_bounds("piqa:acc_ratio>=1"), metrics)[0].met
    stays, again = (DENSE, OWN) if whose == "the model's" else (OWN, DENSE)
    metrics.add(results=[piqa(again, **other)])
    assert not check_bounds(parse_bounds("piqa:acc_ratio>=1"), metrics)[0].measured
    rows = [row for row in build_results(metrics).rows if row.key[1:] == ("piqa", "acc")]
    assert [set(row.cells) for row in rows] == [{stays}, {again}]
    assert not any(cell.change for row in rows for cell in row.cells.values())
    assert str(next(iter(other.values())))[:8] in rows[1].task


def test_each_in_its_own_type_is_compared_if_both_were_measured_together() -> None:
    metrics = numbers()
    metrics.add(results=[piqa(OWN, dtype="float16"), piqa(DENSE, dtype="bfloat16")])
    assert not [row for row in build_results(metrics).rows if row.key[1:] == ("piqa", "acc") and len(row.cells) == 2]
    pair = {name: piqa(OWN)[name] for name in ("weights", "kind", "task", "metric", "settings", "date")}
    metrics.add(comparisons=[pair | {"base": DENSE, "difference": 0.1}])
    (row,) = (row for row in build_results(metrics).rows if row.key[1:] == ("piqa", "acc"))
    assert row.cells[OWN].change


def test_the_same_number_again_keeps_its_difference() -> None:
    metrics = numbers()
    before = metrics.comparisons
    metrics.add(results=[dict(one) | {"date": "2026-11-27"} for one in metrics.results])
    assert metrics.comparisons == before
