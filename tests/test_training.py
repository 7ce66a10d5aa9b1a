"""Tuning with TRL's own trainer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_layerprune import CutError, LayerDropConfig, prune_with

from .heal_makers import word_tokenizer
from .tiny_models import EAGER, VOCAB, tiny_model


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_sft_trainer_takes_the_config(model_type: str, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    tiny_model(model_type).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **EAGER)
    rows = Dataset.from_list([{"text": " ".join(f"w{3 + (i * j) % 100}" for j in range(20))} for i in range(16)])
    trainer = SFTTrainer(
        model=base,
        args=SFTConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            gradient_checkpointing=False,
            bf16=False,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            max_length=32,
            use_cpu=True,
        ),
        train_dataset=rows,
        processing_class=word_tokenizer(),
        peft_config=LayerDropConfig(drop=0.25),
    )
    model = trainer.model
    assert isinstance(model, PeftModel)
    assert model.config.num_hidden_layers == 6
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    for name, parameter in model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        assert changed == (".modules_to_save.default." in name), name
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **EAGER)
    again = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    ids = torch.randint(3, VOCAB - 1, (1, 12))
    with torch.no_grad():
        assert torch.allclose(again(ids).logits, model.eval()(ids).logits, atol=1e-5)


def test_the_reference_of_dpo(tmp_path: Path) -> None:
    """It is the pruned model before training, the dense model, or an error that says how to get either."""
    from trl import DPOConfig, DPOTrainer

    tiny_model("llama").save_pretrained(tmp_path / "base")
    words = [[" ".join(f"w{3 + (i * j + k) % 100}" for j in range(5 + k)) for k in range(3)] for i in range(4)]
    pairs = Dataset.from_list([{"prompt": p + " ", "chosen": c, "rejected": r} for p, c, r in words])

    def first_loss(config: LayerDropConfig, peft_config: bool) -> float:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32, **EAGER)
        args = DPOConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=1,
            report_to=[],
            save_strategy="no",
            logging_steps=1,
            bf16=False,
            use_cpu=True,
        )
        trainer = DPOTrainer(
            model=model if peft_config else prune_with(config, model),
            args=args,
            train_dataset=pairs,
            processing_class=word_tokenizer(),
            peft_config=config if peft_config else None,
        )
        trainer.train()
        return float(trainer.state.log_history[0]["loss"])

    with pytest.raises(CutError, match=r"keep_dropped=True, .*pass it prune_with\(config, model\), not peft"):
        first_loss(LayerDropConfig(), True)
    assert first_loss(LayerDropConfig(), False) == pytest.approx(math.log(2), abs=1e-4)  # of two equal models
    assert first_loss(LayerDropConfig(keep_dropped=True), True) != pytest.approx(math.log(2), abs=1e-3)
