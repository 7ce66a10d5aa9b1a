"""The trainer's loss against TRL's own, which rows and steps it trains on, and what it refuses."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
import trl
from datasets import Dataset, concatenate_datasets
from packaging.version import Version
from peft import PromptTuningConfig
from torch.distributed.utils import _apply_to_tensors
from transformers import AutoModelForCausalLM
from trl.trainer import base_trainer

from hf_layerprune.errors import CheckpointError, CutError, LayerPruneError
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.losses import HeadLoss, head_loss
from hf_layerprune.heal.precompute import precompute
from hf_layerprune.heal.prepared import keep_labelled_rows
from hf_layerprune.heal.trainer import HealTrainer

from .heal_makers import TRL, Bench, losses, rows, trl_computes_losses, tuned, word_tokenizer
from .tiny_models import EAGER

trainer_counts_predicted_tokens = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.10"),
    reason="the Trainer of transformers 5.4 counts each row's first token, which nothing predicts",
)


@trl_computes_losses
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True},
        {"neftune_noise_alpha": 5.0},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        pytest.param(
            {
                "rows_": Dataset.from_list([{"input_ids": list(range(3, 8 + i))} for i in range(24)]).with_format(
                    "torch"
                )
            },
            marks=trainer_counts_predicted_tokens,
        ),
        pytest.param(
            {"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)},
            marks=pytest.mark.skipif(
                Version("1.16") > TRL, reason="TRL before 1.16 divides by another number of tokens"
            ),
        ),
        pytest.param({"completion_only_loss": False}, marks=trainer_counts_predicted_tokens),
        {"gradient_accumulation_steps": 2, "max_steps": 3},
        pytest.param(
            {"train_sampling_strategy": "sequential", "max_steps": 3},  # of 6: the first rows
            marks=pytest.mark.skipif(
                "train_sampling_strategy" not in HealConfig.__dataclass_fields__, reason="a newer setting"
            ),
        ),
        {"gradient_accumulation_steps": 3, "max_steps": 3, "method": "lm_head+last1", "max_grad_norm": 0.1},
    ],
)
def test_cross_entropy_is_that_of_trl(llama: Bench, settings: dict[str, Any]) -> None:
    theirs, ours = llama.trainer(trl=True, **settings), llama.trainer(**settings)
    for trainer in (theirs, ours):
        torch.manual_seed(0)  # of NEFTune's noise
        trainer.train()
    assert losses(ours) == pytest.approx(losses(theirs), rel=2e-6)
    assert losses(ours)[-1] != losses(ours)[0]
    start = tuned(llama.trainer(**settings))
    for name, parameter in tuned(theirs).items():
        moved, apart = parameter - start[name], parameter - tuned(ours)[name]
        assert apart.norm() < 1e-3 * moved.norm(), name  # Adam makes whole steps of the noise in tiny gradients
    for log, other in zip(theirs.state.log_history, ours.state.log_history, strict=True):
        assert log.get("mean_token_accuracy") == pytest.approx(other.get("mean_token_accuracy"))
        assert log.get("num_tokens") == other.get("num_tokens")


def test_gradient_of_the_head_is_added_up_in_training_alone(llama: Bench) -> None:
    trainer = llama.trainer(method="lm_head+last1", eval_rows=rows(), eval_strategy="steps", eval_steps=2)
    seen = []

    def spy(*args: Any, accumulate: bool, **kwargs: Any) -> HeadLoss:
        seen.append((trainer.model.training, accumulate))
        return head_loss(*args, accumulate=accumulate, **kwargs)

    with mock.patch("hf_layerprune.heal.loss_inputs.head_loss", spy):
        trainer.train()
    assert set(seen) == {(True, True), (False, False)}


def mean_square(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits[labels != -100].float().pow(2).mean()


@trl_computes_losses
@pytest.mark.skipif(TRL.release[:2] == (1, 10), reason="TRL 1.10 fails with another loss than its own")
@pytest.mark.parametrize(
    "settings", [{"compute_loss_func": mean_square}, {"label_smoothing_factor": 0.2}, {"loss_type": "dft"}]
)
def test_other_losses_are_left_to_trl(llama: Bench, settings: dict[str, Any]) -> None:
    """The frozen layers are still computed once."""
    theirs = llama.trainer(trl=True, **settings)
    theirs.train()
    for cache in ("off", "on"):
        assert llama.losses(cache=cache, **settings) == pytest.approx(losses(theirs), rel=1e-5)
    assert llama.losses(max_steps=1) != pytest.approx(losses(theirs)[:1], rel=1e-3)
    with pytest.raises(LayerPruneError, match="loss=kd can't be combined with loss_type"):
        llama.trainer(loss="kd", **settings)


def test_an_engine_that_rounds_what_passes_it(llama: Bench) -> None:
    """As FSDP does in bfloat16: the loss and the metrics are exact all the same, and the gradients are those of the loss."""
    trainer = llama.trainer(loss="ce+kd")
    trainer.data_collator.precomputed = precompute(trainer)
    batch = next(iter(trainer.get_train_dataloader()))

    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.bfloat16() if tensor.is_floating_point() else tensor

    def rounding(*, heal: Any, **inputs: Any) -> dict[str, torch.Tensor]:
        found = trainer.model(heal=_apply_to_tensors(rounded, heal), **inputs)
        return {"loss": rounded(found["loss"])}

    found = []
    for model in (trainer.model, rounding):
        loss = trainer.compute_loss(model, batch)
        loss.backward()
        gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
        found.append((loss.item(), gradients, trainer._metrics["train"].pop("kd")))
        trainer.model.zero_grad()
    assert found[0][0] == found[1][0]
    assert found[0][0] != torch.tensor(found[0][0]).bfloat16().item()
    assert found[0][1].keys() == found[1][1].keys() == tuned(trainer).keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
    assert found[0][2] == found[1][2]


@pytest.mark.skipif(not hasattr(base_trainer, "Version"), reason="this TRL asks for no version")
@trl_computes_losses
@pytest.mark.parametrize("settings", [{}, {"loss": "kd"}, {"compute_loss_func": mean_square}])
def test_losses_are_the_same_with_an_older_trainer(llama: Bench, settings: dict[str, Any]) -> None:
    """With transformers below 5.19, TRL would replace a loss function if the trainer said that it scales losses itself."""
    expected = llama.losses(max_steps=2, gradient_accumulation_steps=2, **settings)
    with mock.patch.object(base_trainer, "transformers", SimpleNamespace(__version__="5.18.0")):
        trainer = llama.trainer(max_steps=2, gradient_accumulation_steps=2, **settings)
    assert trainer.compute_loss_func is settings.get("compute_loss_func")
    trainer.train()
    assert losses(trainer) == expected


def test_distillation_brings_the_student_to_the_teacher(llama: Bench) -> None:
    for direction in ("forward", "reverse"):
        found = llama.losses(loss="kd", kd_direction=direction, max_steps=40, num_train_epochs=10)
        assert found[-1] < 0.7 * found[0]
    trainer = llama.trainer(loss="ce+kd", kd_share=0.25)
    trainer.train()
    for log in trainer.state.log_history[:-1]:
        assert log["loss"] == pytest.approx(0.75 * log["ce"] + 0.25 * log["kd"], rel=1e-4)


def test_cross_entropy_may_come_in_later(llama: Bench) -> None:
    alone = llama.losses(loss="kd", max_steps=4, num_train_epochs=10)
    trainer = llama.trainer(loss="ce+kd", kd_alone=0.5, kd_share=0.25, max_steps=4, num_train_epochs=10)
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert [log["loss"] for log in logs[:2]] == pytest.approx(alone[:2], rel=1e-6)
    for log in logs[2:]:
        assert log["loss"] == pytest.approx(0.75 * log["ce"] + 0.25 * log["kd"], rel=1e-4)
    assert len(logs) == 4


def test_teacher_on_completions_or_on_all_tokens(llama: Bench) -> None:
    everywhere, completions = llama.losses(loss="kd"), llama.losses(loss="kd", kd_tokens="completion")
    assert everywhere != completions
    # Where all tokens are completion, there is no difference.
    settings = {"loss": "kd", "completion_only_loss": False}
    assert llama.losses(**settings) == pytest.approx(llama.losses(kd_tokens="completion", **settings))


@pytest.mark.parametrize("loss", ["kd", "ce+kd"])
def test_logged_parts_are_means_over_tokens(llama: Bench, loss: str) -> None:
    """However the rows of a step, which differ in length, are divided into batches."""
    logs = []
    for size, steps in ((4, 1), (1, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 2}
        trainer = llama.trainer(loss=loss, **settings)
        trainer.train()
        logs.append([[log[name] for name in ("ce", "kd")] for log in trainer.state.log_history[:2]])
        for log in trainer.state.log_history[:2]:
            parts = {"kd": log["kd"], "ce+kd": (log["ce"] + log["kd"]) / 2}
            assert log["loss"] == pytest.approx(parts[loss], rel=1e-4)
    assert logs[1] == [pytest.approx(one, rel=1e-3) for one in logs[0]]


# --- rows and steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("settings", "steps"), [({}, 12), ({"gradient_accumulation_steps": 5}, 3)])
def test_half_an_epoch_is_half_of_the_rows(llama: Bench, settings: dict[str, Any], steps: int) -> None:
    half = {"max_steps": -1, "num_train_epochs": 0.5, "per_device_train_batch_size": 1}
    trainer = llama.trainer(**half | settings)
    trainer.train()
    assert trainer.state.global_step == steps
    rows_a_step = settings.get("gradient_accumulation_steps", 1)
    assert len(trainer.train_dataset) == steps * rows_a_step  # the others are not computed


def test_a_single_step_trains(llama: Bench) -> None:
    warmup = HealConfig.__dataclass_fields__["warmup_steps"].default
    trainer = llama.trainer(max_steps=1, warmup_steps=warmup)
    start = tuned(trainer)
    trainer.train()
    assert all(not torch.equal(start[name], parameter) for name, parameter in tuned(trainer).items())
    assert [trainer.args.get_warmup_steps(steps) for steps in (1, 2, 100)] == [0, 1, 3]


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"packing": True}])
def test_rows_longer_than_the_context(tmp_path: Path, settings: dict[str, Any]) -> None:
    bench = Bench(tmp_path)
    config = bench.pruned / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 12}))
    with pytest.raises(CutError, match=r"a row has \d+ tokens, and the model 12 positions; use max_length=12"):
        bench.trainer(**settings)
    bench.trainer(max_length=12)
    short = rows().filter(lambda row: len((row["prompt"] + row["completion"]).split()) < 11)
    bench.trainer(rows_=short, **settings)
    with pytest.raises(CutError, match="use max_length=12"):
        bench.trainer(rows_=short, eval_rows=rows(), **settings)


def test_rows_whose_length_is_known_are_said_to_be_cut_only_if_they_are(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    args = HealConfig(output_dir="none", max_length=8, use_cpu=True)
    given = Dataset.from_list([{"input_ids": [5] * 8}])
    keep_labelled_rows(given, args, given)
    assert "may have been cut" not in caplog.text
    keep_labelled_rows(given, args, Dataset.from_list([{"input_ids": [5] * 9}]))
    assert "of 1 training rows, 1 reach max_length=8 and may have been cut" in caplog.text


def test_answers_that_are_all_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared rows are cut already, or never will be, unless TRL cuts them as it makes batches."""
    late = Dataset.from_list([{"input_ids": [5] * 8, "assistant_masks": [0] * 6 + [1] * 2}] * 3)

    def kept(**settings: Any) -> int:
        return len(keep_labelled_rows(late, HealConfig(output_dir="none", use_cpu=True, **settings), late))

    monkeypatch.setattr("hf_layerprune.heal.prepared.trl_cuts_batches", lambda: True)
    with pytest.raises(LayerPruneError, match="none of the 3 training rows"):
        kept(max_length=4)
    assert kept(max_length=7) == kept(max_length=4, truncation_mode="keep_end") == 3
    monkeypatch.setattr("hf_layerprune.heal.prepared.trl_cuts_batches", lambda: False)
    assert kept(max_length=4) == 3


def test_offloaded_weights_are_not_trained(llama: Bench, tmp_path: Path) -> None:
    """Without a word, they would stay as they were."""
    args = HealConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, max_length=32)
    data: dict[str, Any] = {"train_dataset": rows(), "processing_class": word_tokenizer()}
    places = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    for offloaded in (0, 5):
        places |= {f"model.layers.{i}": "disk" if i == offloaded else "cpu" for i in range(6)}
        model = AutoModelForCausalLM.from_pretrained(
            llama.pruned, dtype=torch.float32, device_map=places, offload_folder=tmp_path / "off", **EAGER
        )
        model.requires_grad_(False).model.layers[-1:].requires_grad_(True)
        if offloaded:
            with pytest.raises(CutError, match=r"layers\.5\..* is offloaded, so it can't be trained"):
                HealTrainer(model, args, **data)
        else:
            HealTrainer(model, args, **data)


def test_rows_that_are_all_too_long(llama: Bench) -> None:
    with pytest.raises(
        LayerPruneError, match=r"none of the 24 training rows has a labelled token within max_length=3"
    ):
        llama.trainer(max_length=3)
    empty = Dataset.from_list([{"text": ""}] * 2)  # an end token alone, which nothing predicts
    with pytest.raises(LayerPruneError, match=r"none of the 2 training rows .* they are empty"):
        llama.trainer(rows_=empty)
    long = Dataset.from_list([{"prompt": "w5 " * 40, "completion": "w6"}] * 2)
    none = r"none of the 2 evaluation rows has a labelled token within max_length=32"
    for evaluated in (long, {"short": rows(4), "long": long}):
        with pytest.raises(LayerPruneError, match=none):
            llama.trainer(eval_rows=evaluated, eval_strategy="steps", eval_steps=2)
    assert len(llama.trainer(eval_rows=concatenate_datasets([rows(4), long]), eval_strategy="steps").eval_dataset) == 4


@pytest.mark.parametrize("max_length", [None, 32])
def test_rows_without_tokens_are_left_out(llama: Bench, max_length: int | None) -> None:
    """Nothing could be computed for a batch of them, and one token alone teaches nothing."""
    ids = [[3, 4, 5]] * 4 + [[]] * 5 + [[9]] * 3
    trainer = llama.trainer(rows_=Dataset.from_dict({"input_ids": ids, "labels": ids}), max_length=max_length)
    assert trainer.train_dataset["input_ids"][:] == ids[:4]


def test_what_is_no_config_or_no_model(llama: Bench, tmp_path: Path) -> None:
    for model, args in ((llama.dense, trl.SFTConfig), ("org/model", HealConfig)):
        with pytest.raises(LayerPruneError, match="takes a loaded model, and a HealConfig"):
            HealTrainer(model, args(str(tmp_path), use_cpu=True), train_dataset=rows())


def test_rows_that_fill_no_batch(llama: Bench) -> None:
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 25}
    with pytest.raises(LayerPruneError, match="the 24 training rows do not fill a batch of 25"):
        llama.trainer(**settings)
    llama.trainer(**settings | {"per_device_train_batch_size": 24})


def test_teacher_of_another_depth(llama: Bench) -> None:
    trainer = llama.trainer(loss="kd")
    trainer.teacher_model = AutoModelForCausalLM.from_pretrained(llama.pruned)
    with pytest.raises(CheckpointError, match=r"the teacher .* has 6 layers, but this model is cut from one with 8"):
        trainer.train()


def test_a_compiled_teacher_teaches_the_same(llama: Bench) -> None:
    plain, compiled = llama.trainer(loss="kd"), llama.trainer(loss="kd")
    compiled.teacher_model = torch.compile(compiled.teacher_model, backend="eager")
    for trainer in (plain, compiled):
        trainer.train()
    assert losses(compiled) == pytest.approx(losses(plain))


def test_no_teacher(llama: Bench) -> None:
    trainer = llama.trainer(loss="kd")
    trainer.teacher_model = None
    with pytest.raises(LayerPruneError, match="needs the dense model; specify it with teacher="):
        trainer.train()


@pytest.mark.parametrize(
    "settings",
    [
        {"loss": "mse"},
        {"kd_share": 0.0},
        {"kd_alone": 0.5},
        {"kd_alone": 1.0},
        {"kd_temperature": 0.0},
        {"cache": "yes"},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(LayerPruneError, match=next(iter(settings))):
        HealConfig(output_dir=str(tmp_path), use_cpu=True, **settings)


def test_a_copy_of_the_model_runs_on_its_own(llama: Bench) -> None:
    trainer, ids = llama.trainer(cache="on", max_steps=1), torch.arange(6)[None]
    trainer.train()
    twin = copy.deepcopy(trainer.model.eval())
    for parameter in twin.parameters():
        parameter.data.zero_()
    assert trainer.model(input_ids=ids).logits.any()
    assert not twin(input_ids=ids).logits.any()


def test_a_trained_model_does_not_keep_its_trainer(llama: Bench) -> None:
    trainer, ids = llama.trainer(cache="on", max_steps=1), torch.arange(6)[None]
    trainer.train()
    model, kept = trainer.model.eval(), weakref.ref(trainer)
    logits = model(input_ids=ids).logits
    trainer.accelerator.free_memory()
    del trainer
    gc.collect()
    assert kept() is None
    assert torch.equal(model(input_ids=ids).logits, logits)
