"""Logits that are computed from states against the model's own, and what becomes of models where that fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from trl import ModelConfig

from hf_layerprune import UnsupportedModelError
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.runtime.head import Head, OutputHead

from .heal_makers import Bench, losses
from .tiny_models import EAGER, randomize, tiny_config, tiny_input, tiny_model

# Fields that decide what a model does to its logits, by the names that configs give them, and values that show.
FIELDS = {
    "cohere": {"logit_scale": 0.3},
    "falcon_h1": {"lm_head_multiplier": 0.3},
    "gemma2": {"final_logit_softcapping": 0.75},
    "granite": {"logits_scaling": 3.0},
    "hyperclovax": {"logits_scaling": 3.0},
    "inkling_text": {"logits_mup_width_multiplier": 0.5},
    "recurrent_gemma": {"logits_soft_cap": 0.75},
    "xlstm": {"output_logit_soft_cap": 0.75},
}


def own_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def our_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    output = OutputHead(model)
    assert output.is_linear, output.not_linear
    states = output.states(input_ids=ids, use_cache=False)
    assert states.shape == (*ids.shape, output.width)
    return output.head().logits(states)


def model_with(model_type: str, fields: dict[str, float]) -> Any:
    config = tiny_config(model_type)
    for name, value in fields.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("model_type", FIELDS)
def test_factors_and_bounds(model_type: str) -> None:
    model, plain = model_with(model_type, FIELDS[model_type]), model_with(model_type, {})
    wanted = own_logits(model, tiny_input())
    assert not torch.allclose(wanted, own_logits(plain, tiny_input()), rtol=1e-2)
    assert torch.allclose(our_logits(model, tiny_input()), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["bert", "rembert", "modernbert-decoder", "llama4", "mllama", "gpt2", "bart"])
def test_what_comes_before_the_matrix(model_type: str) -> None:
    model = tiny_model(model_type)
    assert torch.allclose(our_logits(model, tiny_input()), own_logits(model, tiny_input()), rtol=1e-4, atol=1e-5)


def test_factor_is_exact_in_bfloat16() -> None:
    """It is the config's number in float32, not in the 8 bits of bfloat16."""
    model = model_with("granite", {"logits_scaling": 3.0}).bfloat16()
    assert OutputHead(model).head().transform.scale == pytest.approx(1 / 3.0, rel=1e-7)


class _TwoMatrices(nn.Module):
    """An output head that is more than a matrix."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        self.plain = plain
        self.weight = plain.weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits = self.plain(states)
        return logits + 0.1 * logits.square()


def _odd(model: Any) -> Any:
    model.set_output_embeddings(_TwoMatrices(model.get_output_embeddings()))
    return model


def test_other_heads_give_their_own_logits() -> None:
    model = _odd(tiny_model("llama"))
    output = OutputHead(model)
    assert not output.is_linear
    assert torch.equal(output.states(input_ids=tiny_input()), own_logits(model, tiny_input()))


def test_a_tuned_copy_of_the_head_is_taken_for_the_head(tmp_path: Path) -> None:
    trainer = Bench(tmp_path).trainer("lm_head+last1")
    model = trainer.plain_model
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(2)
    assert torch.allclose(our_logits(model, tiny_input()), own_logits(model, tiny_input()), rtol=1e-4, atol=1e-5)


def test_lora_in_the_head_is_part_of_it() -> None:
    """At the start LoRA does nothing, so the logits alone would not tell."""
    lora = parse_method("lora").adapter(ModelConfig(lora_target_modules=["lm_head", "q_proj"]))
    output = OutputHead(get_peft_model(tiny_model("llama"), lora).get_base_model())
    assert not output.is_linear
    assert output.width == output.vocabulary


@pytest.mark.parametrize("loss", ["ce", "kd", "ce+kd"])
def test_training_from_the_models_own_logits(loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same losses as from its last hidden states."""
    bench = Bench(tmp_path)
    usual = bench.trainer(loss=loss)
    usual.train()
    monkeypatch.setattr(OutputHead, "_measure_transform", lambda self, ids: None)
    whole = bench.trainer(loss=loss)
    whole.train()
    assert not whole.output_head.is_linear
    assert losses(whole) == pytest.approx(losses(usual), rel=1e-5)


def test_a_model_without_logits_is_refused() -> None:
    model = tiny_model("llama")
    model.forward = lambda *args, **kwargs: model.model(*args, **kwargs)
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM can't be healed or evaluated"):
        OutputHead(model)


def test_a_quantiser_that_fails_is_named_as_the_cause() -> None:
    """As bitsandbytes does on some CPUs, with matrices of an odd width."""
    model = tiny_model("llama")
    model.is_quantized, model.forward = True, lambda *args, **kwargs: torch.zeros(16).view(32, 0)
    with pytest.raises(
        UnsupportedModelError, match=r"quantised weights of Llama.* on the device cpu \(shape '\[32, 0\]'"
    ):
        OutputHead(model)


def test_states_that_are_logits_are_not_changed_in_place() -> None:
    from hf_layerprune.heal.losses import Distillation, head_loss

    torch.manual_seed(0)
    own, taught = torch.randn(5, 11).requires_grad_(), torch.randn(5, 11)
    before = own.detach().clone(), taught.clone()
    labels = torch.randint(0, 11, (5,))
    distillation = Distillation(taught, Head(), torch.ones(5, dtype=torch.bool), torch.tensor(0.3))
    found = head_loss(own, Head(), labels, torch.tensor(0.7), distillation)
    found.loss.backward()
    gradient = own.grad.clone()
    own.grad = None
    p, q = F.log_softmax(taught, -1), F.log_softmax(own, -1)
    wanted = 0.7 * F.cross_entropy(own, labels, reduction="sum") + 0.3 * (p.exp() * (p - q)).sum()
    wanted.backward()
    assert torch.allclose(found.loss, wanted, rtol=1e-5)
    assert torch.allclose(gradient, own.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(own.detach(), before[0])
    assert torch.equal(taught, before[1])
