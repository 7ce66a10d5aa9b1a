"""`hf-layerprune rank`, and `prune` by a criterion that looks at the model."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_layerprune import quality_curve, rank_layers
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.cli import main
from hf_layerprune.cut.sizes import Sizes
from hf_layerprune.errors import CutError, UnsupportedModelError
from hf_layerprune.options import format_bytes
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_config
from hf_layerprune.select import ALL, CRITERIA
from hf_layerprune.select.registry import Criterion
from hf_layerprune.select.runner import score_layers
from hf_layerprune.select.scores import Choice, Scores
from hf_layerprune.stages.ranking import Ranking, draw_ranking

from .limits import largest_file
from .measure_models import LAYERS, write_gguf
from .test_verify_quantized import in_fp8, needs_no_gpu
from .tiny_models import tiny_model

FEW = ["--calibration-samples", "8", "--calibration-length", "16"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"Line {i} of a running text.\n" for i in range(100)))
    return path


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [value] if isinstance(value, float) else []


def test_rows_that_are_too_long_are_refused_before_a_weight_is_read(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    assert main(["rank", str(tmp_path), "--criterion", "kl", "--calibration-length", "99999"]) == 2
    assert "--calibration-length 99999 is more than the" in capsys.readouterr().err


def test_lengths_that_leave_no_layer_are_refused_before_a_weight_is_read(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((base / "config.json").read_bytes())
    assert main(["rank", str(tmp_path), "--criterion", "kl", "--lengths", "2,8", *FEW]) == 2
    assert "can't score blocks of 8 layers; use --lengths from 1 to 7" in capsys.readouterr().err


def test_in_python(base: Path, text: Path) -> None:
    few = {"calibration": str(text), "calibration_samples": 8, "calibration_length": 16}
    ranking = rank_layers(str(base), criteria=["reverse_order", "kl"], drop=3, **few)
    assert ranking.drops["reverse_order"] == [5, 6, 7]
    assert list(rank_layers(str(base), criteria="reverse_order,random", drop=3).drops) == ["reverse_order", "random"]
    scores = ranking.scores["kl"].layers
    assert scores is not None
    assert ranking.drops["kl"] == sorted(sorted(range(8), key=scores.__getitem__)[:3])


def test_any_criterion_that_chooses_without_scores(base: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` is not the only one that may be registered."""
    module = ModuleType("hf_layerprune.select.first")
    module.choose = lambda walk, calibration, count, free, choice: Choice(
        sorted(free)[:count], "first", "they are first"
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(CRITERIA, "first", Criterion("first", "first", "choice", "the first", "here", "none"))
    few = {"calibration": str(text), "calibration_samples": 8, "calibration_length": 16}
    ranking = rank_layers(str(base), criteria=["first", "kl"], drop=3, protect_first=1, **few)
    assert ranking.drops["first"] == [1, 2, 3]
    assert ranking.why == {"first": "they are first"}
    assert list(ranking.scores) == ["kl"]
    with pytest.raises(CutError, match="criterion 'first' gives no scores"):
        score_layers(tiny_model("llama"), None, ["first"])


@pytest.mark.parametrize("amount", [["--drop", "3"], ["--target-params", "51k"]])
@pytest.mark.parametrize("criterion", ["kl", "block_influence", "angular_distance"])
def test_the_best_block_is_the_one_that_prune_drops(
    base: Path, text: Path, tmp_path: Path, criterion: str, amount: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*amount, "--criterion", criterion, "--contiguous", "--calibration", str(text), *FEW]
    assert main(["rank", str(base), str(tmp_path / "out"), *words]) == 0
    shown = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "scores.json").read_text())["criteria"][criterion]
    assert main(["prune", str(base), str(tmp_path / "cut"), *words]) == 0
    (entry,) = json.loads((tmp_path / "cut" / "lineage.json").read_text())["entries"]
    assert found["drop_layers"] == entry["settings"]["drop_layers"]
    assert f"the block with the lowest {criterion}" in entry["selection"]["why"]
    if criterion == "kl":
        blocks = {one["start"]: one["score"] for one in found["blocks"] if one["length"] == len(found["drop_layers"])}
        assert found["drop_layers"][0] == min(blocks, key=blocks.__getitem__)
        assert f"\nkl, blocks of {len(found['drop_layers'])}: " in shown


def test_the_next_command_goes_on_with_the_same_model(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its line works in a shell, and keeps what was said of the text and the layers; a cut is not converted."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(base, "it's mine")
    said = ["--calibration", str(text), *FEW, "--dtype", "bfloat16", "--protect-last", "2", "--contiguous"]
    words = ["rank", "it's mine", "--criterion", "kl,block_influence", "--drop", "2", *said]
    for command in ("rank", "prune", "eval"):
        assert main(words) == 0
        program, *words = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
        assert (program, *words[:2]) == ("hf-layerprune", command, "pruned" if command == "eval" else "it's mine")
    assert words == ["eval", "pruned", "--base", "it's mine"]
    identity = json.loads(Path("curve", "curve.json").read_text())["identity"]
    assert (identity["protect_last"], identity["contiguous"], identity["dtype"]) == (2, True, "bfloat16")
    (entry,) = json.loads(Path("pruned", "lineage.json").read_text())["entries"]
    assert (entry["settings"]["dtype"], entry["calibration"]["samples"]) == ("auto", 8)


def test_the_next_command_does_not_convert_a_quantised_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True)
    AutoModelForCausalLM.from_pretrained(base, quantization_config=four_bit, device_map="cpu").save_pretrained("4bit")
    assert main(["rank", "4bit", "--criterion", "reverse_order", "--drop", "2", "--dtype", "float32"]) == 0
    _, *words = shlex.split(capsys.readouterr().out.rpartition("next: ")[2])
    assert words[:3] == ["prune", "4bit", "pruned"]
    assert main(words) == 0


@needs_no_gpu
@pytest.mark.parametrize(
    ("kind", "words", "dtypes"),
    [
        ("fp8", ["--curve", "--curve-up-to", "1", "--dtype", "bfloat16"], ["--dtype", "bfloat16"]),
        ("float16", ["--curve", "--curve-up-to", "1", "--dtype", "bfloat16"], ["--dtype", "bfloat16"]),
        ("float16", ["--criterion", "kl", "--dtype", "float32"], []),
        ("bfloat16", ["--curve", "--curve-up-to", "1", "--dtype", "float32"], []),
    ],
)
def test_the_next_command_converts_only_what_a_repair_needs_in_another_type(
    kind: str, words: list[str], dtypes: list[str], tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "fp8":
        in_fp8(Path("base"))
    else:
        tiny_model("llama").to(getattr(torch, kind)).save_pretrained("base")
    assert main(["rank", "base", *words, "--drop", "1", *FEW]) == 0
    shown, _, line = capsys.readouterr().out.rpartition("next: ")
    _, *command = shlex.split(line)
    assert command[:3] == ["prune", "base", "pruned"]
    assert [word for word in command if word in ("--dtype", "bfloat16", "float32")] == dtypes
    assert main(command) == 0
    assert "--curve" not in words or format_bytes(Path("pruned", "model.safetensors").stat().st_size) in shown


@pytest.mark.parametrize(("base", "target"), [("base", "target_memory"), ("base.gguf", "target_size")])
def test_a_target_is_for_the_cut_not_for_the_type_to_score_in(
    base: str, target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").to(torch.bfloat16).save_pretrained("base")
    write_gguf(Path("base.gguf"))
    size = Sizes(load_config(base), base)
    left = size.memory_bytes([6, 7]) if target == "target_memory" else size.file_bytes([2, 3])
    found = rank_layers(base, criteria="reverse_order", dtype="float32", **{target: left})
    assert len(found.drops["reverse_order"]) == 2
    quality_curve(base, "curve", dtype="float32", curve_up_to=1, calibration_samples=4, calibration_length=16)
    assert main(["prune", base, "pruned", "--from-curve", "curve", "--drop", "1"]) == 0
    (point,) = json.loads(Path("curve", "curve.json").read_text())["points"]
    assert point["bytes"] == Path("pruned", "model.safetensors").stat().st_size


def test_a_criterion_that_may_not_drop_enough_is_left_out(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Magnitude may drop two of the layers, and three must go. A block from layer 0 has no repairability."""
    words = ["--criterion", "magnitude_l1,reverse_order", "--target-params", "51k"]
    assert main(["rank", str(base), str(tmp_path / "out"), *words]) == 0
    assert "magnitude_l1 is left out: target_params=51k can't be met" in caplog.text
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert {*record["criteria"]} == {*record["protect"]} == {"reverse_order"}
    assert "magnitude" not in capsys.readouterr().out
    assert main(["rank", str(base), "--criterion", "magnitude_l1", "--target-params", "51k"]) == 2
    assert "--target-params 51k can't be met" in capsys.readouterr().err
    words = ["--protect-last", "1", "--drop", "7", *FEW]
    assert main(["rank", str(base), "--criterion", "repairability,kl", *words]) == 0
    assert "repairability is left out: no block of 7 layers may be dropped" in caplog.text


def test_what_an_architecture_needs_is_not_said_to_be_an_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("modernbert-decoder").save_pretrained(tmp_path)
    assert main(["rank", str(tmp_path), "--criterion", "magnitude_l1,reverse_order", "--protect-first", "2"]) == 0
    out = capsys.readouterr().out
    assert "\nlayer 0 can't be dropped from this architecture\n" in out
    assert "\nmagnitude_l1: layers 1,6-7 may not be dropped (--protect-first, --protect-last)\n" in out
    assert "\nreverse_order: layer 1 may not be dropped (--protect-first, --protect-last)\n" in out


def test_the_block_that_goes_is_shown_beside_those_of_other_lengths(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--criterion", "repairability,angular_distance", "--drop", "4", "--lengths", "2,3", *FEW]
    assert main(["rank", str(base), *words]) == 0
    out = capsys.readouterr().out
    for name in ("repairability", "angular_distance"):
        assert all(f"\n{name}, blocks of {length}: " in out for length in (2, 3, 4))


def test_the_commit_of_the_base_is_recorded(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_layerprune.runtime.loading.resolve_commit", lambda *words, **options: "c" * 40)
    words = [str(base), str(tmp_path / "out"), "--criterion", "magnitude_l2,block_influence", *FEW]
    assert main(["rank", *words]) == 0
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["commit"] == "c" * 40


def test_all_criteria(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["rank", str(base), str(tmp_path / "out"), "--criterion", "all,auto", "--calibration", str(text), *FEW]
    # Eight layers are few: what Taylor and magnitude protect by default leaves two.
    assert main([*words, "--drop", "2", "--lengths", "1-3"]) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(found["criteria"]) == {*ALL, "auto"}
    assert found["calibration"]["samples"] == 8
    assert found["calibration"]["source"] == text.name
    assert len(found["calibration"]["fingerprint"]) == 64
    assert (found["num_layers"], found["count"], found["seed"]) == (LAYERS, 2, 42)
    assert found["protect"]["taylor"] == [0, 1, 2, 3, 6, 7]
    assert found["protect"]["kl"] == []
    assert "\nmagnitude_l1, magnitude_l2, taylor: layers 0-3,6-7 may not be dropped (--protect-first, " in out
    assert all(math.isfinite(number) for number in numbers(found))
    for name, entry in found["criteria"].items():
        assert len(entry["drop_layers"]) == 2
        assert f"\n{name} " in f"\n{out}"
    for name in ("perplexity", "kl", "repairability"):
        assert all(f"\n{name}, blocks of {length}: " in out for length in (1, 2, 3))
        assert {block["length"] for block in found["criteria"][name]["blocks"]} == {1, 2, 3}
    assert found["criteria"]["perplexity"]["layers"] == [
        block["score"] for block in found["criteria"]["perplexity"]["blocks"] if block["length"] == 1
    ]
    said = [record.message for record in caplog.records if record.name.startswith("hf_layerprune")]
    assert said[0].startswith("scoring takes about"), "what it will cost is said before"
    pictures = {path.name for path in (tmp_path / "out").iterdir()} - {"scores.json"}
    names = ("choices", "scores", *(f"blocks-{n}" for n in ("angular_distance", "perplexity", "kl", "repairability")))
    assert pictures == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}

    assert main([*words, "--drop", "2"]) == 1
    assert "exists" in capsys.readouterr().err
    again = ["rank", str(base), str(tmp_path / "out"), "--criterion", "block_influence", "--force", *FEW]
    assert main([*again, "--calibration", str(text)]) == 0
    assert set(json.loads((tmp_path / "out" / "scores.json").read_text())["criteria"]) == {"block_influence"}


def test_a_model_that_cannot_be_ranked_on_text_has_scores_of_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("gemma3n_text").save_pretrained(tmp_path / "base")
    words = ["rank", str(tmp_path / "base"), str(tmp_path / "out"), "--protect-first", "0"]
    assert main(words) == 0
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(found["criteria"]) == {"reverse_order", "random", "magnitude_l1", "magnitude_l2"}
    assert "next: " not in capsys.readouterr().out  # no curve, and not every cut is possible
    (said,) = [record.message for record in caplog.records if "left out" in record.message]
    assert "repairability are left out: model type 'gemma3n_text' can't be ranked on text" in said
    assert main([*words, "--force", "--criterion", "kl,auto"]) == 1
    assert "can't be ranked on text" in capsys.readouterr().err


def test_criteria_without_scores_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """OLMo 2 has a norm after each projection, and Taylor and magnitude may drop only two of eight layers."""
    tiny_model("olmo2").save_pretrained(tmp_path / "base")
    words = [str(tmp_path / "base"), str(tmp_path / "out"), *FEW, "--drop", "3", "--force"]
    assert main(["rank", *words]) == 0
    found = set(json.loads((tmp_path / "out" / "scores.json").read_text())["criteria"])
    assert found == set(ALL) - {"magnitude_l1", "magnitude_l2", "taylor", "repairability"}
    out, said = capsys.readouterr().out, [record.message for record in caplog.records]
    assert "repairability" not in out
    assert [message.split(" is left out: ")[0] for message in said if " is left out: " in message] == [
        "magnitude_l1", "magnitude_l2", "taylor", "repairability",
    ]  # fmt: skip
    assert any("protect_first=4, protect_last=2); drop fewer" in message for message in said)
    assert main(["rank", *words, "--criterion", "repairability"]) == 1
    assert "so repairability has no scores" in capsys.readouterr().err


def test_packed_weights_leave_the_criteria_that_need_none() -> None:
    model, ids = tiny_model("llama"), torch.arange(40).view(4, 10)
    rows = CalibrationSet.from_ids(ids, "rows")
    weight: Any = model.model.layers[1].mlp.up_proj.weight
    packed = model.model.layers[1].mlp.up_proj
    packed.register_parameter("packed", torch.nn.Parameter(weight.data.to(torch.uint8), requires_grad=False))
    assert set(score_layers(model, rows, ["magnitude_l2", "taylor", "kl"], drop=1)) == {"kl"}
    with pytest.raises(UnsupportedModelError, match="layer 1 has packed weights"):
        score_layers(model, rows, ["taylor"], drop=1)


def test_weights_that_torchao_packs_say_that_they_are_floats() -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = tiny_model("llama").to(torch.bfloat16)
    quantize_(model.model.layers[1], Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedModelError, match="layer 1 has packed weights"):
        score_layers(model, None, ["magnitude_l1"], drop=1)


def test_without_output_or_text(base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["rank", str(base), "--criterion", "magnitude_l1,reverse_order", "--drop", "2"]) == 0
    out, err = capsys.readouterr()
    assert "reverse_order  6-7" in out
    assert "writing text" not in err
    assert main(["rank", str(base), "--criterion", "kl", *FEW]) == 0
    assert "kl" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop", "3", "--criterion", "taylor"], "only 2 may"),
        (["--lengths", "8", "--criterion", "kl", *FEW], "blocks of 8 layers; use --lengths from 1 to 7"),
        (["--lengths", "0", "--criterion", "kl", *FEW], "blocks of 0 layers"),
        (
            ["--lengths", "2", "--criterion", "taylor,random", *FEW],
            "--lengths 2 has no effect with criterion taylor and random",
        ),
        (["--criterion", "magnitude_l1", *FEW], "--calibration-samples 8 and --calibration-length 16 have no effect"),
        (
            ["--criterion", "kl", "--variant", "paper", *FEW],
            "--variant paper has no effect with criterion kl, of which there",
        ),
        (
            ["--criterion", "kl", "--repair", "linear", *FEW],
            "--repair linear has no effect on scores, unlike on a curve",
        ),
        (["--device", "tpu9", "--criterion", "kl", *FEW], "'tpu9' is not a device of this machine"),
    ],
)
def test_bad_words(words: list[str], message: str, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rank", str(base), *words]) == 2
    err = capsys.readouterr().err
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words", [["rank", "--criterion", "kl"], ["rank", "--curve"], ["prune", "--repair", "linear"]]
)
def test_a_missing_text_is_refused_before_a_weight_is_read(
    words: list[str], base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    command, *more = words
    assert main([command, str(bare), str(tmp_path / "out"), *more, "--calibration", "no.txt"]) == 1
    assert "no.txt does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_prune_by_a_criterion(base: Path, text: Path, tmp_path: Path) -> None:
    words = ["--calibration", str(text), *FEW, "--drop", "2"]
    for form, more in (("plain", []), ("repaired", ["--repair", "linear"]), ("adapter", ["--adapter"]), ("half", ["--dtype", "float16"])):  # fmt: skip
        out = tmp_path / form
        assert main(["prune", str(base), str(out), "--criterion", "auto", *words, *more]) == 0
        (entry,) = Lineage.load(out).entries
        assert entry["settings"]["criterion"] == "auto"
        assert entry["selection"]["why"].startswith("layers ")
        assert entry["selection"]["repair"] == ("linear" if form == "repaired" else None)
        assert entry["calibration"]["source"] == text.name
        assert ("repair" in entry) == (form == "repaired")
        dropped = entry["settings"]["drop_layers"]
        assert len(dropped) == 2
        if form != "adapter":
            model = AutoModelForCausalLM.from_pretrained(out)
            assert model.config.num_hidden_layers == LAYERS - 2
        else:
            assert json.loads((out / "adapter_config.json").read_text())["drop_layers"] == dropped


def test_the_lineage_has_the_scores(base: Path, text: Path, tmp_path: Path) -> None:
    words = ["--calibration", str(text), *FEW, "--drop", "2", "--criterion", "block_influence"]
    assert main(["prune", str(base), str(tmp_path / "cut"), *words]) == 0
    (entry,) = Lineage.load(tmp_path / "cut").entries
    scores = entry["selection"]["scores"]["layers"]
    assert len(scores) == LAYERS
    assert sorted(range(LAYERS), key=scores.__getitem__)[:2] == sorted(
        entry["settings"]["drop_layers"], key=scores.__getitem__
    )
    assert entry["settings"]["steps"] == 1
    assert entry["selection"]["seconds"] > 0


def test_a_report_of_layers_without_score() -> None:
    scores = {"block_influence": Scores("block_influence", "paper", (0, 1, 2), layers=[0.25, 1e-9, None])}
    lines = str(Ranking(scores, {"block_influence": [1]}, {}, {"required": [], "protect": {}})).splitlines()
    assert any(line.split() == ["1", "1e-09*"] for line in lines)
    assert any(line.split() == ["2", "-"] for line in lines)


def test_pictures_of_many_layers(tmp_path: Path) -> None:
    """As many as a 70B model has: each picture stays light."""
    n = 80
    alive = tuple(range(n))
    scores = {
        "kl": Scores("kl", "original", alive, layers=[10.0 ** -(i % 7) for i in alive]),
        "angular_distance": Scores(
            "angular_distance", "original", alive,
            blocks={alive[s : s + k]: (s + k) / 160 for k in range(1, n) for s in range(n - k + 1)},
        ),
    }  # fmt: skip
    drops = {"kl": list(range(60, 80)), "angular_distance": list(range(20))}
    draw_ranking(Ranking(scores, drops, {}, {"num_layers": n}), tmp_path)
    written = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert len(written) == 6
    assert all(1000 < size < 256 * 1024 for size in written.values())


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_full_disk_leaves_the_old_ranking(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    most = 6_000  # bytes a file: more than scores.json, less than a picture
    out = tmp_path / "out"
    words = ["rank", str(base), str(out), "--criterion", "magnitude_l1"]
    assert main([*words, "--drop", "2"]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert max(len(content) for content in before.values()) > most
    with largest_file(most):
        assert main([*words, "--drop", "1", "--force"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert f"could not write {out}/choices.png: File too large" in error, "not its temporary sibling"
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert os.listdir(tmp_path) == ["out"]
