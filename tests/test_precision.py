"""On a CPU that multiplies 16 bits slowly, what computes much does so in float32; what is written stays as it was."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from hf_layerprune import CheckpointError, LayerDropConfig, prune_with
from hf_layerprune.errors import CutError
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.stage import write_healed
from hf_layerprune.heal.student import Student, adapter_config, load_student
from hf_layerprune.heal.trainer import HealTrainer
from hf_layerprune.measure.evaluate import EvalRequest, evaluate
from hf_layerprune.records.lineage import stage_entry
from hf_layerprune.runtime import precision
from hf_layerprune.runtime.precision import to_fast_precision
from hf_layerprune.stages.prune import PruneRequest, prune_to
from hf_layerprune.stages.rank import RankRequest, rank

from .heal_makers import Bench, losses, rows, tuned, word_tokenizer
from .measure_models import write_model, write_tasks
from .tiny_models import tiny_input, tiny_model

TYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=[True, False], ids=["slow", "fast"])
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What the CPU says of itself."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: not request.param)
    return request.param


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder in bfloat16, with a tokenizer."""
    folder = write_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", TYPES)
def test_a_model_is_changed_where_that_is_faster(slow: bool, dtype: torch.dtype) -> None:
    model = to_fast_precision(tiny_model("llama").to(dtype))
    assert model.dtype == (torch.float32 if slow else dtype)
    wanted = tiny_model("llama").to(dtype).to(model.dtype)
    assert torch.equal(model(tiny_input()).logits, wanted(tiny_input()).logits)
    if slow:
        assert model.config.dtype == torch.float32
        assert model.get_output_embeddings().weight.dtype == torch.float32


def test_a_model_in_float32_stays(slow: bool) -> None:
    model = tiny_model("llama")
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    to_fast_precision(model)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("slow", [True], indirect=True)
def test_where_memory_is_short_it_stays_and_that_is_said(
    slow: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(precision, "free_bytes", lambda device: 1000)
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        model = to_fast_precision(tiny_model("llama").bfloat16())
    assert model.dtype == torch.bfloat16
    assert "not enough memory" in caplog.text


@pytest.mark.parametrize("repair", [None, "linear"])
def test_what_overflows_float16_is_pruned_in_another_type(repair: str | None, tmp_path: Path) -> None:
    """As the error says, by the command line or in Python."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        for i in (2, 3):
            model.transformer.h[i].mlp.c_proj.bias[0] += 4e4
    model.half().save_pretrained(tmp_path / "base")
    config = LayerDropConfig(
        base_model_name_or_path=str(tmp_path / "base"), criterion="kl", drop=1, repair=repair, calibration="self",
        calibration_samples=8, calibration_length=8,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        with pytest.raises(
            CheckpointError, match=r"overflow float16; load the model in bfloat16 or float32 \(--dtype"
        ):
            prune_with(config)
        for dtype in ("float32", torch.bfloat16):
            assert prune_with(config, dtype=dtype).dtype == (torch.float32 if dtype == "float32" else dtype)


def test_a_base_in_float16_is_read_in_the_other_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not converted as it stands, which would round the frequencies of its positions."""
    seen = []
    monkeypatch.setattr(
        "hf_layerprune.runtime.walk.LayerWalk._check_layerwise",
        lambda walk, *_: seen.append((walk.model.dtype, walk.model.model.rotary_emb.inv_freq.dtype)),
    )
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    tiny_model("llama").half().save_pretrained(tmp_path / "base")
    config = LayerDropConfig(
        base_model_name_or_path=str(tmp_path / "base"), criterion="block_influence", target_params=60_000, calibration="self",
        calibration_samples=8, calibration_length=8,
    )  # fmt: skip
    assert prune_with(config, dtype="bfloat16").dtype == torch.bfloat16
    assert seen == [(torch.bfloat16, torch.float32)]


def test_repair_and_ranking(slow: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        "hf_layerprune.runtime.walk.LayerWalk._check_layerwise", lambda walk, *_: seen.append(walk.model.dtype)
    )
    computes_in = torch.float32 if slow else torch.bfloat16
    small = {"calibration": "self", "calibration_samples": 8, "calibration_length": 32}
    prune_to(PruneRequest(str(base), str(tmp_path / "cut"), drop_layers=[1], repair="linear", **small))
    model = prune_with(LayerDropConfig(base_model_name_or_path=str(base), drop_layers=[1], repair="linear", **small))
    rank(RankRequest(str(base), criteria=["block_influence"], **small))
    assert seen == [computes_in] * 3
    rank(RankRequest(str(base), criteria=["block_influence"], dtype="bfloat16", **small))
    assert seen[-1] == torch.bfloat16
    assert model.dtype == torch.bfloat16
    before, after = stored(base), stored(tmp_path / "cut")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(after[name], before[name])
    assert all(torch.equal(after[name], before[name]) for name in after if ".layers.0." in name and "mlp" not in name)


@pytest.mark.parametrize("method", ["last1", "lm_head+last1", "full"])
def test_training(slow: bool, base: Path, tmp_path: Path, method: str) -> None:
    prune_to(PruneRequest(str(base), str(tmp_path / "cut"), drop_layers=[1]))
    student = Student.load(tmp_path / "cut")
    way = student.method(method)
    args = HealConfig(
        str(tmp_path / "run"), method=way.name, loss="kd", teacher=str(base), max_steps=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, per_device_train_batch_size=2, learning_rate=1e-2,
    )  # fmt: skip
    assert args.bf16 == (not slow)
    trainer = HealTrainer(
        load_student(student, way, dtype="auto"),
        args,
        train_dataset=rows(8),
        processing_class=word_tokenizer(),
        peft_config=adapter_config(student, way, ModelConfig()),
    )
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    assert {p.dtype for p in frozen} <= {torch.float32 if slow else torch.bfloat16}
    with stage_entry("heal", {}) as entry:
        trainer.train()
    assert trainer.data_collator.precomputed.teacher_head.weight.dtype == (torch.float32 if slow else torch.bfloat16)
    trainer.save_model(str(tmp_path / "trained"))
    write_healed(student, tmp_path / "trained", tmp_path / "healed", entry)
    before, after = stored(tmp_path / "cut"), stored(tmp_path / "healed")
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(after[name], before[name]) for name in before)


def test_what_the_user_says_counts(slow: bool, tmp_path: Path) -> None:
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": []}
    assert HealConfig(**settings, bf16=True).bf16 is True
    assert HealConfig(**settings, bf16=False).bf16 is False


def test_measuring_says_it(slow: bool, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    precision._warn_once.cache_clear()
    request = {"tasks_from": tasks, "tasks": ("asked",), "limit": 2, "output": tmp_path / "out.json"}
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        evaluate(EvalRequest(str(base), **request))
        evaluate(EvalRequest(str(base), force=True, **request))
    assert caplog.text.count("dtype float32 is faster") == slow
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_layerprune"):
        evaluate(EvalRequest(str(base), dtype="bfloat16", force=True, **request))
    assert "is faster" not in caplog.text


@pytest.mark.parametrize("loss", ["ce", "ce+kd"])
def test_fp16_with_a_gradient_scaler(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: torch has float16 and a scaler for the CPU, which accelerate leaves out. It learns what float32 does."""
    made = Bench(tmp_path)
    settings = {"method": "lm_head+last2", "loss": loss, "max_steps": 4}
    wanted = made.trainer(**settings)
    wanted.train()
    plain = Accelerator.__init__

    def init(self: Accelerator, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs | {"mixed_precision": "fp16"})
        self.native_amp, self.scaler = True, torch.amp.GradScaler("cpu", init_scale=2.0**12)

    monkeypatch.setattr(Accelerator, "__init__", init)
    trainer = made.trainer(**settings)
    types = set()
    trainer.plain_model.model.layers[-1].mlp.down_proj.register_forward_hook(lambda *given: types.add(given[2].dtype))
    trainer.train()
    assert torch.float16 in types
    assert trainer.accelerator.scaler.get_scale() == 2.0**12  # no step was left out
    assert losses(trainer) == pytest.approx(losses(wanted), rel=1e-2)
    norms = [[log["grad_norm"] for log in one.state.log_history if "loss" in log] for one in (trainer, wanted)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
    for name, value in tuned(wanted).items():  # by AdamW, where a gradient near zero may have either sign
        assert tuned(trainer)[name].dtype == torch.float32
        assert (tuned(trainer)[name] - value).abs().mean() < 1e-3, name


def test_fp16_without_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(CutError, match="fp16=True needs a GPU, and training would run on the CPU"):
        HealConfig(str(tmp_path), fp16=True, use_cpu=True)
