"""Several adapters on one pruned base, and configs that are used again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model

from hf_layerprune import CutError, LayerDropConfig, drop_layers, prune_with
from hf_layerprune.versions import transformers_loads_whole_modules

from .test_adapter import load, logits, save, shake
from .tiny_models import tiny_input


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gemma3_text", tmp_path_factory)


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

    other = LayerDropConfig(drop_layers=[1])
    for add in (
        lambda: model.add_adapter("third", other),
        lambda: inject_adapter_in_model(other, again.get_base_model(), "third"),  # transformers' load_adapter
    ):
        with pytest.raises(CutError, match=r"drops layers \[6, 7\], and the new one \[1\]"):
            add()
    assert list(model.peft_config) == list(again.peft_config) == ["default", "second"]


def test_another_adapter_leaves_what_trains_as_it_is(llama: Path, tmp_path: Path) -> None:
    prune_with(LayerDropConfig(drop_layers=[2, 3]), load(llama)).save_pretrained(tmp_path)
    for trains in (True, False):
        model = PeftModel.from_pretrained(load(llama), tmp_path, is_trainable=trains)
        before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert bool(before) == trains
        model.load_adapter(tmp_path, "second")
        model.add_adapter("third", LayerDropConfig(drop_layers=[2, 3]))
        after = {name for name, p in model.named_parameters() if p.requires_grad and ".third." not in name}
        assert after == before


def test_a_base_takes_an_adapter_of_the_same_name_once(llama: Path, tmp_path: Path) -> None:
    """The second one would have the first one's weights in all modules that it does not tune itself."""
    base, config = load(llama), LayerDropConfig(drop_layers=[2, 3], tune_layers=1)
    model = prune_with(LayerDropConfig(drop_layers=[2, 3]), base)
    shake(model)
    expected = logits(model)
    prune_with(config, load(llama)).save_pretrained(tmp_path)
    for again in (
        lambda: get_peft_model(base, config),
        lambda: get_peft_model(model, config),
        lambda: PeftModel.from_pretrained(base, tmp_path),
    ):
        with pytest.raises(CutError, match=r"has adapters \(default\).*load the model again"):
            again()
    assert model.peft_config["default"].modules_to_save[0] == "model.layers.3"
    assert torch.equal(logits(model), expected)


def test_the_adapters_of_transformers(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `load_adapter` activates what it loads; its `add_adapter` trains what can't be saved."""
    model = prune_with(LayerDropConfig(drop_layers=[2, 3]), load(llama))
    shake(model)
    model.save_pretrained(tmp_path)
    plain = load(llama)
    for name in ("first", "second") if transformers_loads_whole_modules() else ():
        plain.load_adapter(str(tmp_path), name)
        assert torch.equal(logits(plain), logits(model))
    monkeypatch.setattr("hf_layerprune.versions.transformers_loads_whole_modules", lambda: False)
    with pytest.raises(CutError, match=r"leave out this adapter's weights; use PeftModel\.from_pretrained"):
        load(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(load(llama), tmp_path)), logits(model))

    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.19.0")  # 5.24 asks for one to come
    base, config = load(llama), LayerDropConfig(drop_layers=[2])
    with pytest.raises(CutError, match="use model = get_peft_model"):
        base.add_adapter(config)
    assert base.config.num_hidden_layers == 8
    status = get_peft_model(base, config).get_model_status()
    assert status.peft_types == {"default": "LAYER_DROP"}


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


def test_the_only_adapter_can_be_replaced(llama: Path, tmp_path: Path) -> None:
    config = LayerDropConfig(drop_layers=[2, 3])
    model = prune_with(config, load(llama))
    shake(model)
    model.save_pretrained(tmp_path)
    expected = logits(model)
    for add in (lambda: model.add_adapter("new", config), lambda: model.load_adapter(tmp_path, "new")):
        model.delete_adapter(*model.peft_config)
        add()
        model.set_adapter("new")
        assert any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), expected)


def test_one_adapter_inside_another_is_refused(llama: Path, tmp_path: Path) -> None:
    """PEFT would train it, and then fail to save it, or to load what it saved."""
    layers = LayerDropConfig(drop_layers=[2, 3])
    inside = LayerDropConfig(drop_layers=[2, 3], tune_layers=0, modules_to_save=["mlp.up_proj"])
    for first, second in ((layers, inside), (inside, layers)):
        model = prune_with(first, load(llama))
        shake(model)
        expected = logits(model)
        with pytest.raises(CutError, match="one is inside the other, and PEFT could save neither"):
            model.add_adapter("second", second)
        assert torch.equal(logits(model), expected)
        model.delete_adapter("default")
        model.add_adapter("second", second)
        model.set_adapter("second")
        shake(model)
        model.save_pretrained(tmp_path)
        assert torch.equal(logits(PeftModel.from_pretrained(load(llama), tmp_path / "second")), logits(model))


@pytest.mark.parametrize("saved", [False, True])
def test_a_config_tunes_what_it_says_however_often_it_is_used(llama: Path, tmp_path: Path, saved: bool) -> None:
    config = LayerDropConfig(drop_layers=[2, 3], modules_to_save=["model.embed_tokens"])
    first = prune_with(config, load(llama))
    if saved:
        first.save_pretrained(tmp_path)
        config = LayerDropConfig.from_pretrained(tmp_path)
    for changes, layers in (({"tune_layers": 1}, [5]), ({"drop_layers": [2, 3, 4]}, [2, 3, 4])):
        for made in (replace(config, **changes), replace(first.peft_config["default"], **changes)):
            again = prune_with(made, load(llama))
            names = again.peft_config["default"].modules_to_save
            assert names == [*(f"model.layers.{i}" for i in layers), "model.norm", "lm_head", "model.embed_tokens"]
            assert any(parameter.requires_grad for parameter in again.parameters())
            assert made.drop_layers == again.peft_config["default"].drop_layers


def test_a_used_config_says_what_to_do_with_a_base_of_another_depth(llama: Path, tmp_path: Path) -> None:
    config = LayerDropConfig(drop=2, base_model_name_or_path=str(llama))
    prune_with(config).save_pretrained(tmp_path / "adapter")
    other = load(llama)
    drop_layers(other, [0])
    with pytest.raises(CutError, match="the model has 7; make a new config"):
        prune_with(config, other)
    with pytest.raises(CutError, match=rf"the model has 7; use it with its base \({llama};"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")


def test_a_head_is_tuned_as_each_base_has_it(llama: Path, tied: Path) -> None:
    config = LayerDropConfig(drop_layers=[2])
    for base, tuned in ((tied, False), (llama, True), (tied, False)):
        assert prune_with(config, load(base)).peft_config["default"].tune_lm_head is tuned


@pytest.mark.parametrize("active", ["default", "second", "third"])
def test_only_an_adapter_that_tunes_a_tied_head_unties_it(tied: Path, tmp_path: Path, active: str) -> None:
    model = prune_with(LayerDropConfig(drop_layers=[2]), load(tied))
    model.add_adapter("second", LayerDropConfig(drop_layers=[2], tune_lm_head=True))
    model.add_adapter("third", LayerDropConfig(drop_layers=[2], tune_lm_head=True))
    model.add_adapter("fourth", LayerDropConfig(drop_layers=[2]))
    assert [config.tune_lm_head for config in model.peft_config.values()] == [False, True, True, False]
    model.set_adapter(active)
    shake(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings == (active == "default")
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), expected)


def test_a_disabled_adapter_is_left_alone(llama: Path, tmp_path: Path) -> None:
    config = LayerDropConfig(drop_layers=[2, 3], keep_dropped=True)
    model = prune_with(config, load(llama))
    shake(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        for use in (
            lambda: model.save_pretrained(tmp_path / "disabled"),
            lambda: model.add_adapter("second", config),
            lambda: model.load_adapter(tmp_path, "second"),
            lambda: model.load_adapter(tmp_path, "default"),
            lambda: model.set_adapter("default"),
            lambda: model.delete_adapter("default"),
        ):
            with pytest.raises(CutError, match=r"while its adapter is disabled.*leave disable_adapter\(\) first"):
                use()
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("merged", ["default", "second"])
def test_the_named_adapter_is_merged(model: PeftModel, merged: str) -> None:
    model.set_adapter(merged)
    expected = logits(model)
    model.set_adapter("default" if merged == "second" else "second")
    for names in (["default", "second"], ["third"], []):
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(CutError, match=r"must be the name of one adapter, of \['default', 'second'\]"):
                merge(adapter_names=names)
    model.merge_adapter(adapter_names=[merged])
    assert torch.equal(logits(model), expected)
    model.set_adapter("default" if merged == "second" else "second")
    assert torch.equal(logits(model.merge_and_unload(adapter_names=[merged])), expected)


def test_a_batch_has_one_adapter(model: PeftModel) -> None:
    for run in (model, model.generate):
        with pytest.raises(CutError, match="choose one with set_adapter"):
            run(input_ids=tiny_input(), adapter_names=["default", "second"])


def test_what_was_not_kept_is_not_kept_by_a_second_adapter(llama: Path, tmp_path: Path) -> None:
    kept = prune_with(LayerDropConfig(drop_layers=[2, 3], keep_dropped=True), load(llama))
    kept.save_pretrained(tmp_path)
    kept.add_adapter("second", kept.peft_config["default"])
    model = prune_with(LayerDropConfig(drop_layers=[2, 3]), load(llama))
    for trainable in (False, True):
        model.load_adapter(tmp_path, f"saved {trainable}", is_trainable=trainable)
    with pytest.raises(CutError, match="earlier adapter that did not keep them"):
        model.add_adapter("second", LayerDropConfig(drop_layers=[2, 3], keep_dropped=True))
    assert list(model.peft_config) == ["default", "saved False", "saved True"]
