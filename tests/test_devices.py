"""Where weights are during healing and after it, as far as a CPU can show; `test_gpu.py` has the rest."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import peft
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import sdpa_mask

from hf_layerprune.adapter.reading import load_adapter
from hf_layerprune.heal import placement
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.heal.placement import eager_attention_on_cpu, use_one_gpu
from hf_layerprune.heal.precompute import _Precomputation
from hf_layerprune.heal.teacher import Teacher
from hf_layerprune.heal.trainer import HealTrainer
from hf_layerprune.runtime.head import Head
from hf_layerprune.runtime.prefix import Prefix

from .heal_makers import Bench, rows, tuned, word_tokenizer
from .test_out_of_memory import MESSAGE
from .tiny_models import EAGER, tiny_input, tiny_model


def test_a_teacher_that_was_passed_goes_back_in_one_piece(tmp_path: Path) -> None:
    """To the meta device in place of the CPU, and from the CPU in place of a card."""
    bench = Bench(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(bench.pruned)
    prefix = Prefix(student, 4)
    prefix.run(input_ids=torch.tensor([[3, 4, 5]]))
    teacher = Teacher(bench.dense, student, prefix)
    assert teacher.shared_depth
    teacher._device = torch.device("meta")
    wanted = bench.dense.lm_head.weight.detach().clone()
    names = set(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict())
    head = teacher.release(torch.device("cpu"), Head())
    assert {p.device.type for p in (*bench.dense.parameters(), *bench.dense.buffers())} == {"meta"}
    assert set(bench.dense.state_dict()) == names
    assert head.weight is not None
    assert torch.equal(head.weight, wanted)


def test_one_process_trains_on_one_of_several_gpus(llama: Bench, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    args = HealConfig(output_dir=str(llama.folder / "out"), use_cpu=True, bf16=False)
    model = tiny_model("llama")
    args._n_gpu = 3
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    use_one_gpu(model, args)
    assert (args.n_gpu, caplog.text) == (3, "")
    model.hf_device_map = {"": 0}
    use_one_gpu(model, args)
    assert args.n_gpu == 1
    assert "one process has 3 GPUs and trains on the first alone" in caplog.text
    assert "accelerate launch" in caplog.text


def test_the_trainer_takes_one_gpu_before_trls_checks(llama: Bench) -> None:
    args = HealConfig(
        str(llama.folder / "out"), use_cpu=True, bf16=False, report_to=[], max_length=32, learning_rate=1e-2
    )
    args._n_gpu = 2
    model = AutoModelForCausalLM.from_pretrained(llama.pruned, **EAGER)
    peft_config = parse_method("last1").tail_config(llama.cut, str(llama.folder / "dense"))
    trainer = HealTrainer(
        model, args, train_dataset=rows(), processing_class=word_tokenizer(), peft_config=peft_config
    )
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, args.per_device_train_batch_size)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_model_that_fsdp_has_yet_to_move_is_checked_where_it_is(
    precision: str, llama: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The accelerator's own mixed precision is for the card, to which FSDP moves the model later.

    The float32 output of the trained layers meets a frozen head in 16 bits.
    """
    monkeypatch.setattr(Accelerator, "autocast", lambda self: torch.autocast("cuda", enabled=False))
    trainer = llama.trainer("last1", bf16=True)
    trainer.accelerator.state._mixed_precision = precision
    model = trainer.plain_model.to(torch.bfloat16 if precision == "bf16" else torch.float16)
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    del trainer.output_head
    assert trainer.output_head.is_linear


def test_what_zero3_leaves_out_is_saved(llama: Bench, tmp_path: Path) -> None:
    """A repair is frozen, and transformers passes on trained weights alone. All processes have to gather the others."""
    config = parse_method("last2").tail_config(llama.cut, str(llama.folder / "dense"))
    config.repaired_modules = ["model.layers.2.mlp.down_proj"]
    trainer = llama.trainer(peft_config=config)
    repaired = trainer.plain_model.model.layers[2].mlp.down_proj
    gathered: list[bool] = []

    def gather() -> dict[str, torch.Tensor]:
        gathered.append(trainer.args.should_save)
        return trainer.model.state_dict() if trainer.args.should_save else {}

    trainer._split = True
    trainer.deepspeed = SimpleNamespace(_zero3_consolidated_16bit_state_dict=gather)
    trainer.save_model(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    (name,) = (name for name in saved if "down_proj" in name and "layers.2." in name)
    assert torch.equal(saved[name], repaired.modules_to_save["default"].weight)
    with mock.patch.object(HealConfig, "should_save", False):  # as in other processes
        trainer.save_model(str(tmp_path / "none"))
    assert gathered == [True, False]


def test_weights_beside_quantised_ones_are_trained_in_float32(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL casts them to bfloat16, whose gradients the loss scaling of float16 can't divide."""

    def cast(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, model, *args, **kwargs)
        self.model.is_quantized = True
        for parameter in self.model.parameters():
            parameter.data = parameter.data.bfloat16()

    parent = HealTrainer.__mro__[1]
    plain = parent.__init__
    monkeypatch.setattr(parent, "__init__", cast)
    trainer = llama.trainer("last1", bf16=True)
    assert {p.dtype for p in tuned(trainer).values()} == {torch.float32}
    assert {p.dtype for p in trainer.model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_frozen_layers_that_no_longer_fit_are_put_on_the_cpu(
    llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when the optimizer's states leave no room for them after the last step."""
    caplog.set_level(logging.WARNING)
    move, tried = Prefix._move, []

    def full(self: Prefix, device: Any) -> None:
        tried.append(str(device))
        if str(device) == "meta":  # stands for the card
            raise torch.OutOfMemoryError(MESSAGE)
        move(self, device)

    def leaves_from_a_card(self: Prefix) -> None:
        self._device = torch.device("meta")
        unload(self)

    unload = Prefix.unload
    monkeypatch.setattr(Prefix, "_move", full)
    monkeypatch.setattr(Prefix, "unload", leaves_from_a_card)
    trainer = llama.trainer("last1", cache="on", max_steps=2)
    trainer.train()
    assert tried[-2:] == ["meta", "cpu"]
    assert "no room for the frozen layers" in caplog.text
    assert trainer.plain_model(tiny_input()).logits.isfinite().all()
    trainer.save_model(str(tmp_path / "saved"))
    assert load_file(tmp_path / "saved" / "adapter_model.safetensors")


def test_a_full_card_does_not_turn_the_cache_off(llama: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Any, prefix: Prefix) -> str:
        prefix.skip()
        raise torch.OutOfMemoryError(MESSAGE)

    monkeypatch.setattr(_Precomputation, "_find_prefix_obstacle", full)
    trainer = llama.trainer("last1", cache="auto")
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert trainer.plain_model(tiny_input()).logits.isfinite().all()  # nothing is skipped any more


def test_an_adapter_is_loaded_where_its_base_is(llama: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT would load it onto a GPU, if there is one."""
    llama.trainer("last1").save_model(str(tmp_path))
    places = []
    read = peft.peft_model.load_peft_weights

    def note(*args: Any, device: Any = None, **kwargs: Any) -> Any:
        places.append(device)
        return read(*args, device=device, **kwargs)

    monkeypatch.setattr(peft.peft_model, "load_peft_weights", note)
    monkeypatch.setattr(peft.peft_model, "infer_device", lambda: "cuda")
    load_adapter(AutoModelForCausalLM.from_pretrained(llama.pruned), str(tmp_path))
    assert places == ["cpu"]


def test_attention_for_gpus_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dense model's head is tried out before the model is on the card."""
    monkeypatch.setattr(placement, "_GPU_ATTENTION", "card_alone")  # transformers would look for a kernel for "flash"
    calls = []

    def on_a_card(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(query.device.type)
        raise RuntimeError("FlashAttention only supports CUDA")

    AttentionInterface.register("card_alone", on_a_card)
    AttentionMaskInterface.register("card_alone", sdpa_mask)
    bench = Bench(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(bench.pruned, attn_implementation="card_alone")
    teacher = Teacher(str(tmp_path / "dense"), student, None)
    assert teacher.model.config._attn_implementation == "card_alone"
    assert teacher.width == teacher.layer_width
    with pytest.raises(RuntimeError, match="only supports CUDA"):
        teacher.model(tiny_input())
    assert calls == ["cpu"]
    with eager_attention_on_cpu(student):
        assert student.config._attn_implementation == "eager"
        assert student(tiny_input()).logits.isfinite().all()
    assert student.config._attn_implementation == "card_alone"
