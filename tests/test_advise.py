"""What to drop, and how to heal it, in the time that there is."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given, strategies as st
from transformers import LlamaForCausalLM

from hf_layerprune import CutError
from hf_layerprune.cli import build_parser, main
from hf_layerprune.heal.frontier import Frontier
from hf_layerprune.layer_ranges import parse_layers
from hf_layerprune.options import options_from_args
from hf_layerprune.repair.fit import check_repair
from hf_layerprune.runtime.loading import load_config
from hf_layerprune.stages.advise import _advise_paper_recipe, advise
from hf_layerprune.stages.requests import AdviseRequest, PruneRequest

from .heal_makers import load_recipe
from .measure_models import write_model
from .tiny_models import tiny_config, tiny_model


def said(capsys: pytest.CaptureFixture[str], *words: object) -> dict:
    assert main(["advise", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("frontier", Frontier.load_all(), ids=lambda one: one.source["heal"]["repair"])
def test_measured_points_are_returned_as_they_are(frontier: Frontier) -> None:
    for point in frontier.points:
        found = frontier.expected_loss(point["dropped"] / point["layers"], point["tokens"])
        assert (found.kl, found.ln_ratio) == pytest.approx((point["kl"], point["ln_ratio"]))
        assert not found.is_extrapolated


@given(st.sampled_from(Frontier.load_all()), st.floats(0.001, 0.25), st.floats(0, 1e6))
def test_a_loss_lies_between_those_of_its_neighbours(frontier: Frontier, share: float, tokens: float) -> None:
    kls = [point["kl"] for point in frontier.points]
    assert 0 < frontier.expected_loss(share, tokens).kl <= max(kls)
    more = frontier.expected_loss(share, tokens + 1000)
    assert math.isfinite(more.perplexity_ratio)
    assert frontier.expected_loss(share / 2, tokens).kl < frontier.expected_loss(share, tokens).kl


def test_more_time_heals_more_tokens_and_allows_more(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brief, long = (said(capsys, base, "--minutes", minutes) for minutes in (0.001, 10_000))
    assert brief["tokens"] == 0
    assert brief["command"][:2] == ["hf-layerprune", "prune"]
    assert long["tokens"] > 1_000_000
    assert long["command"][:2] == ["accelerate", "launch"]
    assert long["drop"] >= brief["drop"]
    assert long["beyond_what_was_measured"]
    assert "refit" in brief["command"]
    assert long["settings"]["repair"] == "borrow"


@pytest.mark.parametrize(
    ("drop", "unmeasured"),
    [(1, "No run on this much text was measured. "), (6, "No cut of this many layers was measured. ")],
)
def test_what_was_not_measured_is_named(
    drop: int, unmeasured: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["advise", str(base), "--minutes", "10000", "--drop", str(drop)]) == 0
    assert f"\n{unmeasured}The loss shown is that of the " in capsys.readouterr().out


def test_the_command_for_too_little_time_prunes(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = said(capsys, base, "--minutes", "0.001", "--drop", "2")["command"]
    command[command.index("pruned")] = str(tmp_path / "pruned")
    assert main([*command[1:], "--calibration-samples", "8", "--calibration-length", "32"]) == 0
    assert json.loads((tmp_path / "pruned" / "config.json").read_text())["num_hidden_layers"] == 6


def test_what_is_not_made_is_told(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tmp_path / "advice.yaml"
    assert main(["advise", str(base), str(settings), "--minutes", "0.001"]) == 0
    assert f"{settings} is not written, since nothing is trained; next: hf-layerprune prune" in capsys.readouterr().out
    assert not settings.exists()
    (base_without_weights := tmp_path / "base").mkdir()
    (base_without_weights / "config.json").write_bytes((base / "config.json").read_bytes())
    assert main(["advise", str(base_without_weights), "--target-speedup", "1.3"]) == 2  # before a weight is read
    assert (
        "--target-speedup is not available here; find the number of layers with hf-layerprune rank --curve, and pass it as --drop N"
        in capsys.readouterr().err
    )


def test_the_settings_are_those_of_the_recipe(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "advice.yaml"
    assert main(["advise", str(base), str(file), "--minutes", "100000", "--drop", "2"]) == 0
    settings = yaml.safe_load(file.read_text())
    assert settings["drop"] == 2
    _, training, model, data, cut, *_ = load_recipe().make_parser().parse_args_and_config(["--config", str(file)])
    assert (model.model_name_or_path, cut.drop, cut.repair) == (str(base), 2, "borrow")
    assert (training.method, training.loss) == ("behind2", "kd")
    assert data.datasets[0].path == "allenai/c4"
    assert main(["advise", str(base), str(file)]) == 1  # it is not replaced


def test_a_curve_of_the_model_sets_the_scale(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--calibration-samples", "12", "--calibration-length", "16", "--context", "16"]
    assert main(["rank", str(base), str(tmp_path / "curve"), "--curve", "--curve-up-to", "2", *few]) == 0
    point = json.loads((tmp_path / "curve" / "curve.json").read_text())["points"][1]
    capsys.readouterr()
    told = said(capsys, base, "--from-curve", tmp_path / "curve", "--drop", "2", "--minutes", "0.001")
    assert told["kl"] == pytest.approx((point.get("repaired") or point["cut"])["kl"], rel=1e-3)
    assert told["settings"] == {}
    request = options_from_args(build_parser().parse_args(told["command"][1:]), PruneRequest)
    request.refuse_unused()  # words that prune takes
    assert request.drop_layers == parse_layers(point["layers"])


def test_a_target_and_a_budget(base: Path) -> None:
    whole = advise(AdviseRequest(str(base), minutes=1e5)).record["parameters"]
    assert advise(AdviseRequest(str(base), minutes=1e5, target_params=int(0.8 * whole))).record["drop"] > 1
    with pytest.raises(CutError, match="less than the"):
        advise(AdviseRequest(str(base), minutes=1, max_kl=1e-9))
    with pytest.raises(CutError, match="min_top1_agreement is not available here"):
        AdviseRequest(str(base), min_top1_agreement=0.8)


@pytest.mark.parametrize("minutes", ["0.001", "100000"], ids=["prune", "recipe"])
def test_a_target_is_advised_as_it_was_counted(base: Path, capsys: pytest.CaptureFixture[str], minutes: str) -> None:
    """With the context and the batch: for others, another number of layers would go."""
    counted = ["--target-memory", "1200KB", "--context", "256", "--batch", "8", "--target-dtype", "float32"]
    told = said(capsys, base, *counted, "--minutes", minutes)
    if told["settings"]:
        kept = {"target_memory": 1_200_000, "context": 256, "batch": 8, "target_dtype": "float32"}
        assert kept.items() <= told["settings"].items()
    else:
        request = options_from_args(build_parser().parse_args(told["command"][1:]), PruneRequest)
        assert (request.target_memory, request.context, request.batch) == (1_200_000, 256, 8)
        assert request.target_dtype == "float32"


@pytest.mark.parametrize(
    ("model_type", "repair"),
    [("bert", None), ("mixtral", "linear"), ("qwen3_moe", "linear"), ("mamba", "refit"), ("gemma", "borrow")],
)
def test_only_repairs_that_every_cut_takes_are_advised(model_type: str, repair: str | None, tmp_path: Path) -> None:
    """Some layers of the Qwen have experts, and none of the Mixtral's has a plain MLP."""
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    advice = advise(AdviseRequest(str(tmp_path / "base"), minutes=1e5, drop=1))
    assert advice.settings.get("repair") == advice.record["repair"] == repair
    assert ("expect to lose more" in advice.text) == (repair in (None, "linear"))
    if repair:
        check_repair(load_config(str(tmp_path / "base")), [2], 8, repair)


def test_rows_fit_the_context_of_the_model(base: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path / "small")
    config = json.loads((small / "config.json").read_text()) | {"max_position_embeddings": 64}
    (small / "config.json").write_text(json.dumps(config))
    assert advise(AdviseRequest(str(small), minutes=1e5)).settings["max_length"] == 64
    assert advise(AdviseRequest(str(base), minutes=1e5)).settings["max_length"] == 512


def test_a_pruned_model_gets_no_advice(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", str(base), str(tmp_path / "pruned"), "--drop", "2"]) == 0
    assert main(["advise", str(tmp_path / "pruned"), str(tmp_path / "advice.yaml")]) == 2
    assert "is pruned already" in capsys.readouterr().err
    assert not (tmp_path / "advice.yaml").exists()


def test_more_layers_than_were_measured_have_no_loss(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = said(capsys, base, "--drop", "6")
    assert told["perplexity_ratio"] is told["kl"] is None
    assert main(["advise", str(base), "--drop", "6"]) == 0
    assert re.search(r"6 of 8 *>x1\.", capsys.readouterr().out)


def test_a_target_where_the_last_layer_must_stay(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox_japanese")
    model.save_pretrained(tmp_path)
    advice = advise(AdviseRequest(str(tmp_path), minutes=0.001, target_params=int(0.8 * model.num_parameters())))
    assert 1 < advice.record["drop"] < 7


def test_a_model_of_one_layer_gets_no_advice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("llama")
    config.num_hidden_layers = 1
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert main(["advise", str(tmp_path)]) == 2
    assert "the model has only one layer, which must stay" in capsys.readouterr().err


def test_a_place_for_the_settings_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Said before the model is looked at."""
    assert main(["advise", str(tmp_path / "none"), str(tmp_path / "no" / "x.yaml")]) == 1
    assert "no does not exist; create it first" in capsys.readouterr().err


def test_at_the_papers_size_the_papers_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = said(capsys, tmp_path)
    assert (told["by"], told["measured"]) == ("the paper", False)
    assert told["settings"]["method"] == "lm_head+last3"
    folder = tmp_path / "an 8B model"  # a name that a shell would split
    folder.mkdir()
    shutil.copy(tmp_path / "config.json", folder)
    assert main(["advise", str(folder), "--target-params", "6.3B"]) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "--minutes, --dtype and --device have no effect" in out
    assert f"hf-layerprune rank '{folder}' curve --curve" in out
    assert "To meet target_params, the last 8 of 32 layers go." in out
    assert main(["advise", str(folder), "--target-params", "1M"]) == 2
    assert "--target-params 1M can't be met" in capsys.readouterr().err
    assert main(["advise", str(folder), "--drop", "32"]) == 2
    assert "--drop 32 would drop all 32 layers of the model" in capsys.readouterr().err
    assert main(["advise", str(tmp_path), "--from-curve", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("hf-layerprune: --from-curve ")
    assert "has no effect for 5 billion" in error
    of_a_branch = _advise_paper_recipe(AdviseRequest("org/model", revision="v1"), load_config(folder))
    assert "hf-layerprune rank org/model curve --curve --revision v1" in of_a_branch.text
