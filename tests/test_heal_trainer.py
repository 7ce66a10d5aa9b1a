"""The trainer against TRL's own, and with the frozen layers computed once against the same without."""

from __future__ import annotations

import gc
import json
import logging
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
import trl.trainer.utils
from datasets import Dataset, concatenate_datasets
from huggingface_hub.utils import filter_repo_objects
from packaging.version import Version
from safetensors.torch import load_file
from torch.distributed.utils import _apply_to_tensors
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer import base_trainer

from hf_layerprune.errors import CheckpointError, CutError, LayerPruneError
from hf_layerprune.families import Cut
from hf_layerprune.heal.checkpoints import TrainingStopped, last_checkpoint
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.losses import HeadLoss, head_loss
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.heal.precompute import precompute
from hf_layerprune.heal.prepared import labelled_rows
from hf_layerprune.heal.trainer import HealTrainer
from hf_layerprune.runtime.prefix import Prefix
from hf_layerprune.versions import trl_drops_rows_without_labels

from .heal_makers import dense_and_pruned, rows, word_tokenizer
from .tiny_models import EAGER, VOCAB

DROP = [5, 6]
CUT = Cut(tuple(i for i in range(8) if i not in DROP), 8)
TAIL = [6, 7]
TAIL_CUT = Cut(tuple(range(6)), 8)


class Bench:
    """Makes trainers for one pruned model."""

    def __init__(self, folder: Path, model_type: str = "llama", drop: list[int] = DROP) -> None:
        self.folder = folder
        self.cut = Cut(tuple(i for i in range(8) if i not in drop), 8)
        self.dense, self.pruned = dense_and_pruned(model_type, folder, drop)

    def trainer(
        self,
        method: str = "last2",
        trl: bool = False,
        rows_: Any = None,
        eval_rows: Any = None,
        peft_config: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        data_collator: Any = None,
        **settings: Any,
    ) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.pruned, dtype=torch.float32, **EAGER)
        arguments = {
            "output_dir": str(self.folder / "out"), "max_steps": 6, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1,
            "max_length": 32, "use_cpu": True, "disable_tqdm": True, "warmup_steps": 0,
            "gradient_checkpointing": False,
        } | settings  # fmt: skip
        common = {
            "train_dataset": rows() if rows_ is None else rows_,
            "eval_dataset": eval_rows,
            "processing_class": word_tokenizer(),
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "data_collator": data_collator,
            "peft_config": peft_config or parse_method(method).tail_config(self.cut, str(self.folder / "dense")),
        }
        if trl:
            return SFTTrainer(model, SFTConfig(**arguments), **common)
        args = HealConfig(method=method, **arguments)
        return HealTrainer(model, args, teacher=self.dense if args.distils else None, **common)

    def losses(self, **settings: Any) -> list[float]:
        trainer = self.trainer(**settings)
        trainer.train()
        return losses(trainer)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tuned(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module", autouse=True)
def _collect_quickly() -> None:
    """Each training run collects garbage, which takes long among all that has been imported."""
    gc.freeze()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("llama"))


# --- the loss ------------------------------------------------------------------------------------------

trl_computes_losses = pytest.mark.skipif(
    getattr(trl.trainer.utils, "_ChunkedLogProbFunction", True) is None,
    reason="TRL 1.11 to 1.15 compute no loss of their own without Triton",
)


@trl_computes_losses
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"packing": True},
        pytest.param(
            {"completion_only_loss": False},
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.10"),
                reason="the Trainer of transformers 5.4 counts each row's first token, which nothing predicts",
            ),
        ),
        {"gradient_accumulation_steps": 2, "max_steps": 3},
        {"gradient_accumulation_steps": 3, "max_steps": 3, "method": "lm_head+last1", "max_grad_norm": 0.1},
    ],
)
def test_cross_entropy_is_that_of_trl(llama: Bench, settings: dict[str, Any]) -> None:
    theirs, ours = llama.trainer(trl=True, **settings), llama.trainer(**settings)
    theirs.train()
    ours.train()
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
    trainer.data_collator.precomputed = precompute(trainer, llama.dense)
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
        found.append((loss.item(), gradients))
        trainer.model.zero_grad()
    assert found[0][0] == found[1][0]
    assert found[0][0] != torch.tensor(found[0][0]).bfloat16().item()
    assert found[0][1].keys() == found[1][1].keys() == tuned(trainer).keys()
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
    assert trainer._metrics["train"]["kd"][0] == trainer._metrics["train"]["kd"][1]


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


# --- computed once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["last2", "lm_head", "lm_head+last1", "cut", "lm_head+cut2"])
@pytest.mark.parametrize("loss", ["ce", "kd"])
def test_computed_once_is_exactly_the_same(llama: Bench, method: str, loss: str) -> None:
    settings = {"method": method, "loss": loss, "max_steps": -1, "num_train_epochs": 2}
    without, once = llama.trainer(cache="off", **settings), llama.trainer(cache="on", **settings)
    without.train()
    once.train()
    assert losses(once) == losses(without)
    for name, parameter in tuned(without).items():
        assert torch.equal(parameter, tuned(once)[name]), name
    for (name, parameter), (_, other) in zip(
        without.model.named_parameters(), once.model.named_parameters(), strict=True
    ):
        assert torch.equal(parameter, other), name  # the model is whole again
    assert not (llama.folder / "out" / "_cache").exists()


def test_the_cache_is_not_uploaded_with_checkpoints(llama: Bench, tmp_path: Path) -> None:
    """As transformers' Trainer does with the output folder, but for what these patterns match."""
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seen.extend(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors"))

    trainer = llama.trainer(cache="on", loss="kd", max_steps=1, output_dir=str(tmp_path))
    trainer.add_callback(Look())
    trainer.train()
    assert len(seen) == 2
    assert not list(filter_repo_objects(seen, ignore_patterns=["_*", "checkpoint-*"]))


@pytest.mark.parametrize(
    "settings",
    [{"packing": True}, {"packing": True, "loss": "kd"}, {"dataloader_num_workers": 2}, {"pad_to_multiple_of": 8}],
)
def test_computed_once_with_other_batches(llama: Bench, settings: dict[str, Any]) -> None:
    assert llama.losses(cache="on", **settings) == pytest.approx(llama.losses(cache="off", **settings), rel=1e-6)


def test_workers_that_are_not_forked_get_the_same_batches(llama: Bench) -> None:
    trainer = llama.trainer(cache="on", loss="kd")
    collator, rows = trainer.data_collator, [trainer.train_dataset[i] for i in (3, 0)]
    collator.precomputed = precompute(trainer, llama.dense)
    try:
        copy = pickle.loads(pickle.dumps(collator))
        batch, other = collator(rows), copy(rows)
    finally:
        collator.precomputed.prefix.restore()
    assert copy.precomputed.prefix is copy.precomputed.teacher_head is None
    assert {"prefix_states", "teacher_states"} <= batch.keys() == other.keys()
    assert all(torch.equal(batch[name], other[name]) for name in batch)


def test_evaluation_during_training_uses_the_same_states(llama: Bench) -> None:
    found = []
    for cache in ("off", "on"):
        evaluation = {"eval_rows": rows(6, seed=1), "eval_strategy": "steps", "eval_steps": 2}
        trainer = llama.trainer(cache=cache, loss="ce+kd", **evaluation)
        trainer.train()
        found.append([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
    assert len(found[0]) == 3
    assert found[1] == pytest.approx(found[0], rel=1e-6)


def test_evaluation_outside_training_is_no_distillation(llama: Bench, caplog: pytest.LogCaptureFixture) -> None:
    found = {}
    for loss in ("ce", "kd"):
        found[loss] = llama.trainer(loss=loss, eval_rows=rows(6, seed=1)).evaluate()
    assert found["kd"]["eval_loss"] == pytest.approx(found["ce"]["eval_loss"])
    assert "eval_kd" not in found["kd"]
    assert caplog.text.count("eval_loss is cross-entropy here") == 1


def test_evaluation_with_metrics_has_the_same_loss(llama: Bench) -> None:
    found = []
    for compute_metrics in (None, lambda seen: {"width": seen.predictions.shape[-1]}):
        evaluation = {"eval_rows": rows(6, seed=1), "eval_strategy": "steps", "eval_steps": 1, "max_steps": 1}
        trainer = llama.trainer(cache="on", loss="kd", compute_metrics=compute_metrics, **evaluation)
        trainer.train()
        found.append(next(log for log in trainer.state.log_history if "eval_loss" in log))
    assert found[1]["eval_loss"] == pytest.approx(found[0]["eval_loss"], rel=1e-6)
    assert found[1]["eval_width"] == VOCAB


@pytest.mark.parametrize("model_type", ["llama", "gemma4_text"])  # the latter's other layers need token ids, too
def test_a_callback_that_runs_other_rows_is_told_why_it_can_not(model_type: str, llama: Bench, tmp_path: Path) -> None:
    class Other(TrainerCallback):
        def on_step_end(self, *args: Any, model: Any, train_dataloader: Any, **kwargs: Any) -> None:
            model(input_ids=next(iter(train_dataloader))["input_ids"].flip(1))

    bench = llama if model_type == "llama" else Bench(tmp_path, model_type)
    trainer = bench.trainer(cache="on", max_steps=1)
    trainer.add_callback(Other())
    with pytest.raises(LayerPruneError, match="cache=off to generate text"):
        trainer.train()


def test_collators_of_the_user(llama: Bench) -> None:
    """The states of a row are where its tokens are."""

    class Left:
        def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            width, padding = max(len(e["input_ids"]) for e in examples), (0, -100, 0)
            names = ("input_ids", "labels", "attention_mask")
            found: dict[str, list[list[int]]] = {name: [] for name in names}
            for example in examples:
                ids = example["input_ids"]  # old versions of TRL leave the labels to the collator
                filled = {"labels": ids} | example | {"attention_mask": [1] * len(ids)}
                for name, value in zip(names, padding, strict=True):
                    found[name].append([value] * (width - len(filled[name])) + list(filled[name]))
            return {name: torch.tensor(value) for name, value in found.items()}

    settings = {"loss": "kd", "max_steps": 2}
    right = llama.losses(**settings)
    for cache in ("on", "off"):
        assert llama.losses(cache=cache, data_collator=Left(), **settings) == pytest.approx(right, rel=1e-4)
    usual = llama.trainer().data_collator.inner

    def hiding(examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = usual(examples)
        batch["attention_mask"][:, :2] = 0  # no padding, but tokens that the others don't see
        return batch

    found = [llama.losses(cache=cache, data_collator=hiding, **settings) for cache in ("on", "off")]
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert found[0] != pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral", "gpt_neox", "granite"])
def test_computed_once_in_other_families(model_type: str, tmp_path: Path) -> None:
    bench = Bench(tmp_path, model_type)
    without, once = (bench.losses(cache=cache, loss="ce+kd", max_steps=4) for cache in ("off", "on"))
    assert once == pytest.approx(without, rel=1e-6)


def test_bfloat16(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    settings = {"bf16": True, "learning_rate": 1e-3}
    assert bench.losses(cache="on", **settings) == pytest.approx(bench.losses(cache="off", **settings), rel=1e-3)


def test_trained_layers_alone_are_in_memory(llama: Bench) -> None:
    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen["parameters"] = {name for name, p in model.named_parameters()}
            seen["gradients"] = {name for name, p in model.named_parameters() if p.grad is not None}

    trainer = llama.trainer("lm_head+last1", cache="on")
    trainer.add_callback(Look())
    trainer.train()
    layer, norm, head = "model.layers.5.", "model.norm.", "lm_head."
    assert all(any(part in name for part in (layer, norm, head)) for name in seen["parameters"])
    assert all(".modules_to_save." in name for name in seen["parameters"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_layers_build_no_graph_without_the_cache(llama: Bench, checkpointing: bool) -> None:
    trainer = llama.trainer(cache="off", gradient_checkpointing=checkpointing, max_steps=2)
    grown: list[bool] = []
    layers = trainer.plain_model.model.layers
    layers[3].register_forward_hook(lambda module, args, output: grown.append(output.requires_grad))
    trainer.train()
    assert grown
    assert not any(grown)
    assert losses(trainer) == llama.losses(cache="off", max_steps=2)


# --- where it can't be precomputed ------------------------------------------------------------------------


def test_dropout_turns_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, "gpt2")
    config = bench.pruned / "config.json"  # tiny models have no dropout of their own
    config.write_text(json.dumps(json.loads(config.read_text()) | {"resid_pdrop": 0.1}))
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        assert len(bench.losses(max_steps=2)) == 2
    assert "the frozen layers run in every step: their output differs in training mode, as with dropout" in caplog.text
    with pytest.raises(LayerPruneError, match="can't be precomputed: their output differs in training mode"):
        bench.trainer(cache="on").train()


def test_several_streams_of_states_turn_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, "deepseek_v4")
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        assert len(bench.losses(max_steps=2, loss="ce+kd")) == 2
    assert "the frozen layers run in every step: layers pass on several streams of hidden states" in caplog.text


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha adds noise"),
        ({"method": "last6"}, "there are none below the first trained parameter"),
    ],
)
def test_what_else_turns_it_off(llama: Bench, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(LayerPruneError, match=why):
        llama.trainer(cache="on", **settings).train()


def test_lora_has_no_frozen_layers_but_can_have_a_teacher(llama: Bench, caplog: pytest.LogCaptureFixture) -> None:
    lora = parse_method("lora").adapter(r=4, alpha=8, dropout=0.0, target_modules=None)
    trainer = llama.trainer("lora", peft_config=lora, loss="kd", max_steps=24)
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        trainer.train()
    assert "there are none below the first trained parameter" in caplog.text
    each = losses(trainer)  # six batches see every row once, so four rounds; a batch alone says little
    assert sum(each[-6:]) < sum(each[:6])


# --- the cache on disk ---------------------------------------------------------------------------------


@pytest.fixture
def cache(llama: Bench, tmp_path: Path) -> Path:
    llama.trainer(cache="on", cache_dir=str(tmp_path / "cache"), keep_cache=True, loss="kd").train()
    return tmp_path / "cache"


def test_cache_is_kept_and_used_again(llama: Bench, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = sorted(path for path in cache.rglob("*") if path.is_file())
    assert [path.parent.name.partition("-")[0] for path in shards] == ["prefix", "teacher"]
    states = load_file(shards[0])
    assert sorted(map(int, states)) == list(range(24))
    assert all(of_row.shape[1] == 32 for of_row in states.values())
    before = {path: path.stat().st_mtime_ns for path in shards}
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        llama.trainer(cache="on", cache_dir=str(cache), keep_cache=True, loss="kd").train()
    assert "already has the hidden states" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before


def test_cache_of_another_model_or_other_rows_is_not_used(llama: Bench, cache: Path, tmp_path: Path) -> None:
    """It stays as it is, and the run removes what it has added."""
    before = sorted(cache.rglob("*"))
    other = Bench(tmp_path / "other", drop=[1, 6])
    settings = {"cache": "on", "loss": "kd", "max_steps": 2}
    assert other.losses(cache_dir=str(cache), **settings) == other.losses(**settings)
    assert llama.losses(cache_dir=str(cache), rows_=rows(seed=5), **settings) == llama.losses(
        rows_=rows(seed=5), **settings
    )
    assert sorted(cache.rglob("*")) == before


def test_evaluation_rows_that_are_not_packed(llama: Bench) -> None:
    settings = {
        "packing": True,
        "eval_packing": False,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_rows": rows(8, seed=1),
    }
    found = {}
    for cache in ("off", "on"):
        trainer = llama.trainer(cache=cache, **settings)
        trainer.train()
        found[cache] = losses(trainer), [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    assert found["on"][0] == pytest.approx(found["off"][0], rel=1e-5)
    assert found["on"][1] == pytest.approx(found["off"][1], rel=1e-5)


def test_other_things_in_the_folder_stay(llama: Bench, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    llama.trainer(cache="on", cache_dir=str(tmp_path)).train()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_damaged_shard(llama: Bench, cache: Path) -> None:
    shard = next(cache.glob("prefix-*/00000-of-00001.safetensors"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"00000-of-00001\.safetensors can't be read"):
        llama.trainer(cache="on", cache_dir=str(cache), loss="kd").train()


def test_unloaded_weights_can_be_read_and_come_back(llama: Bench) -> None:
    model = AutoModelForCausalLM.from_pretrained(llama.pruned, dtype=torch.float32, **EAGER)
    before, states = dict(model.named_parameters()), model.state_dict()
    prefix = Prefix(model, 3)
    with torch.no_grad():
        prefix.run(input_ids=torch.randint(3, 100, (1, 4)))
    prefix.skip()
    prefix.unload()
    assert model.get_input_embeddings().weight.numel() == 0
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert not any(name.startswith(("model.embed", "model.layers.2.")) for name in model.state_dict())
    prefix.restore()
    assert dict(model.named_parameters()) == before
    assert model.state_dict().keys() == states.keys()


def test_8_bit_optimizer(llama: Bench) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"optim": "adamw_bnb_8bit", "max_steps": 2}
    assert llama.losses(cache="on", **settings) == llama.losses(cache="off", **settings)


# --- bad input -----------------------------------------------------------------------------------------


def test_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(llama: Bench, tmp_path: Path) -> None:
    trainer = llama.trainer(output_dir=str(tmp_path), save_strategy="steps", save_steps=2)

    class Break(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    trainer.add_callback(Break())
    with pytest.raises(
        TrainingStopped,
        match=r"the loss is nan at step 4, in the batch of rows \d+(, \d+){3}; .*checkpoint-2 is the last good",
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
    with pytest.raises(TrainingStopped, match="not finite after step 4"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(TrainingStopped, match="checkpoint-2 is the last good"):
        trainer.save_model(str(tmp_path / "trained"))
    assert not (tmp_path / "trained").exists()


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


@pytest.mark.skipif(trl_drops_rows_without_labels(), reason="this TRL leaves these rows out itself")
def test_answers_that_are_all_too_late() -> None:
    late = Dataset.from_list([{"input_ids": [5] * 8, "assistant_masks": [0] * 6 + [1] * 2}] * 3)
    with pytest.raises(LayerPruneError, match="none of the 3 training rows"):
        labelled_rows(late, HealConfig(output_dir="none", max_length=4, use_cpu=True), late)
    assert len(labelled_rows(late, HealConfig(output_dir="none", max_length=7, use_cpu=True), late)) == 3


def test_rows_that_are_all_too_long(llama: Bench) -> None:
    with pytest.raises(
        LayerPruneError, match=r"none of the 24 training rows has a labelled token within max_length=3"
    ):
        llama.trainer(max_length=3)
    long = Dataset.from_list([{"prompt": "w5 " * 40, "completion": "w6"}] * 2)
    none = r"none of the 2 evaluation rows has a labelled token within max_length=32"
    for evaluated in (long, {"short": rows(4), "long": long}):
        with pytest.raises(LayerPruneError, match=none):
            llama.trainer(eval_rows=evaluated, eval_strategy="steps", eval_steps=2)
    assert len(llama.trainer(eval_rows=concatenate_datasets([rows(4), long]), eval_strategy="steps").eval_dataset) == 4


def test_rows_that_fill_no_batch(llama: Bench) -> None:
    settings = {"dataloader_drop_last": True, "per_device_train_batch_size": 25}
    with pytest.raises(LayerPruneError, match="the 24 training rows do not fill a batch of 25"):
        llama.trainer(**settings)
    llama.trainer(**settings | {"per_device_train_batch_size": 24})


def test_teacher_of_another_depth(llama: Bench) -> None:
    trainer = llama.trainer(loss="kd")
    trainer._teacher_model = AutoModelForCausalLM.from_pretrained(llama.pruned)
    with pytest.raises(CheckpointError, match=r"the teacher .* has 6 layers, but this model is cut from one with 8"):
        trainer.train()


def test_no_teacher(llama: Bench) -> None:
    trainer = llama.trainer(loss="kd")
    trainer._teacher_model = None
    with pytest.raises(LayerPruneError, match="needs the dense model; specify it with --teacher"):
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


# --- resuming ------------------------------------------------------------------------------------------


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


def test_resuming_without_a_checkpoint_starts(llama: Bench, tmp_path: Path) -> None:
    trainer = llama.trainer(output_dir=str(tmp_path))
    trainer.train(resume_from_checkpoint=True)
    assert len(losses(trainer)) == 6


def test_checkpoint_of_a_whole_model_is_whole(llama: Bench, tmp_path: Path) -> None:
    """A model without an adapter, whose first layers were frozen by hand."""
    model = AutoModelForCausalLM.from_pretrained(llama.pruned, dtype=torch.float32, **EAGER)
    model.requires_grad_(False).model.layers[-2:].requires_grad_(True)
    settings = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_length": 32, "learning_rate": 1e-2}
    args = HealConfig(str(tmp_path), cache="on", use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, **settings)
    HealTrainer(model, args, train_dataset=rows(), processing_class=word_tokenizer()).train()
    saved = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    assert saved.keys() == load_file(llama.pruned / "model.safetensors").keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert last_checkpoint(tmp_path / "nothing") is None
    for name, state in (("8", "{}"), ("12", None), ("16", '{"global_'), ("9-old", "{}"), ("x1", "{}")):
        (tmp_path / f"checkpoint-{name}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{name}" / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")
    assert [record.message.partition(" ")[0][-3:] for record in caplog.records] == ["-16", "-12"]


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
