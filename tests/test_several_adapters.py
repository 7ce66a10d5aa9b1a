"""Several adapters on one pruned base, and configs that are used again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from hf_layerprune import CutError, LayerDropConfig, drop_layers, prune_with

from .test_adapter import load, logits, save, shake


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory)


@pytest.fixture
def model(llama: Path) -> PeftModel:
    """With two adapters, `default` and `second`, of which the first is active."""
    made = prune_with(LayerDropConfig(drop_layers=[2, 3]), load(llama))
    shake(made)
    made.add_adapter("second", LayerDropConfig(drop_layers=[2, 3], tune_layers=1))
    made.set_adapter("second")
    shake(made)
    made.set_adapter("default")
    return made


def test_two_adapters_share_the_cut(llama: Path, tmp_path: Path) -> None:
    model = prune_with(LayerDropConfig(drop=0.25), load(llama))
    shake(model)
    first = logits(model)
    model.add_adapter("second", LayerDropConfig(drop=0.25, tune_layers=1))
    model.set_adapter("second")
    cut = load(llama)
    drop_layers(cut, [6, 7])
    assert torch.equal(logits(model), logits(cut))
    shake(model)
    second = logits(model)
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    again = PeftModel.from_pretrained(load(llama), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    again.set_adapter("second")
    assert torch.equal(logits(again), second)

    with pytest.raises(CutError, match=r"drops layers \[6, 7\], and the new one \[1\]"):
        model.add_adapter("third", LayerDropConfig(drop_layers=[1]))


@pytest.mark.parametrize(("deleted", "left"), [("second", "default"), ("default", "second")])
def test_what_is_left_stays_or_becomes_active(model: PeftModel, deleted: str, left: str) -> None:
    model.set_adapter(left)
    expected = logits(model)
    model.set_adapter("default")
    model.delete_adapter(deleted)
    assert model.active_adapter == model.base_model.active_adapter == left
    assert torch.equal(logits(model), expected)
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model.merge_and_unload()), expected)
