"""Training with the frozen layers computed once against the same without, and their cache on disk."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import ModelConfig

from hf_layerprune.errors import CheckpointError, LayerPruneError
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.heal.precompute import _Precomputation, precompute
from hf_layerprune.runtime.prefix import Prefix

from .heal_makers import Bench, losses, rows, trl_computes_losses, tuned
from .tiny_models import EAGER, OVERRIDES, VOCAB


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
    collator.precomputed = precompute(trainer)
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


@trl_computes_losses
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


def test_a_layer_that_the_student_lacks_needs_more_than_hidden_states(tmp_path: Path) -> None:
    """Of gemma4's last layers, each takes the keys and values of one before; that of a dropped one is frozen."""
    bench = Bench(tmp_path, "gemma4_unified_text")
    without, once = (bench.losses(cache=cache, loss="kd", max_steps=2) for cache in ("off", "on"))
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


# --- where it can't be precomputed --------------------------------------------------------------------


def test_dropout_turns_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, "gpt2")
    config = bench.pruned / "config.json"  # tiny models have no dropout of their own
    config.write_text(json.dumps(json.loads(config.read_text()) | {"resid_pdrop": 0.1}))
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        assert len(bench.losses(max_steps=2)) == 2
    assert "all layers run in every step: their output differs in training mode, as with dropout" in caplog.text
    with pytest.raises(LayerPruneError, match="can't be precomputed: their output differs in training mode"):
        bench.trainer(cache="on").train()


def test_several_streams_of_states_turn_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(tmp_path, "deepseek_v4")
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        assert len(bench.losses(max_steps=2, loss="ce+kd")) == 2
    assert "all layers run in every step: layers pass on several streams of hidden states" in caplog.text


def test_rows_that_see_each_other_turn_it_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bloom knows no positions by which rows in one sequence could be told apart."""
    bench, packed = Bench(tmp_path, "bloom"), {"packing": True, "max_steps": 2}
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        assert bench.losses(**packed) == bench.losses(cache="off", **packed)
    assert "all layers run in every step: their output for a row depends on the other rows" in caplog.text
    for method in ("last2", "last6"):  # with frozen layers below, and without
        with pytest.raises(LayerPruneError, match="loss=kd needs rows that are kept apart, and in this model"):
            bench.trainer(method, loss="kd", **packed).train()
    assert len(bench.losses(loss="kd", packing_strategy="wrapped", **packed)) == 2


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "bloom"])
@pytest.mark.parametrize("bf16", [False, True])
def test_rounding_is_not_taken_for_rows_that_see_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, model_type: str, bf16: bool
) -> None:
    """In a mixture of experts, its effect has no bound: it sends tokens to other experts."""
    bench, states, off = Bench(tmp_path, model_type), _Precomputation._compute_states, 1.025 if bf16 else 1.001
    monkeypatch.setattr(
        _Precomputation,
        "_compute_states",
        lambda *run: [state * (off if len(run[-1]) == 1 else 1) for state in states(*run)],
    )
    settings = {"loss": "kd", "packing": True, "max_steps": 1, "bf16": bf16}
    if model_type == "bloom":
        with pytest.raises(LayerPruneError, match="loss=kd needs rows that are kept apart"):
            bench.losses(**settings)
        return
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        assert len(bench.losses(**settings)) == 1
    assert "all layers run in every step" not in caplog.text
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **kwargs: 1 // torch.zeros(1, dtype=torch.int))
    with pytest.raises(LayerPruneError, match="loss=kd needs rows that are kept apart"):  # as far as can be told
        bench.losses(**settings)


def test_what_gradients_do_not_show_is_not_taken_for_rounding(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest row of a batch decides phi3's frequencies for all; and some kernels have no gradients at all."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    monkeypatch.setitem(OVERRIDES, "phi3", {"rope_parameters": rope, "original_max_position_embeddings": 16})
    trainer = Bench(tmp_path / "phi3", "phi3").trainer(max_steps=1, pad_to_multiple_of=None)
    assert [len(ids) > 16 for ids in trainer.train_dataset["input_ids"][:2]] == [True, False]
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        trainer.train()
    assert "their output for a row depends on the other rows of the batch" in caplog.text
    bench = Bench(tmp_path / "bloom", "bloom")
    for model in (trainer := bench.trainer(loss="kd", packing=True)).plain_model, bench.dense:
        for name, module in model.named_modules():
            if name.endswith("self_attention.dense"):
                module.register_forward_hook(lambda module, given, output: output.detach())
    with pytest.raises(LayerPruneError, match="loss=kd needs rows that are kept apart"):
        trainer.train()


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha adds noise"),
        ({"method": "last6"}, "no layer lies below the first trained parameter"),
    ],
)
def test_what_else_turns_it_off(llama: Bench, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(LayerPruneError, match=why):
        llama.trainer(cache="on", **settings).train()


def test_lora_has_no_frozen_layers_but_can_have_a_teacher(llama: Bench, caplog: pytest.LogCaptureFixture) -> None:
    lora = parse_method("lora").adapter(ModelConfig(lora_r=4, lora_dropout=0.0))
    trainer = llama.trainer("lora", peft_config=lora, loss="kd", max_steps=24)
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        trainer.train()
    assert "all layers run in every step: no layer lies below the first trained parameter" in caplog.text
    each = losses(trainer)  # six batches see every row once, so four rounds; a batch alone says little
    assert sum(each[-6:]) < sum(each[:6])


@pytest.mark.parametrize("failing", ["Teacher.states", "free_memory"])
def test_both_models_are_whole_after_a_failure(llama: Bench, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*given: Any) -> None:
        raise RuntimeError("the teacher fails")

    trainer = llama.trainer(cache="on", loss="kd", output_dir=str(llama.folder / f"failed at {failing}"))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = [model(input_ids=ids).logits for model in (trainer.model, llama.dense)]
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_layerprune.heal.teacher.{failing}", fail)
            with pytest.raises(RuntimeError, match="the teacher fails"):
                trainer.train()
        after = [model(input_ids=ids).logits for model in (trainer.model.eval(), llama.dense)]
    assert all(map(torch.equal, before, after))
    trainer.train()  # goes on from the frozen layers' states


# --- the cache on disk --------------------------------------------------------------------------------


@pytest.fixture
def cache(llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    llama.trainer(cache="on", cache_dir="~/cache", keep_cache=True, loss="kd").train()
    return tmp_path / "cache"


def test_cache_is_kept_and_used_again(llama: Bench, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = sorted(cache.rglob("*.safetensors"))
    assert [path.parent.name.partition("-")[0] for path in shards] == ["prefix", "teacher"]
    states = load_file(shards[0])
    assert sorted(map(int, states)) == list(range(24))
    assert all(of_row.shape[1] == 32 for of_row in states.values())
    before = {path: path.stat().st_mtime_ns for path in shards}
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        llama.trainer(cache="on", cache_dir=str(cache), keep_cache=True, loss="kd").train()
    assert "already has the hidden states" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before
    llama.trainer(cache="on", cache_dir=str(cache), loss="kd").train()
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")} == before  # it has another's


def test_cache_of_another_model_or_other_rows_is_not_used(llama: Bench, cache: Path, tmp_path: Path) -> None:
    """It stays as it is, and the run removes what it has added."""
    before = sorted(cache.rglob("*"))
    other = Bench(tmp_path / "other", drop=[1, 6])
    settings = {"cache": "on", "loss": "kd", "max_steps": 2}
    assert other.losses(cache_dir=str(cache), **settings) == other.losses(**settings)
    assert llama.losses(cache_dir=str(cache), rows_=rows(seed=5), **settings) == llama.losses(
        rows_=rows(seed=5), **settings
    )
    alike = Bench(tmp_path / "alike")  # the same weights, which another config makes another model of
    config = alike.pruned / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 0.1}))
    assert alike.losses(cache="on", cache_dir=str(cache)) == alike.losses(cache="off")
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
