"""Tuning with TRL's own trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerDropConfig

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
