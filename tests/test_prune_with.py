"""`prune_with` loads a base without the layers that it drops, and what it makes is a base again."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_layerprune import (
    CheckpointError,
    CutError,
    LayerDropConfig,
    LayerPruneError,
    drop_layers,
    prune_with,
    quality_curve,
    rank_layers,
)
from hf_layerprune.adapter.loading import load_model
from hf_layerprune.cut import lazy
from hf_layerprune.cut.lazy import load_pruned
from tests.matrix import cuts, logits, realign
from tests.measure_models import write_gguf
from tests.test_lazy import DROP, cut_in_memory, save
from tests.tiny_models import EAGER, tiny_input, tiny_model


def config_of(folder: Path, **kwargs) -> LayerDropConfig:
    return LayerDropConfig(base_model_name_or_path=str(folder), **kwargs)


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma3n_text"])
def test_prune_with_loads_cut_and_saves_plain(model_type, tmp_path, monkeypatch):
    dense = save(model_type, tmp_path / "base")
    monkeypatch.setattr("hf_layerprune.adapter.pruning.load_base", None)
    drop = list(cuts(model_type, dense.config)["middle"])
    model = prune_with(config_of(tmp_path / "base", drop_layers=drop), dtype=torch.float32, **EAGER)
    reference = logits(cut_in_memory(dense, drop), tiny_input())
    assert model.base_model.model.config.layer_drop == {"drop_layers": drop, "num_base_layers": 8}
    assert torch.equal(logits(realign(model), tiny_input()), reference)
    with pytest.raises(CutError, match="dropped layers were not kept"), model.disable_adapter():
        pass
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    tuned = logits(model, tiny_input())
    assert not torch.equal(tuned, reference)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **EAGER)
    assert torch.equal(logits(realign(again), tiny_input()), tuned)
    assert AutoConfig.from_pretrained(tmp_path / "pruned").layer_drop["drop_layers"] == drop

    # Its own results are bases too: an adapter is merged, and a cut that is made already is not made twice.
    own = LayerDropConfig.from_pretrained(tmp_path / "adapter")
    for base in ("adapter", "pruned"):
        own.base_model_name_or_path = str(tmp_path / base)
        more = prune_with(own, **EAGER)
        assert torch.equal(logits(realign(more), tiny_input()), tuned)
        assert more.peft_config["default"].base_model_name_or_path == str(tmp_path / base)


def test_prune_with_cuts_a_pruned_base_further(tmp_path):
    save("llama", tmp_path / "base")
    load_pruned(tmp_path / "base", DROP).save_pretrained(tmp_path / "pruned")
    model = prune_with(config_of(tmp_path / "pruned", drop=1), torch_dtype="bfloat16", **EAGER)  # dtype's older name
    assert model.dtype == torch.bfloat16
    assert model.config.layer_drop == {"drop_layers": [4], "num_base_layers": 5}


def test_a_second_adapter_shares_the_cut(tmp_path):
    save("llama", tmp_path)
    model = prune_with(config_of(tmp_path), adapter_name="first", **EAGER)
    model.add_adapter("second", LayerDropConfig(drop=0.25, tune_layers=1))
    assert list(model.peft_config) == ["first", "second"]
    assert model.peft_config["second"].drop_layers == [6, 7]
    assert model.config.num_hidden_layers == 6


def test_keep_dropped_loads_all(tmp_path):
    dense = save("llama", tmp_path)
    model = prune_with(config_of(tmp_path, keep_dropped=True), ignore_mismatched_sizes=True, **EAGER)
    with model.disable_adapter():
        assert torch.equal(logits(realign(model), tiny_input()), logits(dense, tiny_input()))


def test_prune_with_refuses_before_reading(tmp_path, monkeypatch):
    save("llama", tmp_path / "base")
    monkeypatch.setattr(lazy, "safe_open", None)
    with pytest.raises(CutError, match="of a base with 12 layers"):
        prune_with(config_of(tmp_path / "base", drop_layers=[1], num_base_layers=12))
    edit = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(edit))
    with pytest.raises(CheckpointError, match=r"adapter of another method \(.*LORA\); merge it first"):
        prune_with(config_of(tmp_path / "lora"))


@pytest.mark.parametrize("make", [LayerDropConfig, LoraConfig], ids=["layerdrop", "lora"])
def test_a_model_with_adapters_is_refused(make, tmp_path):
    settings = {"drop_layers": [2]} if make is LayerDropConfig else {"target_modules": ["q_proj"]}
    adapted = get_peft_model(save("llama", tmp_path), make(**settings, task_type="CAUSAL_LM"))
    for model in (adapted, adapted.get_base_model()):
        left = model.config.num_hidden_layers
        for prune in (lambda model: drop_layers(model, [0]), lambda model: prune_with(LayerDropConfig(drop=1), model)):
            with pytest.raises(CutError, match=r"has adapters \(default\).*merge_and_unload"):
                prune(model)
        assert model.config.num_hidden_layers == left


def test_other_kinds_of_arguments_are_refused(tmp_path):
    model, compiled = save("llama", tmp_path), tiny_model("llama")
    compiled.model.layers[0].compile()  # compiled in place; each check of the cut would compile it again
    prompt = PromptTuningConfig("CAUSAL_LM", base_model_name_or_path=str(tmp_path), num_virtual_tokens=2)
    prompt.save_pretrained(tmp_path / "prompt")
    for wrong, message in (
        (lambda: load_model(tmp_path / "prompt"), rf"adds virtual tokens .*specify its base instead: {tmp_path}"),
        (
            lambda: prune_with(LayerDropConfig(drop=1), str(tmp_path)),
            "a str is not a transformers model.*let prune_with load it",
        ),
        (lambda: drop_layers(str(tmp_path), [2]), "a str is not a transformers model"),
        (lambda: drop_layers(compiled, [2]), "this LlamaForCausalLM has been compiled.*only after the cut"),
        (lambda: quality_curve("x", curve_upto=2), "option 'curve_upto' is unknown; did you mean curve_up_to"),
        (lambda: rank_layers("x", curve=True), "option 'curve' is unknown"),
        (lambda: rank_layers("x", criteria=["kll"]), "criterion 'kll' is unknown; did you mean kl"),
        (
            lambda: prune_with(LayerDropConfig(criterion="kl", calibration="x.txt"), tiny_model("llama")),
            "no name or path to load a tokenizer from",
        ),
        (lambda: prune_with(str(tmp_path)), "a LayerDropConfig is needed, not a str"),
        (lambda: prune_with(LoraConfig(), model), "a LayerDropConfig is needed, not a LoraConfig"),
        (lambda: drop_layers(model, 2), r"drop_layers=2 must be a list of layer indices such as \[6, 7\]"),
        (lambda: LayerDropConfig(modules_to_save="lm_head"), "modules_to_save='lm_head' must be a list"),
    ):
        with pytest.raises(LayerPruneError, match=message):
            wrong()
    assert model.config.num_hidden_layers == 8


def test_where_a_base_lies_is_recorded(tmp_path):
    dense = save("llama", tmp_path / "sub")
    for settings in ({}, {"criterion": "magnitude_l2"}, {"keep_dropped": True}):
        model = prune_with(config_of(tmp_path, drop=2, **settings), subfolder="sub", revision="v1", **EAGER)
        config = model.peft_config["default"]
        assert config.revision == "v1"
        assert config.base_model_name_or_path == str(tmp_path / "sub")
        reference = logits(cut_in_memory(copy.deepcopy(dense), config.drop_layers), tiny_input())
        assert torch.equal(logits(realign(model), tiny_input()), reference)
    path = write_gguf(tmp_path / "sub" / "model.gguf")
    model = prune_with(config_of(tmp_path, drop_layers=[1]), subfolder="sub", gguf_file="model.gguf")
    assert model.peft_config["default"].base_model_name_or_path == str(path)
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize(
    ("where", "way_out"),
    [
        ({"subfolder": "sub"}, "hf download org/name --include 'sub/*' --local-dir FOLDER), then specify FOLDER/sub "),
        ({"gguf_file": "m.gguf"}, "hf download org/name m.gguf --local-dir FOLDER), then specify FOLDER/m.gguf "),
    ],
)
def test_a_base_that_an_adapter_could_not_name_is_refused(where, way_out):
    with pytest.raises(CheckpointError, match=re.escape(way_out)):
        prune_with(LayerDropConfig(base_model_name_or_path="org/name", drop=1), **where)


@pytest.mark.parametrize(
    "config", [LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"), LayerDropConfig(drop_layers=[2])]
)
def test_an_adapter_for_which_tokens_were_added(config, tmp_path):
    save("llama", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", **EAGER)
    base.resize_token_embeddings(140)
    adapted = get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = load_model(tmp_path / "adapter", **EAGER)
    assert merged.config.vocab_size == len(merged.lm_head.weight) == 140
    assert torch.equal(logits(realign(merged), tiny_input()), logits(adapted, tiny_input()))


def test_an_adapter_whose_base_is_an_adapter_says_how_it_is_used(tmp_path):
    save("llama", tmp_path / "base")
    prune_with(config_of(tmp_path / "base", drop_layers=[2, 3]), **EAGER).save_pretrained(tmp_path / "first")
    prune_with(config_of(tmp_path / "first", drop_layers=[5]), **EAGER).save_pretrained(tmp_path / "second")
    for load in (
        lambda: AutoPeftModelForCausalLM.from_pretrained(tmp_path / "second"),
        lambda: PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "second"
        ),
    ):
        with pytest.raises(
            CutError, match=r"merge it first with merge_and_unload\(\)|load the model again|before 5\.18"
        ):
            load()
    base = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "first").merge_and_unload()
    assert PeftModel.from_pretrained(base, tmp_path / "second").config.num_hidden_layers == 5
