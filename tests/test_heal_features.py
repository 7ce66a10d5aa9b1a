"""Feature reconstruction: the first phase, which trains the layers in front of a cut on the dense model's states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from trl import ModelConfig

from hf_layerprune.errors import CutError
from hf_layerprune.families import Cut
from hf_layerprune.heal.features import RATE, cut_boundaries, feature_loss, phased_schedule
from hf_layerprune.heal.methods import parse_method

from .heal_makers import Bench, losses, rows, tuned

FEATURES: dict[str, Any] = {"method": "behind1", "loss": "kd", "features": 0.99, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("middle"), drop=[3, 4])


@given(st.integers(2, 12).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_a_place_behind_each_dropped_block(drawn: tuple[int, set[int]]) -> None:
    count, kept = drawn
    cut = Cut(tuple(sorted(kept)), count)
    for front, dense in cut_boundaries(cut).items():
        assert cut.keep[front - 1] < dense - 1  # the block lies between the layer in front and the place
        assert not set(range(cut.keep[front - 1] + 1, dense)) & kept
        assert front == len(cut.keep) or cut.keep[front] == dense
    blocks = [i for i in cut.drop if i + 1 not in cut.drop]
    assert len(cut_boundaries(cut)) == sum(cut.keep[0] < last for last in blocks)


def states_of(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return model.eval()(ids, output_hidden_states=True).hidden_states


def wanted_loss(bench: Bench, trainer: Any) -> float:
    """The loss of all rows, by the models' own hidden states, row by row."""
    total, count = 0.0, 0
    for row in trainer.numbered_datasets[0]["input_ids"]:
        ids = torch.tensor([row])
        ours, theirs = (states_of(model, ids) for model in (trainer.plain_model, bench.dense))
        for front, dense in cut_boundaries(bench.cut).items():
            total += feature_loss(ours[front], theirs[dense]).sum().item() / len(cut_boundaries(bench.cut))
        count += len(row)
    return total / count


@pytest.mark.parametrize("drop", [[3, 4], [2, 5], [1, 3, 4]])
def test_the_loss_is_that_of_hidden_states(tmp_path: Path, drop: list[int]) -> None:
    bench = Bench(tmp_path, drop=drop)
    trainer = bench.trainer(**FEATURES, max_steps=1, per_device_train_batch_size=24)
    wanted = wanted_loss(bench, trainer)
    trainer.train()
    assert losses(trainer) == pytest.approx([wanted], rel=1e-4)
    assert trainer.state.log_history[0]["features"] == pytest.approx(wanted, rel=1e-4)


def test_the_last_layers_may_be_what_was_dropped(tmp_path: Path) -> None:
    found = Bench(tmp_path, drop=[6, 7]).losses(**FEATURES | {"method": "last2", "max_steps": 40})
    assert found[-1] < 0.9 * found[0]


def test_layers_in_front_learn_and_the_others_wait(middle: Bench) -> None:
    trainer = middle.trainer(**FEATURES, max_steps=30)
    before = tuned(trainer)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    changed = {name for name, parameter in tuned(trainer).items() if not torch.equal(parameter, before[name])}
    assert changed
    assert all(".layers.2." in name for name in changed)


def test_then_the_loss_proper(middle: Bench) -> None:
    trainer = middle.trainer(**FEATURES | {"features": 0.5, "loss": "ce+kd", "kd_alone": 0.5}, max_steps=8)
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert [sorted({"features", "kd"} & log.keys()) for log in logs] == [["features"]] * 4 + [["kd"]] * 4
    assert [log["loss"] == pytest.approx(log["kd"], rel=1e-4) for log in logs[4:]] == [True, True, False, False]
    tokens = [log["num_tokens"] for log in logs]
    assert tokens == sorted(tokens)
    plain = middle.trainer(**FEATURES | {"features": 0.5, "loss": "ce", "cache": "off"}, max_steps=8)
    plain.train()
    assert losses(plain)[4] > losses(trainer)[4]
    assert "kd" not in plain.state.log_history[5]


@pytest.mark.parametrize(
    "settings",
    [
        {"cache": "off"},
        {"cache": "off", "gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"pad_to_multiple_of": 8},
    ],
)
def test_the_same_however_it_is_computed(middle: Bench, settings: dict[str, Any]) -> None:
    usual = middle.losses(**FEATURES | {"features": 0.5}, cache="on")
    assert middle.losses(**FEATURES | {"features": 0.5} | settings) == pytest.approx(usual, rel=1e-4)


def test_rows_in_one_sequence(middle: Bench) -> None:
    packed = FEATURES | {"packing": True, "max_steps": 4, "features": 0.5}
    usual = middle.losses(**packed, cache="on")
    for more in ({"cache": "off"}, {"pad_to_multiple_of": 64}, {"pad_to_multiple_of": 64, "cache": "off"}):
        assert middle.losses(**packed | more) == pytest.approx(usual, rel=1e-4)


def test_places_without_a_trained_layer_in_front_do_not_count(tmp_path: Path) -> None:
    bench = Bench(tmp_path, drop=[1, 5])
    found = [bench.losses(**FEATURES | {"method": "last4", "cache": cache}) for cache in ("on", "off")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    alone = bench.trainer(**FEATURES | {"method": "last4"})
    assert alone.feature_phase.teacher_depths == (6,)


def test_an_evaluation_is_that_of_the_loss(middle: Bench) -> None:
    evaluated = {"eval_rows": rows(6, seed=1), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = middle.trainer(**FEATURES | {"features": 0.5}, **evaluated)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert [log["eval_loss"] == pytest.approx(log["eval_kd"], rel=1e-4) for log in logs] == [True, True]


def test_resumed_inside_the_phase(middle: Bench, tmp_path: Path) -> None:
    settings = FEATURES | {"features": 0.5, "max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    trainer = middle.trainer(**settings, output_dir=str(tmp_path / "run"))
    trainer.train()
    again = middle.trainer(**settings, output_dir=str(tmp_path / "again"))
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(again)[2:] == pytest.approx(losses(trainer)[2:], rel=1e-5)


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "gpt_neox", "granite"])
def test_other_families(model_type: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, model_type, drop=[3, 4])
    found = [bench.losses(**FEATURES, cache=cache, max_steps=4) for cache in ("on", "off")]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_lora_learns_in_front_of_the_cut(middle: Bench) -> None:
    lora = parse_method("lora").adapter(ModelConfig(lora_r=4))
    trainer = middle.trainer(**FEATURES | {"method": "lora"}, peft_config=lora, max_steps=3)
    before = tuned(trainer)
    trainer.train()
    changed = [name for name, parameter in tuned(trainer).items() if not torch.equal(parameter, before[name])]
    assert changed
    assert not any(f".layers.{i}." in name for i in (3, 4, 5) for name in changed)


def test_nothing_to_train_in_front(middle: Bench, tmp_path: Path) -> None:
    with pytest.raises(CutError, match="none of them is trained; use --method behind2 or cut2"):
        middle.trainer(**FEATURES | {"method": "last2"})
    with pytest.raises(CutError, match="none of them is trained"):
        Bench(tmp_path, drop=[0, 1]).trainer(**FEATURES)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
        ({"ddp_find_unused_parameters": False}, "ddp_find_unused_parameters"),
    ],
)
def test_settings_that_rule_it_out(middle: Bench, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=f"features=... needs {message}.*or use features=0"):
        middle.trainer(**FEATURES | settings)


def test_the_learning_rate_falls_with_the_time_and_is_higher_at_first(middle: Bench) -> None:
    trainer = middle.trainer(**FEATURES | {"features": 0.5}, max_steps=8)
    trainer.train()
    found = [log["learning_rate"] for log in trainer.state.log_history[:-1]]
    left = [4.4, 4.3, 4.2, 4.1, 4, 3, 2, 1]  # in steps of distillation, ten times as long as the others
    assert found == pytest.approx([(2.5 if i < 4 else 1) * 1e-3 * x / 4.4 for i, x in enumerate(left)])


def test_the_warm_up_keeps_its_steps() -> None:
    rise = [phased_schedule(lambda step: min(1.0, step / 6), 40, 200, 6)(step) for step in range(200)]
    assert rise[:7] == pytest.approx([RATE * step / 6 for step in range(7)])
    assert rise[39:41] == [RATE, 1.0]


@pytest.mark.parametrize(("share", "steps"), [(0.07, 100), (0.29, 100), (0.5, 7)])
def test_the_schedule_and_the_steps_agree(middle: Bench, share: float, steps: int) -> None:
    trainer = middle.trainer(**FEATURES | {"features": share, "max_steps": steps})
    trainer.model.train()
    trainer.state.max_steps = steps
    trainer.create_optimizer_and_scheduler(steps)
    rates = []
    for step in range(steps):
        trainer.state.global_step = step
        factor = trainer.lr_scheduler.lr_lambdas[0](step)
        rates.append((trainer.is_feature_step, factor > 1))
        if step > steps / 2:
            break
    assert all(first == higher for first, higher in rates)
