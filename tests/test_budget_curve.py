"""Never past a budget, with the repair in the loop; and the curve, which goes on where it stopped."""

from __future__ import annotations

import copy
import itertools
import json
import math
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_layerprune import (
    CheckpointError,
    CutError,
    LayerDropConfig,
    LayerPruneError,
    UnsupportedModelError,
    families,
    prune_with,
    quality_curve,
)
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.cli import main
from hf_layerprune.cut.memory import drop_layers
from hf_layerprune.layer_ranges import parse_layers
from hf_layerprune.options import CutOptions
from hf_layerprune.publish.card.commands import list_commands
from hf_layerprune.publish.card.render import Card
from hf_layerprune.records.history import read_history
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import budget
from hf_layerprune.select.runner import choose_layers
from hf_layerprune.select.search import BLOCK, GREEDY, HELD_OUT, Search
from hf_layerprune.select.trials import Trial, evaluate_trials
from hf_layerprune.stages import curve as stage
from hf_layerprune.stages.curve_file import base_identity, choose_point, read_curve
from hf_layerprune.stages.requests import PruneRequest, RankRequest

from .measure_models import LAYERS
from .tiny_models import VOCAB, tiny_config, tiny_model

FEW: dict[str, Any] = {"calibration_samples": 12, "calibration_length": 16, "context": 16}
WORDS = ["--calibration-samples", "12", "--calibration-length", "16"]
QUALITY = {"kl": 0.1, "perplexity_ratio": 1.1, "top1_agreement": 0.9}
POINT = {"dropped": 1, "layers": "7", "cut": QUALITY, "parameters": 1, "bytes": 2, "speedup": 1.1}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    return CalibrationSet.from_ids(
        torch.randint(3, VOCAB, (16, 16), generator=torch.Generator().manual_seed(3)), "random"
    )


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"Line {i} of a running text.\n" for i in range(300)))
    return str(path)


@torch.no_grad()
def kl_of(cut: Any, dense: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of each row."""
    wanted, given = (one(ids).logits.double().log_softmax(-1) for one in (dense, cut))
    return (wanted.exp() * (wanted - given)).sum(-1).mean(-1)


# --- the search -----------------------------------------------------------------------------------------


def test_nested_sets_are_the_greedy_ones(model: Any, text: CalibrationSet) -> None:
    walk = LayerWalk(model)
    search = Search(walk, text, range(8), CutOptions(criterion="auto"))
    rows = CalibrationSet.from_ids(search._trial_rows.input_ids[:2], "tried")
    gone: list[int] = []
    for count in range(1, 5):
        sets = {i: Trial(tuple(sorted([*gone, i]))) for i in range(8) if i not in gone}
        kls = dict(zip(sets, (one.kl for one in evaluate_trials(walk, rows, list(sets.values()))), strict=True))
        gone.append(min(kls, key=kls.__getitem__))
        assert search.nested(count) == tuple(sorted(gone))
    again = Search(walk, text, range(8), CutOptions(criterion="auto"), gone[:2])
    assert again.nested(4) == search.nested(4)


@pytest.mark.parametrize(("model_type", "repair"), [("llama", "linear"), ("llama", "refit"), ("gemma2", "refit"), ("olmo2", "linear")])  # fmt: skip
def test_nested_sets_are_tried_with_their_repair(model_type: str, repair: str, text: CalibrationSet) -> None:
    """A layer whose whole effect is a linear map of what its neighbour writes is free to go, however large it is."""
    model = tiny_model(model_type)
    with torch.no_grad():
        for i in range(8):
            model.model.layers[i].self_attn.o_proj.weight.mul_(0.05)
            model.model.layers[i].mlp.down_proj.weight.mul_(0.5)
    search = Search(LayerWalk(model), text, range(8), CutOptions(repair=repair, criterion="auto"))
    for count in (1, 3):
        drop = search.nested(count)
        plain = Search(LayerWalk(model), text, range(8), CutOptions(criterion="auto"))
        repaired, cut = (one._try_sets([drop], 2)[drop].kl for one in (search, plain))
        assert 0 not in drop
        assert repaired < cut


def test_a_block_stays_one(model: Any, text: CalibrationSet) -> None:
    choice = CutOptions(max_kl=5.0, contiguous=True, protect_first=2)
    found = choose_layers(model, text, choice, protected=[5]).drop_layers
    assert found == [2, 3, 4]  # all that may go


def test_only_sets_that_a_config_can_describe(text: CalibrationSet) -> None:
    """Jamba's config has a period of layers, so that in front of its last layers only whole periods can go."""
    model = tiny_model("jamba")
    search = Search(LayerWalk(model), text, range(12), CutOptions(criterion="auto"))
    for count in range(1, 5):
        point = search.find_point(count)
        families.cut_config(model.config, families.make_cut(model.config, parse_layers(point["layers"])))
    with pytest.raises(CutError, match="at a fixed period"):
        search.judge([((0, 2), "a criterion")])
    assert [one.drop for one in search.judge([((0, 2), "a criterion"), ((10, 11), "another")])] == [(10, 11)]


def test_sets_where_the_config_can_describe_no_block(text: CalibrationSet) -> None:
    """Every six consecutive of the eight layers hold both that attend, 2 and 5."""
    search = Search(LayerWalk(tiny_model("recurrent_gemma")), text, range(8), CutOptions(criterion="auto"))
    assert set(search.best_sets(6).values()) == {GREEDY}
    with pytest.raises(CutError, match="no attention layer would be left"):
        search.best_block(search.score_blocks(6), 6)


def test_the_curve_of_a_quantised_model_has_a_repair_only_in_a_type_that_a_cut_can_have(
    model: Any, text: CalibrationSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where loading unpacks it, since `prune` refuses to repair it without `--dtype`."""
    fields = model.config.to_dict() | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    caplog.set_level("INFO")
    for dtype, repair in (("auto", None), ("bfloat16", "refit")):
        request = RankRequest(str(tmp_path), curve=True, dtype=dtype)
        made = stage._make_search(request, {"steps": []}, LayerWalk(model), text, set(range(8)))
        assert made.repair == repair
    assert caplog.text.count("without repair: the weights are quantised (fp8)") == 1


# --- budgets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [None, "refit"])
def test_the_deepest_cut_inside_a_budget(repair: str | None, model: Any, text: CalibrationSet) -> None:
    budget = 0.45
    choice = choose_layers(model, text, CutOptions(max_kl=budget, repair=repair))
    points = {point["dropped"]: point["repaired" if repair else "cut"] for point in choice.details["curve"]}
    count = len(choice.drop_layers)
    assert points[count]["kl"] + points[count]["kl_stderr"] <= budget
    assert points[count + 1]["kl"] + points[count + 1]["kl_stderr"] > budget
    # The figures are those of the very model that is made, on rows that nothing has seen.
    cut = tiny_model("llama")
    plan = drop_layers(cut, choice.drop_layers).cut
    if repair:
        assert choice.repair is not None
        choice.repair.apply(cut.model.layers, plan.new_index)
    by_row = kl_of(cut, model, text.split(HELD_OUT)[1].input_ids)
    assert points[count]["kl"] == pytest.approx(by_row.mean().item(), rel=1e-3)
    assert points[count]["kl_stderr"] == pytest.approx(by_row.std().item() / math.sqrt(len(by_row)), rel=1e-2)


def test_a_search_tries_all_blocks_only_where_nested_sets_end(
    model: Any, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round over all blocks costs about half of what `auto` does, and a budget should cost about twice as much."""
    tried, whole = [], Search.score_blocks

    def counted(search: Search, count: int) -> Any:
        tried.append(count)
        return whole(search, count)

    monkeypatch.setattr(Search, "score_blocks", counted)
    count = len(choose_layers(model, text, CutOptions(max_kl=0.45)).drop_layers)
    assert count > 2
    assert count + 1 in tried  # no block goes deeper
    assert min(tried) >= count
    assert len(tried) <= 3


def test_no_set_is_judged_twice(model: Any, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best block is often the nested set of that size."""
    judged, whole = [], Search.judge

    def noted(search: Search, sets: Any) -> Any:
        judged.extend(drop for drop, _ in sets)
        return whole(search, sets)

    monkeypatch.setattr(Search, "judge", noted)
    choose_layers(model, text, CutOptions(max_kl=0.45, contiguous=True))
    assert len(judged) == len(set(judged)) > 2


@pytest.mark.parametrize("name", ["max_perplexity_ratio", "min_top1_agreement"])
def test_other_budgets(name: str, model: Any, text: CalibrationSet) -> None:
    limit, figure = (1.3, "perplexity_ratio") if name == "max_perplexity_ratio" else (0.25, "top1_agreement")
    choice = choose_layers(model, text, CutOptions(**{name: limit}, criterion="kl"))
    points = {point["dropped"]: point["cut"] for point in choice.details["curve"]}
    value = points[len(choice.drop_layers)][figure]
    assert value < limit if name == "max_perplexity_ratio" else value > limit
    assert choice.criterion == "kl"


def test_a_prune_writes_what_was_judged(base: Path, notes: str, tmp_path: Path) -> None:
    words = ["--max-kl", "0.25", "--repair", "refit", "--calibration", notes]
    assert main(["prune", str(base), str(tmp_path / "cut"), *words, *WORDS]) == 0
    lineage = Lineage.load(tmp_path / "cut")
    assert lineage is not None
    (entry,) = lineage.entries
    assert entry["settings"]["max_kl"] == 0.25
    assert entry["settings"]["criterion"] == "auto"
    assert entry["selection"]["why"].count("±") == 2
    card = Card.from_records(lineage).body()
    count = len(entry["settings"]["drop_layers"])
    assert "## How deep to cut" in card
    assert f"| **{count}** |" in card
    assert "curve" in Card.from_records(lineage).pictures
    # What the card tells people to run makes the same model.
    command = shlex.split(list_commands(read_history(lineage))[0].replace("\\\n", " "))
    local = {"notes.txt": notes}  # paths are not published
    again = ["prune", str(base), str(tmp_path / "again"), *(local.get(word, word) for word in command[4:])]
    assert main(again) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("cut", "again"))
    assert first == second
    entry["selection"]["curve"][0]["repaired"]["kl"] = "<b>"
    assert "## How deep to cut" not in Card.from_records(lineage).body()


def test_an_adapter_takes_a_budget(text: CalibrationSet, notes: str, base: Path) -> None:
    config = LayerDropConfig(base_model_name_or_path=str(base), max_kl=0.3, calibration=notes, **FEW)
    pruned = prune_with(config)
    assert pruned.peft_config["default"].drop_layers
    assert pruned.config.num_hidden_layers == LAYERS - len(config.drop_layers or ())


def test_too_strict_or_too_few_rows_to_tell(model: Any, text: CalibrationSet) -> None:
    with pytest.raises(
        CutError, match=r"no layer can go within max_kl=0.001: without layer 7, the best found, it is 0"
    ):
        choose_layers(model, text, CutOptions(max_kl=0.001))
    (one,) = [p for p in choose_layers(model, text, CutOptions(max_kl=0.15)).details["curve"] if p["dropped"] == 1]
    near = one["cut"]["kl"] + 0.2 * one["cut"]["kl_stderr"]
    with pytest.raises(CutError, match=r"too small to tell .*calibration_samples=") as caught:
        choose_layers(model, text, CutOptions(max_kl=near))
    rows = int(str(caught.value).rpartition("=")[2].rstrip(")"))
    # A fifth of the error: 25 times the four rows that were held out, of which a quarter is.
    assert rows == pytest.approx(25 * 16, rel=0.1)


class FewSets:
    """A search in whose sets as many layers can go, nested or as a block, as given; blocks lose less."""

    dense, fit_rows, judge_rows, walk = None, [], [1, 2], SimpleNamespace(num_layers=20)

    def __init__(self, most: int, nested: int, block: int) -> None:
        self.max_drop, self.deepest = most, {GREEDY: nested, BLOCK: block, "kl": block}

    def log_estimate(self, *args: Any) -> None: ...

    def nested(self, count: int) -> tuple[int, ...]:
        assert count <= self.max_drop
        return tuple(range(count))

    def score_blocks(self, count: int) -> None:
        assert count <= self.max_drop

    def best_block(self, scores: None, count: int) -> tuple[int, ...]:
        return tuple(range(20 - count, 20))

    def judge(self, sets: Any) -> list[Any]:
        ((drop, found_by),) = sets
        if self.deepest[found_by] < 0:
            raise CutError("every cut overflows")
        kl = 3 if len(drop) > self.deepest[found_by] else 0.5 if found_by == GREEDY else 0.25
        outcome = SimpleNamespace(quality=lambda dense: {"kl": kl, "kl_stderr": 0.1})
        return [SimpleNamespace(drop=drop, found_by=found_by, repair=None, outcome=outcome)]


@pytest.mark.parametrize("criterion", ["auto", "kl"])
def test_a_search_ends_at_the_deepest_set_inside(criterion: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, choice = range(16), CutOptions(max_kl=1.0, criterion=criterion)
    search = FewSets(0, 0, 0)
    monkeypatch.setattr(budget, "Search", lambda *args: search)
    pick = (lambda rows, count: search.nested(count)) if criterion == "kl" else None
    for most, nested, block in itertools.product(range(12), range(-1, 12), range(12)):
        search = FewSets(most, min(nested, most), min(block, most))
        deepest = search.deepest["kl"] if pick else max(search.deepest[GREEDY], search.deepest[BLOCK])
        fails = "may be dropped" if not most else "overflows" if nested < 0 and not pick else "no layer can go"
        if not deepest or fails == "overflows":
            with pytest.raises(CutError, match=fails):
                budget.choose(search.walk, rows, range(20), choice, pick)
            continue
        drop = budget.choose(search.walk, rows, range(20), choice, pick).drop_layers
        assert len(drop) == deepest
        if pick is None and deepest > 1:  # the better one of a size
            assert (drop[0] > 0) == (search.deepest[BLOCK] == deepest)


# --- the curve ------------------------------------------------------------------------------------------


def without_times(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in point.items() if name != "speedup"} for point in points]


def test_a_curve_goes_on_where_it_stopped(
    base: Path, notes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"calibration": notes, "repair": "linear", **FEW}
    whole = quality_curve(str(base), **options)
    assert {count: len(drop) for count, drop in whole.drops.items()} == {1: 1, 2: 2, 3: 3, 4: 4}
    pruned = LayerDropConfig(base_model_name_or_path=str(base), drop_layers=whole.drops[2])
    assert prune_with(pruned).config.num_hidden_layers == 6
    write, written = stage._write, []

    def break_off(folder: Path, record: dict[str, Any]) -> None:
        write(folder, record)
        written.append(len(record["points"]))
        if len(written) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(stage, "_write", break_off)
    with pytest.raises(KeyboardInterrupt):
        quality_curve(str(base), tmp_path / "curve", **options)
    begun = json.loads((tmp_path / "curve" / "curve.json").read_text())
    assert len(begun["points"]) == 2
    resumed = quality_curve(str(base), tmp_path / "curve", **options)
    assert written == [1, 2, 3, 4, 4]
    assert without_times(resumed.points) == without_times(whole.points)
    assert resumed.record["decode"] == begun["decode"]  # speed-ups of other times could not be compared
    assert {path.name for path in (tmp_path / "curve").iterdir()} == {"curve.json", "curve.png", "curve.svg"}
    text = Path(notes).read_text()
    Path(notes).write_text(text[::-1])
    for more in ({}, {"curve_up_to": 5}):
        with pytest.raises(CheckpointError, match="on other calibration rows"):
            quality_curve(str(base), tmp_path / "curve", **options | more)
    Path(notes).write_text(text)
    for other in ({"repair": "refit"}, {"seed": 7}, {"calibration_samples": 16}):
        with pytest.raises(CheckpointError, match=f"with another {next(iter(other))};"):
            quality_curve(str(base), tmp_path / "curve", **options | other)
    assert (
        len(quality_curve(str(base), tmp_path / "curve", curve_up_to=1, force=True, **options | {"seed": 7}).points)
        == 1
    )
    with monkeypatch.context() as later:
        later.setattr(stage, "__version__", "99")
        with pytest.raises(CheckpointError, match="with another version;"):
            quality_curve(str(base), tmp_path / "curve", **options | {"seed": 7})
    (tmp_path / "curve" / "notes").write_text("mine")
    with pytest.raises(CheckpointError, match="holds files that may be yours: notes"):
        quality_curve(str(base), tmp_path / "curve", force=True, **options)


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"target_memory": "8GB"}, "has no figures for memory"),
        ({"max_kl": 0.3, "calibration_samples": 5}, "max_kl=0.3 needs a standard error"),
        ({"drop": 4, "curve_up_to": 2}, "drop=4 is not on the curve, which ends at 2 layers; use curve_up_to=4"),
        ({"curve_up_to": 40}, "curve_up_to=40, but only 7 of 8 layers can be dropped"),
        ({"curve_up_to": 7, "protect_first": 1, "protect_last": 2}, "only 5 of 8 layers can be dropped"),
        ({"calibration": "missing.txt"}, "missing.txt"),
        ({"calibration_length": 10_000}, "calibration_length=10000 is more than"),
    ],
)
def test_what_a_curve_can_not_answer_is_refused_before_it_is_made(
    base: Path, monkeypatch: pytest.MonkeyPatch, amount: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(stage, "_extend", lambda *_: pytest.fail("the curve was begun"))
    with pytest.raises(LayerPruneError, match=message):
        quality_curve(str(base), **FEW | amount)


@pytest.mark.parametrize(
    ("model_type", "message"), [("gemma3n_text", "can't be ranked"), ("diffllama", "attention.s lambda")]
)
def test_a_type_without_a_curve(
    model_type: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_extend", lambda *_: pytest.fail("the curve was begun"))
    tiny_config(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=message):
        quality_curve(str(tmp_path), **FEW)


def test_too_few_rows_for_a_budget_are_refused_before_the_text_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_layerprune.adapter.prepare.load_calibration_for", lambda *_: pytest.fail("it was written"))
    few = ["--calibration-samples", "5", "--calibration-length", "16"]
    assert main(["prune", str(base), str(tmp_path / "cut"), "--max-kl", "0.3", *few]) == 2
    assert "raise --calibration-samples to 8" in capsys.readouterr().err


def test_what_a_curve_says_is_what_prune_makes(
    base: Path, notes: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rank", str(base), str(tmp_path / "curve"), "--curve", "--curve-up-to", "3", "--calibration", notes]
    assert main([*words, *WORDS, "--context", "16", "--max-kl", "0.3"]) == 0
    out = capsys.readouterr().out
    curve = json.loads((tmp_path / "curve" / "curve.json").read_text())
    chosen = curve["points"][curve["chosen"] - 1]
    assert out.count(f"{chosen['layers']}  <- chosen") == 1
    assert "perplexity and top-1 after the refit repair; " in out
    kls = [(point["repaired"]["kl"], point["repaired"]["kl_stderr"]) for point in curve["points"]]
    assert curve["knee"] == stage.knee(curve["points"])
    explained = [line.split(":")[0] for line in out.splitlines() if line.startswith(("knee: ", "chosen: "))]
    assert explained == ["knee"] * (curve["knee"] is not None) + ["chosen"], "each mark that the table has"
    assert curve["chosen"] == max(i + 1 for i, (kl, error) in enumerate(kls) if kl + error <= 0.3)
    assert f"--from-curve {tmp_path / 'curve'} --drop {curve['chosen']}\n" in out
    prune = ["prune", str(base), str(tmp_path / "cut"), "--from-curve", str(tmp_path / "curve"), "--max-kl", "0.3"]
    assert main(prune) == 0
    lineage = Lineage.load(tmp_path / "cut")
    assert lineage is not None
    (entry,) = lineage.entries
    assert entry["calibration"] == curve["calibration"]  # the curve's text, unless options say otherwise
    assert entry["settings"]["drop_layers"] == parse_layers(chosen["layers"])
    assert entry["settings"]["repair"] == "refit"
    for folder, size in ((tmp_path / "cut", chosen["bytes"]), (base, curve["dense"]["bytes"])):
        assert size == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert "## How deep to cut" in Card.from_records(lineage).body()
    assert main([*prune[:2], str(tmp_path / "again"), *prune[3:5]]) == 0
    again = Lineage.load(tmp_path / "again")
    assert again is not None
    assert again.entries[0]["settings"] == entry["settings"]  # the curve knows what was asked for
    # The next command if nothing was chosen and there is no knee: for the deepest cut, or the shallowest for a budget.
    options = [*words[1:4], *words[6:], *WORDS, "--context", "16"]
    for more, said, drop in (
        (["--curve-up-to", "1"], "curve; next", 1),
        (["--max-kl", "1e-9"], "no cut on it meets --max-kl, and the command is for the shallowest", 1),
        (["--target-speedup", "900"], "no cut on it meets --target-speedup, and the command is for the deepest", 3),
    ):
        assert main(["rank", *options, "--curve-up-to", "3", *more]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert f"--from-curve {tmp_path / 'curve'} --drop {drop}\n" in out
    for more, code, message in (
        (["--drop", "5"], 2, "drops up to 3 layers, drops 5; ask for less"),
        ([], 2, "is what was asked for when it was made; choose one, such as --drop 3"),
        (["--max-kl", "1e-9"], 2, "meets --max-kl; allow more loss"),
        (["--target-memory", "1GB"], 2, "has no figures for memory"),
    ):
        assert main(["prune", str(base), str(tmp_path / "x"), "--from-curve", str(tmp_path / "curve"), *more]) == code
        assert message in capsys.readouterr().err
    assert main(["prune", str(base), str(tmp_path / "x"), "--from-curve", str(tmp_path)]) == 1
    assert "has no curve.json" in capsys.readouterr().err
    (tmp_path / "curve" / "curve.json").write_text('{"points": []}')
    assert main(["prune", str(base), str(tmp_path / "x"), "--from-curve", str(tmp_path / "curve")]) == 1
    assert "is not a curve" in capsys.readouterr().err


def test_which_point_a_request_means(base: Path, tmp_path: Path) -> None:
    def ask(output: str = "cut", model: Path = base, **options: Any) -> PruneRequest:
        return choose_point(PruneRequest(str(model), str(tmp_path / output), **options), tmp_path)[0]

    points = [
        POINT | {"dropped": n, "layers": f"{8 - n}-7" if n > 1 else "7", "repaired": QUALITY}
        | {"parameters": 100 - 10 * n, "bytes": 1000 - 50 * n, "speedup": 1 + n / 10}
        for n in (1, 2, 3)
    ]  # fmt: skip
    del points[0]["repaired"]
    identity = {"base": base_identity(PruneRequest(str(base), "cut"))}
    record = {
        "schema_version": 1, "points": points, "steps": [], "num_layers": 8, "identity": identity, "calibration": {}, "repair": "refit",
        "decode": {"layers": [1.0] * 8, "rest": 1.0, "device": "cpu"}, "dense": {"parameters": 100, "bytes": 1000},
    }  # fmt: skip
    (tmp_path / "curve.json").write_text(json.dumps(record))
    for asked in ({"target_params": 80}, {"target_size": 900}, {"target_speedup": 1.2}, {"drop": 2}):
        found = ask(**asked)
        assert (found.drop_layers, found.repair) == ([6, 7], "refit"), asked
    assert (ask(drop=1).repair, ask(drop=2, repair="linear").repair) == (None, "linear")
    with pytest.raises(CutError, match="a GGUF file that stays one can't have"):
        ask("cut.gguf", drop=2)
    with pytest.raises(CutError, match="max_kl needs a standard error, and the curve has none"):
        ask(max_kl=1.0)
    for point in points:  # of the last, only the repaired cut is inside
        kls = {"cut": float(point["dropped"]), "repaired": 0.5} if "repaired" in point else {"cut": 0.1}
        point |= {name: QUALITY | {"kl": kl, "kl_stderr": 0.0} for name, kl in kls.items()}
    (tmp_path / "curve.json").write_text(json.dumps(record))
    assert ask(max_kl=0.5).drop_layers == ask(max_kl=1.0, repair="refit").drop_layers == [5, 6, 7]
    with pytest.raises(
        CutError, match="with the refit repair, so it can't say which cut meets max_kl after the linear"
    ):
        ask(max_kl=1.0, repair="linear")  # which may lose more
    other = Path(shutil.copytree(base, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    with pytest.raises(CheckpointError, match="holds the curve of a base other than"):
        ask(model=other, drop=2)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["points"], "x"), (["points"], []), (["points"], [POINT, POINT]), (["points", 0, "bytes"], True), (["points", 0, "bytes"], -1), (["points", 0, "bytes"], 10**19), (["points", 0, "layers"], 3), (["points", 0, "layers"], "9"), (["points", 0, "layers"], "6-7"), (["points", 0], {name: POINT[name] for name in POINT if name != "cut"}), (["points", 0, "cut", "top1_agreement"], 2),
        (["points", 0, "cut", "kl"], "<b>"), (["points", 0, "cut"], []), (["points", 0, "cut", "top1_agreement_stderr"], "x"),
        (["points", 0, "cut", "perplexity_ratio"], 0), (["points", 0, "bytes"], None), (["points", 0, "speedup"], "x"), (["points", 0, "cut", "kl"], 1e7), (["points"], [5]),
        (["steps"], [7, 7]), (["steps"], [99]), (["decode", "layers"], [1]), (["identity"], []), (["calibration"], 5), (["repair"], "glue"),
        (["points", 0], POINT | {"dropped": 2, "layers": "6-7"}), (["num_layers"], "8"), (["dense", "bytes"], "1"), (["dense", "parameters"], "1"), (["decode", "layers", 0], "x"), (["decode", "rest"], None), (["schema_version"], 2), (["decode", "batch"], 1),
    ],
)  # fmt: skip
def test_a_damaged_curve_is_refused(path: list[Any], value: Any, tmp_path: Path) -> None:
    record: dict[str, Any] = {
        "schema_version": 1, "points": [copy.deepcopy(POINT)], "steps": [7], "num_layers": 8,
        "decode": {"layers": [1.0] * 8, "rest": 1.0, "device": "cpu"}, "dense": {"parameters": 1, "bytes": 2}, "identity": {"base": "x"}, "calibration": {}, "repair": None,
    }  # fmt: skip
    file = tmp_path / "curve.json"
    file.write_text(json.dumps(record))
    assert read_curve(file) == record
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError):
        read_curve(file)


def test_a_model_that_can_not_be_repaired_has_a_curve(tmp_path: Path) -> None:
    """What Mixtral's layers write goes through experts."""
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    curve = quality_curve(
        str(tmp_path / "base"), calibration_samples=8, calibration_length=8, context=16, curve_up_to=2
    )
    assert curve.record["repair"] is None
    assert all("repaired" not in point for point in curve.points)
    assert len(repr(curve).splitlines()) == 7  # the headings, the dense model, two cuts, and what is said below them
    assert "after the" not in str(curve)


def test_a_curve_of_few_layers(tmp_path: Path) -> None:
    """A quarter of three layers, the default, rounds to none; the curve is measured all the same."""
    options = {"calibration": "self", "calibration_samples": 8, "calibration_length": 8, "context": 16}
    model = tiny_model("llama")
    drop_layers(model, range(3, 8))
    model.save_pretrained(tmp_path / "three")
    curve = quality_curve(str(tmp_path / "three"), **options)
    assert (len(curve.points), curve.chosen) == (1, None)
    assert quality_curve(str(tmp_path / "three"), curve_up_to=2, drop=2, **options).chosen == 2
    drop_layers(model, [1, 2])
    model.save_pretrained(tmp_path / "one")
    with pytest.raises(CutError, match="only one layer, which must stay"):
        quality_curve(str(tmp_path / "one"), **options)


@pytest.mark.filterwarnings("error::UserWarning")  # of a picture without a height
def test_a_curve_of_ruined_cuts_is_read_again(model: Any, tmp_path: Path) -> None:
    """The perplexity of its plain cuts is more than 10^20 times the dense model's, which the records do not take."""
    ruined = copy.deepcopy(model)
    with torch.no_grad():
        ruined.model.norm.weight.mul_(60)
    ruined.save_pretrained(tmp_path / "base")
    options = {"calibration": "self", "calibration_samples": 12, "calibration_length": 16, "context": 16}
    folder = tmp_path / "curves" / "ruined"
    first, again = (quality_curve(str(tmp_path / "base"), folder, curve_up_to=2, **options) for _ in "ab")
    assert first.points == again.points
    assert first.points[1]["cut"]["perplexity_ratio"] > 1e6
    words = ["--from-curve", str(folder), "--drop", "2"]
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), *words]) == 0


def test_a_curve_ends_where_no_cut_has_a_number(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is complete as far as it goes, and starting it again tries the next depth again."""
    model.save_pretrained(tmp_path / "base")
    real, deepest = Search.find_point, 2

    def point(self: Search, count: int) -> dict[str, Any]:
        if count > deepest:
            raise CutError("every cut overflows")
        return real(self, count)

    monkeypatch.setattr(Search, "find_point", point)
    options = {"calibration": "self", "calibration_samples": 8, "calibration_length": 8, "context": 16, "drop": 1}
    for deepest in (2, 3, 0):
        curve = quality_curve(str(tmp_path / "base"), tmp_path / "curve", curve_up_to=4, **options)
        assert len(curve.points) == max(deepest, 3 - (deepest == 2))
        assert (tmp_path / "curve" / "curve.png").is_file()
        assert f"the curve ends at {len(curve.points)} layers: every cut overflows" in caplog.text
    with pytest.raises(CutError, match="every cut overflows"):
        quality_curve(str(tmp_path / "base"), None, curve_up_to=4, **options)


def test_the_knee() -> None:
    def curve(*kls: float) -> list[dict[str, Any]]:
        return [{"cut": {"kl": kl}} for kl in kls]

    assert stage.knee(curve(0.01, 0.02, 0.04, 0.5, 1.0)) == 3
    assert stage.knee(curve(0.01, 0.02, 1.0)) == 2
    assert stage.knee(curve(0.2, 0.4, 0.6, 0.8)) is None, "a straight line has none"
    assert stage.knee(curve(0.1, 1.0)) is None  # too few points to tell
    assert stage.knee(curve(0.0, 0.0, 0.0)) is None


@pytest.mark.parametrize(("rows", "repair", "warns"), [(16, "refit", True), (16, None, False), (128, "refit", False)])
def test_few_tokens_for_the_maps_that_sets_are_compared_by(
    rows: int, repair: str | None, warns: bool, model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.randint(3, VOCAB, (rows, 16), generator=torch.Generator().manual_seed(3))
    choice = CutOptions(drop=2, criterion="auto", repair=repair)
    Search(LayerWalk(model), CalibrationSet.from_ids(ids, "random"), range(1, 8), choice)
    assert ("calibration rows would choose more reliably" in caplog.text) == warns
