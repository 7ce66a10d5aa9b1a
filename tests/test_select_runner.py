"""Choosing layers: shared passes, rounds, blocks, auto, and what is refused."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_layerprune import CheckpointError, CutError, LayerDropConfig, UnsupportedModelError, prune_with
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.cut.memory import drop_layers
from hf_layerprune.layer_ranges import format_layers
from hf_layerprune.options import CutOptions
from hf_layerprune.repair.fit import fit_repair
from hf_layerprune.runtime import divergence
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import ALL, taylor, trials
from hf_layerprune.select.cost import count_runs, log_estimate
from hf_layerprune.select.runner import choose_layers, score_layers
from hf_layerprune.select.scores import Scores
from hf_layerprune.select.search import HELD_OUT, Search
from hf_layerprune.select.sets import block_sums, consecutive_blocks, lowest_block, lowest_layers, split_rounds
from hf_layerprune.select.trials import Trial, evaluate_trials, layer_runs

from .tiny_models import LAYERS, VOCAB, randomize, tiny_config, tiny_input, tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    return CalibrationSet.from_ids(
        torch.randint(3, VOCAB, (8, 16), generator=torch.Generator().manual_seed(3)), "random"
    )


@torch.no_grad()
def measured(model: Any, dense: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Loss, and KL to the dense model."""
    logits, wanted = model(ids).logits.double(), dense(ids).logits.double().log_softmax(-1)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    return loss, (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1).mean().item()


def without(layers: tuple[int, ...]) -> Any:
    model = tiny_model("llama")
    if layers:
        drop_layers(model, list(layers))
    return model


# --- trials ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("memory", "head_tokens", "cached_logits"), [(None, 256, 1 << 18), (1, 5, 1), (20_000, 7, 300), (None, 256, 300)]
)
def test_any_cuts_in_any_memory(
    model: Any, text: CalibrationSet, memory: int | None, head_tokens: int, cached_logits: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(trials, "HEAD_TOKENS", head_tokens)
    monkeypatch.setattr(divergence, "_CACHED_LOGITS", cached_logits)
    if memory is not None:
        monkeypatch.setattr(trials, "state_memory", lambda walk: memory)
    drops = [(0,), (7,), (2, 3, 4), (1, 3, 6), (1, 3), (), (2, 3, 5, 6, 7)]
    found = evaluate_trials(LayerWalk(model), text, [Trial(drop) for drop in drops])
    for drop, outcome in zip(drops, found, strict=True):
        loss, kl = measured(without(drop), model, text.input_ids)
        assert outcome.loss == pytest.approx(loss, rel=1e-5)
        assert outcome.kl == pytest.approx(kl, rel=1e-4, abs=1e-7)


def test_cuts_share_what_is_before_them() -> None:
    n = 30
    every = [Trial((i,)) for i in range(n)]
    assert layer_runs(n, [Trial(())]) == n
    assert layer_runs(n, every) == n * (n - 1) // 2 + n - 1
    assert layer_runs(n, [Trial((3, 5)), Trial((3, 6))]) == 3 + 1 + 1 + 1 + 2 * (n - 7)
    assert layer_runs(n, [Trial((3,)), Trial((3,))]) == n - 1


def test_a_repair_is_tried_as_it_would_be_folded(model: Any, text: CalibrationSet) -> None:
    from hf_layerprune.select.search import repair_changes

    repair = fit_repair(model, [3, 4], text, "linear")
    (outcome,) = evaluate_trials(LayerWalk(model), text, [Trial((3, 4), repair_changes(repair))])
    cut = tiny_model("llama")
    plan = drop_layers(cut, [3, 4]).cut
    repair.apply(cut.model.layers, plan.new_index)
    loss, kl = measured(cut, model, text.input_ids)
    assert (outcome.loss, outcome.kl) == pytest.approx((loss, kl), rel=1e-4)
    assert evaluate_trials(LayerWalk(model), text, [Trial(())])[0].kl == pytest.approx(0, abs=1e-7), (
        "the model is as it was"
    )


# --- all criteria ---------------------------------------------------------------------------------------


def test_all_at_once_is_each_alone(model: Any, text: CalibrationSet) -> None:
    together = score_layers(model, text)
    assert list(together) == list(ALL)
    for name in ALL:
        alone = score_layers(model, text, [name])[name]
        assert (together[name].layers or []) == pytest.approx(alone.layers or [], rel=1e-6)
        assert together[name].blocks == pytest.approx(alone.blocks, rel=1e-6)


def test_a_model_in_training_mode_is_scored_without_dropout(text: CalibrationSet) -> None:
    """Each of a model's modules is in that mode again afterwards."""
    model = tiny_model("gpt2")
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.5
    expected = score_layers(model, text)
    model.train()
    model.transformer.h[2].eval()
    modes = [module.training for module in model.modules()]
    found = score_layers(model, text)
    assert found == expected
    assert [module.training for module in model.modules()] == modes


def test_all_read_each_layer_a_few_times(model: Any, text: CalibrationSet) -> None:
    """One pass for all that look on, one for perplexity and KL together, two for Taylor."""
    walk, visits = LayerWalk(model), [0] * LAYERS
    layer = walk.layer

    def counted(index: int) -> Any:
        visits[index] += 1
        return layer(index)

    walk.layer = counted
    score_layers(walk, text)
    assert visits == [4] * LAYERS


@pytest.mark.parametrize("criterion", ["block_influence", "perplexity", "kl", "taylor", "magnitude_l2", "angular_distance", "repairability"])  # fmt: skip
def test_rounds_score_what_is_left(criterion: str, model: Any, text: CalibrationSet) -> None:
    choice = choose_layers(
        model,
        text,
        CutOptions(drop=3, criterion=criterion, steps=3, protect_first=0, protect_last=0, variant="original"),
    )
    assert len(choice.scores) == 3
    assert "in 3 rounds" in choice.why
    gone: list[int] = []
    for found in choice.scores:
        assert list(found.alive) == [i for i in range(LAYERS) if i not in gone]
        # By hand: the model without what went before, scored again; its indices are those that are left.
        left = [i for i in range(LAYERS) if i not in gone]
        fresh = score_layers(without(tuple(gone)), text, [criterion], drop=1)[criterion] if gone else found
        if found.layers is not None and criterion != "kl":
            values = (
                {left[i]: score for i, score in enumerate(fresh.layers)} if gone else dict(enumerate(found.layers))
            )
            assert {i: s for i, s in enumerate(found.layers) if s is not None} == pytest.approx(values, rel=1e-4)
        (layer,) = found.pick(1, set(left))
        gone = sorted([*gone, layer])
    assert gone == choice.drop_layers


def test_greedy_kl_is_to_the_dense_model(model: Any, text: CalibrationSet) -> None:
    choice = choose_layers(model, text, CutOptions(drop=2, criterion="kl", steps=2))
    first = lowest_layers(choice.scores[0].layers, 1, range(LAYERS))[0]
    for i, score in enumerate(choice.scores[1].layers):
        if i != first:
            _, kl = measured(without(tuple(sorted((first, i)))), model, text.input_ids)
            assert score == pytest.approx(kl, rel=1e-4)


def test_contiguous_tries_blocks(model: Any, text: CalibrationSet) -> None:
    choice = choose_layers(model, text, CutOptions(drop=3, criterion="perplexity", contiguous=True))
    losses = {
        block: measured(without(block), model, text.input_ids)[0] for block in consecutive_blocks(range(LAYERS), 3)
    }
    assert tuple(choice.drop_layers) == min(losses, key=losses.__getitem__)
    summed = choose_layers(model, text, CutOptions(drop=3, criterion="block_influence", contiguous=True))
    assert "the block with the lowest block_influence" in summed.why
    layers = summed.scores[0].layers
    assert sum(layers[i] for i in summed.drop_layers) == min(sum(layers[i : i + 3]) for i in range(LAYERS - 2))


def test_protection_is_the_sources_own(model: Any, text: CalibrationSet) -> None:
    for criterion in ("taylor", "magnitude_l1", "magnitude_l2"):
        assert set(choose_layers(model, text, CutOptions(drop=2, criterion=criterion)).drop_layers) == {4, 5}
        free = choose_layers(model, text, CutOptions(drop=2, criterion=criterion, protect_first=0, protect_last=0))
        paper = choose_layers(model, text, CutOptions(drop=2, criterion=criterion, variant="paper"))
        assert len(free.drop_layers) == len(paper.drop_layers) == 2
        layers = free.scores[0].layers
        assert free.drop_layers == lowest_layers(layers, 2, range(LAYERS))
        with pytest.raises(CutError, match="only 2 may"):
            choose_layers(model, text, CutOptions(drop=3, criterion=criterion))
    assert (
        7
        not in choose_layers(model, text, CutOptions(drop=7, criterion="block_influence", variant="paper")).drop_layers
    )


def test_the_papers_draw() -> None:
    """Seed 42 of the code of arXiv:2411.15558: the layers that stay are drawn."""
    from random import Random

    from hf_layerprune.select import select_layers

    kept = Random(42).sample(list(range(32)), 24)
    assert select_layers(32, CutOptions(criterion="random", variant="paper")) == sorted(set(range(32)) - set(kept))


# --- auto -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repair", [None, "linear", "magnitude"])
def test_auto_picks_the_best_of_its_short_list(repair: str | None, model: Any, text: CalibrationSet) -> None:
    choice = choose_layers(model, text, CutOptions(drop=3, repair=repair, criterion="auto"))
    short = choice.details["short_list"]
    assert short[0]["layers"] in choice.why
    assert [c["kl"] for c in short] == sorted(c["kl"] for c in short)
    fitting, judging = text.split(HELD_OUT)
    cut = tiny_model("llama")
    plan = drop_layers(cut, choice.drop_layers).cut
    if repair:
        fit_repair(model, choice.drop_layers, fitting, repair).apply(cut.model.layers, plan.new_index)
    _, kl = measured(cut, model, judging.input_ids)
    assert short[0]["kl"] == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert (
        choose_layers(model, text, CutOptions(drop=3, repair=repair, criterion="auto")).drop_layers
        == choice.drop_layers
    )
    block = choose_layers(
        model, text, CutOptions(drop=3, repair=repair, contiguous=True, criterion="auto")
    ).drop_layers
    assert block == list(range(block[0], block[0] + 3))
    if repair == "linear":
        assert 0 not in choice.drop_layers


def test_auto_judges_by_the_cheap_repair(model: Any, text: CalibrationSet) -> None:
    """`borrow` takes minutes for each candidate, so its registry entry names a repair to judge by."""
    borrow, refit = (
        choose_layers(model, text, CutOptions(drop=3, repair=r, criterion="auto")) for r in ("borrow", "refit")
    )
    assert borrow == refit
    assert borrow.details["repair"] == "refit"


def test_auto_finds_the_layers_that_do_nothing(text: CalibrationSet) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for i in (2, 3, 4):
            for name in ("mlp.down_proj", "self_attn.o_proj"):
                model.model.layers[i].get_submodule(name).weight.mul_(1e-3)
    for criterion in ("auto", "kl", "block_influence", "angular_distance"):
        assert choose_layers(model, text, CutOptions(drop=3, criterion=criterion)).drop_layers == [2, 3, 4]


def test_auto_needs_rows_and_layers(model: Any, text: CalibrationSet) -> None:
    few = CalibrationSet.from_ids(text.input_ids[:3], "few")
    with pytest.raises(CutError, match="raise calibration_samples"):
        choose_layers(model, few, CutOptions(criterion="auto"))
    with pytest.raises(CutError, match="no block of 4 layers"):
        choose_layers(model, text, CutOptions(drop=4, contiguous=True, criterion="auto"), protected=[3, 4])
    found = choose_layers(model, text, CutOptions(drop=4, criterion="auto"), protected=[3])
    assert 3 not in found.drop_layers


# --- bad input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"criterion": "BLOCK-influence"}, "did you mean block_influence"),
        ({"criterion": "kl", "steps": 0}, "steps=0"),
        ({"criterion": "kl", "steps": 2, "contiguous": True}, "steps=2 and contiguous=True exclude"),
        ({"criterion": "kl", "drop": 8}, "at least one must stay"),
        ({"criterion": "kl", "variant": "mine"}, "variant 'mine' is unknown"),
    ],
)
def test_bad_settings(kwargs: dict[str, Any], message: str, model: Any, text: CalibrationSet) -> None:
    with pytest.raises(CutError, match=message):
        choose_layers(model, text, CutOptions(**{"drop": 3} | kwargs))


def test_no_text(model: Any) -> None:
    for criterion in ("taylor", "kl", "block_influence", "auto"):
        with pytest.raises(CutError, match="needs text"):
            choose_layers(model, None, CutOptions(criterion=criterion))
    assert choose_layers(model, None, CutOptions(drop=2, criterion="magnitude_l1")).drop_layers == [4, 5]
    assert choose_layers(model, None, CutOptions(drop=2, criterion="reverse_order")).drop_layers == [6, 7]


def test_tokens_of_another_model(model: Any) -> None:
    other = CalibrationSet.from_ids(torch.full((4, 8), VOCAB), "other")
    for criterion in ("block_influence", "taylor", "perplexity", "auto"):
        with pytest.raises(CheckpointError, match="use the tokenizer of this model"):
            choose_layers(model, other, CutOptions(criterion=criterion))


@pytest.mark.parametrize("criterion", ["block_influence", "taylor", "kl", "perplexity", "repairability", "auto"])
def test_damaged_weights_are_named(criterion: str, text: CalibrationSet) -> None:
    model = tiny_model("llama")
    walk = LayerWalk(model)
    with torch.no_grad():
        model.model.layers[5].mlp.up_proj.weight[3, 4] = math.nan
    with pytest.raises(CheckpointError, match=r"layer 5 has weights that are not finite, in mlp\.up_proj\.weight"):
        choose_layers(walk, text, CutOptions(drop=2, criterion=criterion, protect_first=0, protect_last=0))
    if criterion == "taylor":
        with pytest.raises(CheckpointError, match=r"in mlp\.up_proj\.weight: the checkpoint is damaged"):
            choose_layers(walk, None, CutOptions(drop=2, criterion="magnitude_l1"))


@pytest.mark.parametrize("criterion", ["block_influence", "magnitude_l2", "kl"])
def test_weights_beyond_the_dtype_are_named(criterion: str, text: CalibrationSet) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e7)
    with pytest.raises(
        CheckpointError, match=r"layer 2 has .*\.down_proj\.weight: they overflow float16, or the checkpoint"
    ):
        choose_layers(model.half(), text, CutOptions(drop=1, criterion=criterion))


@pytest.fixture(scope="module")
def overflowing() -> Any:
    """In float16 it runs, but not without layer 2, whose bias makes room for those of layers 4 and 5."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        for i, value in ((2, -4e4), (4, 4e4), (5, 4e4), (6, -4e4)):
            model.transformer.h[i].mlp.c_proj.bias[0] += value
    return model.half()


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "kl"},
        {"criterion": "perplexity", "contiguous": True},
        {"criterion": "kl", "steps": 2},
        {"criterion": "auto"},
        {"criterion": "auto", "contiguous": True},
        {"criterion": "auto", "repair": "borrow"},
        {"criterion": "kl", "drop": None, "max_kl": 0.9},
        {"criterion": "auto", "drop": None, "max_kl": 0.9},
    ],
)
def test_a_cut_that_overflows_is_not_chosen(
    options: dict[str, Any], overflowing: Any, text: CalibrationSet, caplog: pytest.LogCaptureFixture
) -> None:
    choice = choose_layers(overflowing, text, CutOptions(**{"drop": 2, **options}))
    assert choice.drop_layers
    (outcome,) = evaluate_trials(LayerWalk(overflowing), text, [Trial(tuple(choice.drop_layers))])
    assert options.get("repair") or math.isfinite(outcome.kl)
    assert options.get("repair") or re.search(r"is not finite are not chosen: (2|1-2)\b", caplog.text)
    assert caplog.text.count("are not chosen") <= 2  # first of blocks, then of layer 2, without which none can do


def test_no_cut_is_left(overflowing: Any, text: CalibrationSet) -> None:
    for options in ({"criterion": "kl"}, {}, {"repair": "magnitude"}, {"contiguous": True}):
        chosen = CutOptions(**{"drop": 1, "criterion": "auto", "protect_first": 2, "protect_last": 5, **options})
        if options.get("criterion") == "kl":
            with pytest.raises(CutError, match="only 0 of the layers that may be dropped have a score"):
                choose_layers(overflowing, text, chosen)
        else:
            with pytest.raises(
                CutError, match="every cut of this size that was tried overflows the model's data type"
            ):
                choose_layers(overflowing, text, chosen)
    with pytest.raises(CutError, match="every cut of this size that was tried overflows"):
        choose_layers(overflowing, text, CutOptions(max_kl=0.9, protect_first=2, protect_last=5))


def test_a_search_without_a_next_layer_takes_a_block(
    overflowing: Any, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(self: Search) -> int:
        raise CutError("no layer can go next")

    monkeypatch.setattr(Search, "_next_layer", stuck)
    choice = choose_layers(overflowing, text, CutOptions(drop=2, criterion="auto"))
    assert {one["found_by"] for one in choice.details["short_list"]} == {"best block"}
    search = Search(LayerWalk(overflowing), text, range(8), CutOptions(drop=2))
    assert search.find_point(2)["found_by"] == "best block"
    with pytest.raises(CutError, match="no layer can go next"):
        Search(LayerWalk(overflowing), text, [0, 2, 4, 6], CutOptions(drop=2)).find_sets(
            2
        )  # no two of them are adjacent


@pytest.mark.parametrize("left", [1, 0])
def test_where_the_best_set_overflows_on_other_rows_the_next_one_is_measured(
    left: int, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(LayerWalk(tiny_model("llama")), text, range(8), CutOptions(drop=2, contiguous=True))
    first, second, *_ = search.best_sets(2)
    real = evaluate_trials

    def broken(walk: Any, rows: CalibrationSet, trials: Any) -> Any:
        outcomes = real(walk, rows, trials)
        for trial, outcome in zip(trials, outcomes, strict=True):
            if rows is search.judge_rows and (not left or trial.drop == first):
                outcome.rows[:] = math.nan
        return outcomes

    monkeypatch.setattr("hf_layerprune.select.search.evaluate_trials", broken)
    if left:
        assert search.find_point(2)["layers"] == format_layers(second)
    else:
        with pytest.raises(CutError, match="every cut of this size that was tried overflows"):
            search.find_point(2)


def test_no_block_is_no_overflow(overflowing: Any, text: CalibrationSet) -> None:
    """Also where a block of another length did overflow."""
    search = Search(LayerWalk(overflowing), text, {0, 1, 2, 4}, CutOptions(drop=2, contiguous=True))
    assert (1, 2) not in search.score_blocks(2)
    with pytest.raises(CutError, match="no block of 4 layers may be dropped"):
        search.best_sets(4)


def test_where_every_cut_overflows_other_criteria_have_scores(
    text: CalibrationSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_layerprune.select.runner.drop_non_finite", lambda *_: {})
    assert [*score_layers(tiny_model("llama"), text, ["kl", "block_influence"])] == ["block_influence"]
    assert "kl is left out: every cut of this size" in caplog.text
    with pytest.raises(CutError, match="every cut of this size"):
        score_layers(tiny_model("llama"), text, ["kl"])


@pytest.mark.parametrize("criterion", ["kl", "auto"])
def test_a_damaged_head_is_no_fault_of_a_cut(criterion: str, text: CalibrationSet) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 4] = math.nan
    with pytest.raises(
        CheckpointError, match="the logits of the dense model are not finite: weights after its layers"
    ):
        choose_layers(model, text, CutOptions(drop=2, criterion=criterion))


def test_states_beyond_the_dtype_are_named(text: CalibrationSet) -> None:
    model = tiny_model("llama").half()
    walk = LayerWalk(model)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(6e4)
    with pytest.raises(CheckpointError, match=r"leave layer 2 are not finite: they overflow float16.*bfloat16"):
        choose_layers(walk, text, CutOptions(drop=2, criterion="kl"))


def test_what_a_norm_follows_has_no_repairability(text: CalibrationSet) -> None:
    with pytest.raises(UnsupportedModelError, match="repairability has no scores"):
        choose_layers(tiny_model("gemma2"), text, CutOptions(drop=3, criterion="repairability"))
    with pytest.raises(UnsupportedModelError, match=r"'bert' can't be repaired: .*leave the repair out"):
        choose_layers(tiny_model("bert"), text, CutOptions(drop=3, repair="linear", criterion="auto"))


@pytest.mark.parametrize("criterion", ["repairability", "auto"])
def test_experts_can_be_repaired(criterion: str) -> None:
    text = CalibrationSet.from_ids(tiny_input(batch=32, length=32), "random")
    choice = choose_layers(
        tiny_model("mixtral"), text, CutOptions(drop=2, contiguous=True, repair="linear", criterion=criterion)
    )
    assert len(choice.drop_layers) == 2


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "olmo2", "glm4"])
def test_auto_finds_what_is_repaired_through_a_norm(model_type: str) -> None:
    model, text = tiny_model(model_type), CalibrationSet.from_ids(tiny_input(batch=32, length=32), "random")
    choices = [
        choose_layers(model, text, CutOptions(drop=2, contiguous=True, repair=repair, criterion="auto"))
        for repair in ("borrow", None)
    ]
    repaired, cut = ({one["layers"]: one["kl"] for one in choice.details["short_list"]} for choice in choices)
    assert any(kl < cut.get(layers, 0) for layers, kl in repaired.items())


def test_experts_in_every_layer_leave_nothing_to_refit(text: CalibrationSet) -> None:
    """The type can be refitted, but not a model of it without dense layers."""
    config = tiny_config("qwen3_moe")
    config.decoder_sparse_step, config.mlp_only_layers = 1, []
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    for contiguous in (True, False):
        with pytest.raises(CutError, match=r"(no layer in front|works for none).*; use repair=.linear"):
            choose_layers(model, text, CutOptions(drop=2, contiguous=contiguous, repair="refit", criterion="auto"))


@pytest.mark.parametrize("contiguous", [True, False])
def test_only_blocks_that_can_be_refitted_are_on_the_short_list(text: CalibrationSet, contiguous: bool) -> None:
    """A map for the output of a mixture says nothing about `refit`, which can't change one."""
    config = tiny_config("qwen3_moe")
    config.decoder_sparse_step, config.mlp_only_layers = 1, [0]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model)
    choice = choose_layers(
        model, text, CutOptions(drop=2, contiguous=contiguous, repair="refit", criterion="auto", protect_last=0)
    )
    assert choice.drop_layers == [1, 2]


def test_layers_that_cannot_be_walked_still_have_weights(text: CalibrationSet) -> None:
    model = tiny_model("gemma3n_text")
    assert (
        len(choose_layers(model, None, CutOptions(drop=2, criterion="magnitude_l1", protect_first=0)).drop_layers) == 2
    )
    with pytest.raises(UnsupportedModelError, match=r"several streams of hidden states.*reverse_order"):
        choose_layers(model, text, CutOptions(drop=2, criterion="kl"))


# --- from the config ------------------------------------------------------------------------------------


def test_a_config_chooses(model: Any, text: CalibrationSet, tmp_path: Path) -> None:
    config = LayerDropConfig(
        criterion="block_influence", drop=3, calibration_samples=6, calibration_length=12, tune_lm_head=False
    )
    pruned = prune_with(config, tiny_model("llama"))
    assert len(config.drop_layers) == 3
    assert pruned.config.num_hidden_layers == LAYERS - 3
    record = pruned.base_model.prepared.record
    assert record["calibration"]["samples"] == 6
    assert record["selection"]["criterion"] == "block_influence"
    assert "lowest block_influence" in record["selection"]["why"]
    pruned.save_pretrained(tmp_path / "adapter")
    again = LayerDropConfig.from_pretrained(tmp_path / "adapter")
    assert again.drop_layers == config.drop_layers
    other = LayerDropConfig(criterion="kl", drop=3, tune_lm_head=False)
    with pytest.raises(CutError, match="cut already; specify its layers with drop_layers="):
        pruned.add_adapter("second", other)


# --- arithmetic -----------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 70))
def test_rounds_are_even(count: int, steps: int) -> None:
    shares = split_rounds(count, steps)
    assert sum(shares) == count
    assert len(shares) == min(count, steps)
    assert max(shares) - min(shares) <= 1


@given(st.lists(st.floats(-1e6, 1e6) | st.none(), min_size=2, max_size=20), st.data())
def test_the_lowest_are_picked(scores: list[float | None], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(scores) - 1))
    free = data.draw(st.sets(st.integers(0, len(scores) - 1)))
    able = [i for i in sorted(free) if scores[i] is not None]
    if len(able) < count:
        with pytest.raises(CutError, match="have a score"):
            lowest_layers(scores, count, free)
        return
    picked = lowest_layers(scores, count, free)
    assert set(picked) <= set(able)
    assert max(scores[i] for i in picked) <= min((scores[i] for i in able if i not in picked), default=math.inf)
    blocks = block_sums(scores, range(len(scores)), count)
    allowed = [block for block in blocks if set(block) <= free]
    if allowed:
        assert blocks[tuple(lowest_block(blocks, count, free))] == min(blocks[block] for block in allowed)


@settings(deadline=None)
@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.integers(0, 7))
def test_scores_are_numbers(value: float, layer: int) -> None:
    layers = [1.0] * 8
    layers[layer] = value
    with pytest.raises(CheckpointError, match=f"layer {layer} the score"):
        Scores("kl", "original", tuple(range(8)), layers=layers)
    with pytest.raises(CheckpointError, match="layers 2-3 the score"):
        Scores("kl", "original", tuple(range(8)), blocks={(2, 3): value})


def test_a_cost_is_said(model: Any, text: CalibrationSet, caplog: pytest.LogCaptureFixture) -> None:
    runs = LAYERS * (LAYERS - 1) // 2 + LAYERS - 1 + 1
    assert count_runs(LAYERS, ["perplexity"], 3) == (runs, LAYERS + 1)
    assert count_runs(LAYERS, ["reverse_order", "magnitude_l1"], 3) == (0, 0)
    assert count_runs(LAYERS, ALL, 3, [2, 3])[0] > runs + LAYERS * 5
    with caplog.at_level("INFO", "hf_layerprune"):
        log_estimate(LayerWalk(model), text, "scoring", runs, LAYERS + 1)
    assert "scoring takes about 1 s" in caplog.text


def test_a_criterion_that_needs_too_much_memory_is_left_out(
    model: Any, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(taylor, "free_bytes", lambda device: 1000)
    assert list(score_layers(model, text, ["taylor", "magnitude_l1"])) == ["magnitude_l1"]
    assert "taylor is left out: taylor keeps the input of every layer" in caplog.text
    with pytest.raises(CutError, match="use calibration_samples=1"):
        score_layers(model, text, ["taylor"])
