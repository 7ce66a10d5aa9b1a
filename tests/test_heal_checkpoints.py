"""Checkpoints: what they hold, training that goes on from one, and values that are not finite, which none may hold."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_layerprune.errors import CheckpointError, LayerPruneError
from hf_layerprune.heal.checkpoints import checkpoint_to_resume, last_checkpoint
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.trainer import HealTrainer

from .heal_makers import DROP, Bench, losses, rows, tuned, word_tokenizer
from .tiny_models import EAGER


@pytest.mark.parametrize("cache", ["off", "on"])
def test_resumed_equals_uninterrupted(llama: Bench, tmp_path: Path, cache: str) -> None:
    settings = {
        "cache": cache,
        "loss": "ce+kd",
        "kd_alone": 0.6,
        "save_strategy": "steps",
        "save_steps": 2,
        "max_steps": -1,
        "num_train_epochs": 2,
    }
    whole = llama.trainer(output_dir=str(tmp_path / "whole"), **settings)
    whole.train()

    class Stop(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                raise KeyboardInterrupt

    broken = llama.trainer(output_dir=str(tmp_path / "broken"), **settings)
    broken.add_callback(Stop())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = llama.trainer(output_dir=str(tmp_path / "broken"), **settings)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for name, parameter in tuned(whole).items():
        assert torch.equal(parameter, tuned(resumed)[name]), name


@pytest.mark.parametrize("method", ["last1", "last3"])
def test_resuming_with_other_weights(llama: Bench, tmp_path: Path, method: str) -> None:
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    llama.trainer("last2", max_steps=2, **settings).train()
    with pytest.raises(CheckpointError, match=r"can't resume .*checkpoint-2: .*; train the same weights as it does"):
        llama.trainer(method, max_steps=4, cache="on", **settings).train(resume_from_checkpoint=True)
    assert not (tmp_path / "_cache").exists()  # nothing was computed


def whole_trainer(pruned: Path, output: Path, **settings: Any) -> HealTrainer:
    """A trainer of all weights."""
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32, **EAGER)
    settings = {
        "save_strategy": "steps",
        "save_steps": 2,
        "max_length": 32,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    } | settings
    args = HealConfig(str(output), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **settings)
    return HealTrainer(model, args, train_dataset=rows(), processing_class=word_tokenizer())


def test_resuming_a_model_whose_weights_have_other_names_on_disk(tmp_path: Path) -> None:
    """transformers would skip them with a warning, and go on from the weights before training."""
    pruned = Bench(tmp_path, "mixtral").pruned
    whole = whole_trainer(pruned, tmp_path / "run", max_steps=4)
    sharded = whole.model.save_pretrained = partial(whole.model.save_pretrained, max_shard_size="40KB")
    whole.train()
    assert whole.model.save_pretrained is sharded
    assert len([*(tmp_path / "run" / "checkpoint-2").glob("*.safetensors")]) > 1
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    resumed = whole_trainer(pruned, tmp_path / "run", max_steps=4)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    resumed.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == load_file(pruned / "model.safetensors").keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda tensors: tensors.pop("model.norm.weight"),
            "lacks model.norm.weight; train the same weights as it does",
        ),
        (lambda tensors: tensors.update(more=torch.ones(2)), "has more; "),
        (lambda tensors: tensors.update({"lm_head.weight": torch.ones(2)}), "another shape of lm_head.weight; "),
        (lambda tensors: tensors.clear(), r"lacks .*; .* engine \(FSDP, DeepSpeed or neither\)"),
    ],
)
def test_resuming_a_whole_model_from_other_weights(
    llama: Bench, tmp_path: Path, change: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_trainer(llama.pruned, tmp_path, max_steps=2).train()
    path = tmp_path / "checkpoint-2" / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    trainer = whole_trainer(llama.pruned, tmp_path, max_steps=4)
    monkeypatch.setattr(trainer, "_load_from_checkpoint", None)  # headers tell
    with pytest.raises(CheckpointError, match=f"can't resume .*checkpoint-2: it .*{said}"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("optim", ["sgd", "rmsprop", "adafactor"])
def test_resuming_with_another_optimizer(llama: Bench, tmp_path: Path, optim: str) -> None:
    """Their states have other fields; without a check, the first step would fail for lack of one."""
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    llama.trainer(max_steps=2, **settings).train()
    with pytest.raises(
        LayerPruneError, match="its optimizer has other settings; train the same weights as it does, with"
    ):
        llama.trainer(max_steps=4, optim=optim, cache="on", **settings).train(resume_from_checkpoint=True)
    assert not (tmp_path / "_cache").exists()  # nothing was computed


@pytest.mark.parametrize("stable", [False, True], ids=["older torch", "stable_adamw"])
def test_resuming_with_groups_that_are_not_those_of_a_new_optimizer(
    llama: Bench, tmp_path: Path, stable: bool
) -> None:
    """torch adds what an older version did not save; stable_adamw adds a setting in training."""
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    llama.trainer(max_steps=2, **settings).train()
    path = tmp_path / "checkpoint-2" / "optimizer.pt"
    state = torch.load(path, weights_only=True)
    for group in state["param_groups"]:
        if stable:
            group["step"] = 2
        else:
            del group["decoupled_weight_decay"]
    torch.save(state, path)
    trainer = llama.trainer(max_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4


def test_the_optimizer_of_lomo_has_all_weights(llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is made once the frozen ones are taken out, as it was for the checkpoint."""
    llama.trainer(max_steps=2, output_dir=str(tmp_path), save_strategy="steps", save_steps=2).train()
    trainer = llama.trainer(max_steps=4)
    trainer.args.optim = "lomo"
    trainer.check_resumable(str(tmp_path / "checkpoint-2"))
    assert trainer.optimizer is None


def test_resuming_with_other_settings_of_the_optimizer(llama: Bench, tmp_path: Path) -> None:
    """They count, though torch restores those of the checkpoint: the history would name settings that never did."""
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    llama.trainer(**settings).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    others = {"learning_rate": 1e-3, "weight_decay": 0.5, "adam_beta1": 0.5, "adam_epsilon": 1e-6}
    trainer = llama.trainer(**settings | others)
    trainer.train(resume_from_checkpoint=True)
    for group in trainer.optimizer.param_groups:
        assert (group["initial_lr"], group["betas"], group["eps"]) == (1e-3, (0.5, 0.999), 1e-6)
    assert trainer.optimizer.param_groups[0]["weight_decay"] == 0.5
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2, 7.5e-3, 5e-4, 2.5e-4])


@pytest.mark.parametrize("kind", ["reduce_lr_on_plateau", "greedy"])
def test_resuming_with_another_rate_for_a_schedule_without_a_first_one(
    llama: Bench, tmp_path: Path, kind: str
) -> None:
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": kind}
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": rows(4)}
    llama.trainer(max_steps=2, learning_rate=1e-3, **settings).train()
    trainer = llama.trainer(max_steps=3, learning_rate=1e-2, **settings)
    trainer.train(resume_from_checkpoint=True)
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-3, 1e-3, 1e-2])


@pytest.mark.parametrize(
    "change", [{"learning_rate": 5e-3}, {"max_steps": 6}, {"lr_scheduler_type": "linear"}], ids=str
)
def test_the_first_step_of_a_resumed_run_has_the_rate_of_its_own_schedule(
    llama: Bench, tmp_path: Path, change: dict[str, Any]
) -> None:
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings |= {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}}
    llama.trainer(**settings).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    settings |= change | ({"lr_scheduler_kwargs": {}} if "lr_scheduler_type" in change else {})
    resumed, whole = (llama.trainer(**settings | {"save_strategy": "no"}) for _ in range(2))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    rates = [[e["learning_rate"] for e in one.state.log_history if "learning_rate" in e] for one in (resumed, whole)]
    assert rates[0][2:] == pytest.approx(rates[1][2:])


@pytest.mark.parametrize("wrapped", [False, True])  # by accelerate, if DeepSpeed's settings have the optimizer
def test_settings_of_the_optimizer_count_where_deepspeed_has_loaded_it_before(
    llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrapped: bool
) -> None:
    trainer = llama.trainer(output_dir=str(tmp_path), weight_decay=0.5, lr_scheduler_type="constant")
    trainer.create_optimizer_and_scheduler(4)
    schedule = trainer.lr_scheduler
    schedule.base_lrs = [1.0, 1.0]
    if wrapped:
        trainer.lr_scheduler = SimpleNamespace(scheduler=schedule)
    for group in trainer.optimizer.param_groups:
        group.update(lr=1.0, initial_lr=1.0, weight_decay=0.1)
    monkeypatch.setattr(Trainer, "_load_optimizer_and_scheduler", lambda *args: None)
    trainer._load_optimizer_and_scheduler("checkpoint-2")
    assert [(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups] == [
        (1e-2, 0.5),
        (1e-2, 0.0),
    ]
    assert schedule.base_lrs == [1e-2, 1e-2]


def test_resuming_without_the_state_of_the_optimizer(llama: Bench, tmp_path: Path) -> None:
    """Its schedule would start from the beginning."""
    settings = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    llama.trainer(max_steps=2, **settings).train()
    with pytest.raises(LayerPruneError, match="checkpoint-2 has no state of the optimizer and the schedule, as with"):
        llama.trainer(max_steps=4, **settings).train(resume_from_checkpoint=True)


def test_deepspeed_keeps_its_schedule_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its settings have one, transformers writes no scheduler.pt."""
    monkeypatch.setenv("HOME", str(tmp_path))  # settings are read from YAML, too, where no shell replaces ~
    for name, text in (("latest", "global_step2"), ("trainer_state.json", "{}")):
        (tmp_path / name).write_text(text)
    assert {checkpoint_to_resume(named, "") for named in ("~", str(tmp_path))} == {str(tmp_path)}


def test_resuming_without_a_checkpoint_starts(llama: Bench, tmp_path: Path) -> None:
    trainer = llama.trainer(output_dir=str(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert len(losses(trainer)) == 6


def test_checkpoint_of_a_whole_model_is_whole(llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model without an adapter, whose first layers were frozen by hand."""
    model = AutoModelForCausalLM.from_pretrained(llama.pruned, dtype=torch.float32, **EAGER)
    model.requires_grad_(False).model.layers[-2:].requires_grad_(True)
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_length": 32, "learning_rate": 1e-2}
    args = HealConfig(str(tmp_path), cache="on", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **settings)
    HealTrainer(model, args, train_dataset=rows(), processing_class=word_tokenizer()).train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == load_file(llama.pruned / "model.safetensors").keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())
    told: list[Any] = []
    monkeypatch.setattr(Trainer, "_issue_warnings_after_load", lambda trainer, found: told.append(found))
    HealTrainer(model, args, train_dataset=rows(), processing_class=word_tokenizer()).train(True)
    assert [(found.missing_keys, found.unexpected_keys) for found in told] == [([], [])]


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    for name, state in (("8", "{}"), ("12", None), ("16", '{"global_'), ("9-old", "{}"), ("x1", "{}")):
        (tmp_path / f"checkpoint-{name}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert [record.message.partition(" ")[0][-3:] for record in caplog.records] == ["-16", "-12"]
    with pytest.raises(
        CheckpointError, match=r"checkpoint-16/trainer_state.json is damaged; specify an earlier checkpoint"
    ):
        checkpoint_to_resume(str(tmp_path / "checkpoint-16"), "")


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
@pytest.mark.parametrize("end", [0.5, 0.0], ids=["half", "empty"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, end: float) -> None:
    """As after a power failure: transformers would fail on it, the random numbers' state with no more than EOFError."""
    for step in (2, 4):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
            torch.save({"a": torch.ones(100)}, folder / file)
        save_file({"a": torch.ones(100)}, folder / "model.safetensors")
    assert last_checkpoint(tmp_path) == str(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(end * len(whole))])
    assert checkpoint_to_resume(True, str(tmp_path)) == str(tmp_path / "checkpoint-2")
    with pytest.raises(
        CheckpointError, match=f"checkpoint-4/{name} is damaged; specify an earlier checkpoint, or start in"
    ):
        checkpoint_to_resume(str(folder), "")


def test_checkpoint_is_an_adapter_of_the_base(llama: Bench, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    trainer = llama.trainer(output_dir=str(tmp_path), save_strategy="steps", save_steps=6)
    trainer.model.name_or_path = str(llama.folder / "dense")
    trainer.model.peft_config["default"].base_model_name_or_path = str(llama.folder / "dense")
    trainer.train()
    settings = json.loads((tmp_path / "checkpoint-6" / "adapter_config.json").read_text())
    assert settings["drop_layers"] == DROP
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6", dtype=torch.float32, **EAGER).eval()
    ids = torch.randint(3, 100, (2, 9))
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, trainer.model.eval()(ids).logits, atol=1e-5)


# --- values that are not finite -----------------------------------------------------------------------


def test_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(llama: Bench, tmp_path: Path) -> None:
    trainer = llama.trainer(output_dir=str(tmp_path), save_strategy="steps", save_steps=2)

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer.add_callback(Break())
    with pytest.raises(
        LayerPruneError,
        match=r"the loss is nan at step 4, in the batch of rows \d+(, \d+){3}; .*the last checkpoint is .*checkpoint-2;",
    ):
        trainer.train()
    weights = load_file(tmp_path / "checkpoint-2" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (tmp_path / "checkpoint-4").exists()


def test_weights_that_are_no_numbers_are_not_saved(llama: Bench, tmp_path: Path) -> None:
    trainer = llama.trainer(output_dir=str(tmp_path), save_strategy="steps", save_steps=2)

    class Break(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("inf"))

    trainer.add_callback(Break())
    with pytest.raises(LayerPruneError, match="not finite after step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(LayerPruneError, match=r"the last checkpoint is .*checkpoint-2;"):
        trainer.save_model(str(tmp_path / "trained"))
    assert not (tmp_path / "trained").exists()
