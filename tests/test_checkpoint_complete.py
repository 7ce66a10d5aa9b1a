"""A checkpoint whose tensors are not those of its model is refused, with the name of one."""

import re
import sys

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, logging

from hf_layerprune import LayerDropConfig, prune_with
from hf_layerprune.cli import main
from hf_layerprune.cut.disk import plan_cut
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.errors import CheckpointError

from .cutting import cut_checkpoint
from .matrix import cuts
from .test_checkpoint import EMBED, LLAMA, NORM, layer, make
from .tiny_models import tiny_config, tiny_model


@pytest.mark.parametrize("lost", ["mlp.up_proj", "input_layernorm"])
def test_a_weight_that_every_layer_lacks_is_noticed(tmp_path, lost):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if lost not in key}, path)
    with pytest.raises(CheckpointError, match=f"lacks model.layers.0.{lost}.weight, .*the checkpoint is incomplete"):
        cut_checkpoint(tmp_path / "base", tmp_path / "cut", [1])


def test_a_weight_that_the_model_has_no_place_for_is_refused_even_in_every_layer(tmp_path):
    """As it is when the whole model is loaded: what `prune` makes, `eval` must take."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    odd = {f"model.layers.{i}.self_attn.odd": torch.ones(1) for i in range(8)}
    save_file(load_file(path) | odd, path)
    for cut in (plan_cut, load_pruned):
        with pytest.raises(CheckpointError, match=r"no place for: model\.layers\.0\.self_attn\.odd, "):
            cut(tmp_path / "base", [1])


def test_an_expert_weight_that_every_layer_lacks_is_noticed(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file({key: value for key, value in load_file(path).items() if ".w1." not in key}, path)
    with pytest.raises(CheckpointError, match=r"does not hold the weights .*the checkpoint is incomplete"):
        cut_checkpoint(tmp_path / "base", tmp_path / "cut", [1])


def test_a_model_whose_loader_reads_content_is_checked_by_name(tmp_path):
    config = tiny_config("qwen4_exp_text")
    config.tie_word_embeddings = True  # a head that is not in the file
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    drop = cuts("qwen4_exp_text", config)["middle"]
    plan_cut(tmp_path / "base", drop)
    path = tmp_path / "base" / "model.safetensors"
    save_file(
        {key: value for key, value in load_file(path).items() if "layers.2.mlp.shared_expert_gate" not in key}, path
    )
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.shared_expert_gate\.weight "):
        plan_cut(tmp_path / "base", drop)


@pytest.mark.parametrize(("lost", "instead"), [
    ("model.layers.0.input_layernorm", "another"),
    ("model.layers.0.input_layernorm", "input_layernorm_2"),
    ("model.embed_tokens", "another"),
])  # fmt: skip
def test_what_a_quantised_checkpoint_lacks_is_noticed(tmp_path, lost, instead):
    """A norm in every layer, or what is outside of the layers."""
    shard = EMBED | NORM | layer(0) | layer(1) | layer(2) | layer(3)
    weights = {name.replace(lost.rpartition(".")[2], instead): tensor for name, tensor in shard.items()}
    quantised = LLAMA | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    base = make(tmp_path / "base", [weights], quantised)
    with pytest.raises(CheckpointError, match=rf"lacks .*{re.escape(lost)}\.weight[ ,]"):
        cut_checkpoint(base, tmp_path / "cut", [1])


def test_metadata_that_may_name_layers_is_refused(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "map": '{"model.layers.2.mlp": 8}'})
    with pytest.raises(CheckpointError, match=r"metadata of model\.safetensors may name layers in 'map'"):
        plan_cut(tmp_path / "base", [1])


def test_a_tensor_of_a_layer_that_the_config_does_not_have_is_refused_by_name(tmp_path, capsys):
    base = tmp_path / "base"
    tiny_model("llama").save_pretrained(base)
    path, stray = base / "model.safetensors", "model.layers.8.mlp.up_proj.weight"
    save_file(load_file(path) | {stray: torch.ones(2, 2)}, path)
    refusal = f"tensor '{stray}' belongs to layer 8, but the config describes only the layers 0..7"
    with pytest.raises(CheckpointError, match=refusal):
        cut_checkpoint(base, tmp_path / "cut", [1])
    with pytest.raises(CheckpointError, match=refusal):
        load_pruned(base, [1])
    with pytest.raises(CheckpointError, match=refusal):
        prune_with(LayerDropConfig(base_model_name_or_path=str(base), drop_layers=[1]))
    for words in ([], ["--adapter"]):
        assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "1", *words]) == 1
        assert refusal in capsys.readouterr().err
    assert [item.name for item in tmp_path.iterdir()] == ["base"]


def test_a_layer_that_the_models_class_skips_is_dropped(tmp_path):
    """Such as one for multi-token prediction, also where the config does not count it."""
    base = tmp_path / "base"
    tiny_model("glm4_moe").save_pretrained(base)
    path = base / "model.safetensors"
    save_file(load_file(path) | {"model.layers.92.eh_proj.weight": torch.ones(2, 2)}, path)
    drop = cuts("glm4_moe", tiny_config("glm4_moe"))["middle"]
    assert "model.layers.92.eh_proj.weight" not in plan_cut(base, drop).tensor_names


def test_progress_bars_that_are_off_stay_off(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    logging.enable_progress_bar()
    disable_progress_bars()
    try:
        assert main(["prune", str(tmp_path / "base"), str(tmp_path / "small"), "--drop", "2"]) == 0
        assert are_progress_bars_disabled()
    finally:
        logging.disable_progress_bar()  # as tests/conftest.py does
