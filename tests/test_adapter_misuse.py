"""What PEFT would let pass without a word, or only with an error from deep inside, is refused or right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_layerprune import CutError, LayerDropConfig, prune_with
from hf_layerprune.versions import transformers_loads_whole_modules

from .matrix import logits as logits_of
from .tiny_models import EAGER, tiny_input, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(folder)
    return folder


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **EAGER)


def logits(model: Any) -> torch.Tensor:
    return logits_of(model, tiny_input())


@pytest.mark.parametrize("prune", [prune_with, lambda config, model: get_peft_model(model, config)])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"drop": 0.25}, {"drop": 0.5}),
        ({"criterion": "random", "drop": 2}, {"seed": 7}),
        ({"drop": 2}, {"criterion": "magnitude_l1"}),
    ],
    ids=str,
)
def test_a_used_config_does_not_ignore_what_is_set_afterwards(
    base: Path, prune: Callable[..., PeftModel], before: dict[str, Any], after: dict[str, Any]
) -> None:
    """It holds the layers that were chosen, which count more than how to choose them."""
    config = LayerDropConfig(**before)
    first = prune(config, load(base)).peft_config["default"]
    assert isinstance(first, LayerDropConfig)
    assert prune(config, load(base)).peft_config["default"].drop_layers == first.drop_layers
    for used in (config, first, copy.deepcopy(config)):
        for name, value in after.items():
            setattr(used, name, value)
        with pytest.raises(CutError, match=rf"{name}={value!r} would have no effect.*set drop_layers=None to choose"):
            prune(used, load(base))
    config.drop_layers = None
    chosen = prune(config, load(base)).peft_config["default"].drop_layers
    assert chosen == prune(LayerDropConfig(**before | after), load(base)).peft_config["default"].drop_layers
    assert chosen != first.drop_layers


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"drop": 2}, {"seed": 7, "calibration_samples": 8, "calibration": "text.txt"}),  # which nothing reads here
        ({"drop": 2, "criterion": "magnitude_l1"}, {"seed": 7}),
        (
            {"drop": 2, "repair": "linear", "calibration_samples": 4, "calibration_length": 8},
            {"calibration_samples": 8},
        ),
        ({"drop": 2}, {"tune_layers": 1, "keep_dropped": True}),
        ({"drop": 2}, {"drop": 0.5, "drop_layers": [1, 2]}),
    ],
    ids=str,
)
def test_what_does_not_choose_layers_may_change(base: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    config = LayerDropConfig(**before)
    prune_with(config, load(base))
    for name, value in after.items():
        setattr(config, name, value)
    for _ in range(2):
        used = prune_with(config, load(base)).peft_config["default"]
        assert {name: getattr(used, name) for name in after} == after
        assert used.drop_layers == after.get("drop_layers", config.drop_layers)


def test_a_size_set_as_text_is_no_change(base: Path) -> None:
    config = LayerDropConfig(drop_layers=[6])
    config.drop_layers, config.target_size = None, "270KB"
    layers = prune_with(config, load(base)).peft_config["default"].drop_layers
    assert prune_with(config, load(base)).peft_config["default"].drop_layers == layers


def test_weights_are_loaded_with_their_own_config(base: Path, tmp_path: Path) -> None:
    """They have the names of layers after the cut, and would fit others just as well."""
    model = prune_with(LayerDropConfig(drop_layers=[2, 3]), load(base))
    model.save_pretrained(tmp_path)
    with pytest.raises(CutError, match=r"not saved with them.*leave config out, or change that of PeftConfig"):
        PeftModel.from_pretrained(load(base), tmp_path, config=LayerDropConfig(keep_dropped=True))
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, LayerDropConfig)
    config.keep_dropped = True
    again = PeftModel.from_pretrained(load(base), tmp_path, config=config)
    assert torch.equal(logits(again), logits(model))
    with again.disable_adapter():
        assert torch.equal(logits(again), logits(load(base)))


def test_one_adapter_is_active(base: Path) -> None:
    """PEFT's own model passes on a name that it has checked; not so its tuner, which would leave the model untuned."""
    model = get_peft_model(load(base), LayerDropConfig())
    model.add_adapter("second", LayerDropConfig())
    for names in ("third", ["default", "second"], ["third"]):
        with pytest.raises(CutError, match=r"must be the name of one adapter, of \['default', 'second'\]"):
            model.base_model.set_adapter(names)
        assert model.active_adapters == ["default"]
    model.base_model.set_adapter(["second"])
    assert model.active_adapters == ["second"]


@pytest.mark.parametrize("modules", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_what_is_tied_stays_as_it_was_trained(
    tmp_path: Path, modules: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is tuned besides what the options say: transformers ties again, as after a resize, to the copy or the original."""
    tiny_model("gemma3_text").save_pretrained(tmp_path / "base")
    model = get_peft_model(load(tmp_path / "base"), LayerDropConfig(modules_to_save=modules))
    assert "adds 4,096 parameters" in caplog.text
    config = model.peft_config["default"]
    assert isinstance(config, LayerDropConfig)
    assert config.untied_lm_head
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    tuned = logits(model)
    model.get_base_model().tie_weights()
    assert torch.equal(logits(model), tuned)
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter")
    again.get_base_model().tie_weights()
    assert torch.equal(logits(again), tuned)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), tuned)
    cut = again.unload()
    assert cut.get_output_embeddings().weight is cut.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["norm", "lm_head", "weight", "v1.0", "keys", ""])
def test_a_name_under_which_nothing_can_be_saved(base: Path, name: str) -> None:
    model = load(base)
    with pytest.raises(CutError, match=f"adapter_name='{name}' can't be saved by PEFT"):
        get_peft_model(model, LayerDropConfig(), adapter_name=name)
    assert torch.equal(logits(model), logits(load(base)))


@pytest.mark.parametrize("name", ["layers", "model.layers"])
def test_a_list_of_modules_is_not_tuned_as_one(base: Path, name: str) -> None:
    model = load(base)
    with pytest.raises(CutError, match=r"model\.layers is a ModuleList, .*specify the modules in it"):
        get_peft_model(model, LayerDropConfig(modules_to_save=[name]))
    assert model.config.num_hidden_layers == 8


def test_adapters_of_another_method_stay_alone(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.19.0")  # 5.24 asks for one to come
    prune_with(LayerDropConfig(), load(base)).save_pretrained(tmp_path)
    model = load(base)
    model.add_adapter(LoraConfig(target_modules=["q_proj"]), "lora")
    expected = logits(model)
    with pytest.raises(CutError, match=r"this LlamaForCausalLM has adapters \(lora"):
        model.load_adapter(str(tmp_path), "pruned")
    assert torch.equal(logits(model), expected)


def test_an_adapter_on_another_architecture_names_its_base(base: Path, tmp_path: Path) -> None:
    prune_with(LayerDropConfig(), load(base)).save_pretrained(tmp_path)
    with pytest.raises(
        CutError, match=rf"GPT2LMHeadModel has no such module; use the adapter with its base \({base}\)"
    ):
        PeftModel.from_pretrained(tiny_model("gpt2"), tmp_path)


def test_an_adapter_is_put_on_a_base_on_disk_by_transformers(base: Path, tmp_path: Path) -> None:
    """PEFT would put it on disk again, from files in which the layers have other numbers."""
    model = prune_with(LayerDropConfig(drop_layers=[3]), load(base))
    model.save_pretrained(str(tmp_path / "adapter"))
    parts = ["embed_tokens", "norm", "rotary_emb", *(f"layers.{i}" for i in range(1, 8))]
    places = {"model.layers.0": "disk", "lm_head": "cpu"} | {f"model.{part}": "cpu" for part in parts}
    on_disk: dict[str, Any] = {"device_map": places, "offload_folder": tmp_path / "off"} | EAGER
    with pytest.raises(
        CutError, match=r"base is offloaded.* AutoModelForCausalLM\.from_pretrained\(ADAPTER, device_map"
    ):
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, **on_disk), tmp_path / "adapter")
    if not transformers_loads_whole_modules():
        return
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter", **on_disk)
    assert again.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("disabled_first", [True, False])
def test_every_layer_gives_its_states_in_both_models(disabled_first: bool) -> None:
    """transformers installs the hooks that collect them once, on the layers that are there at the time."""
    model = get_peft_model(tiny_model("qwen3_moe"), LayerDropConfig(drop=2, keep_dropped=True)).eval()

    def collected() -> tuple[int, int]:
        output = model(tiny_input(), output_hidden_states=True, output_router_logits=True)
        return len(output.hidden_states), len(output.router_logits)

    routers = sum(hasattr(layer.mlp, "gate") for layer in tiny_model("qwen3_moe").model.layers)
    for disable in (disabled_first, not disabled_first, disabled_first):
        if disable:
            with model.disable_adapter():
                assert collected() == (9, routers)
        else:
            assert collected()[0] == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS': .*drop_layers\(model, \[...\]\)"),
        ({"num_base_layers": 8.0}, "num_base_layers=8.0 must be a whole number"),
        ({"num_base_layers": True}, "num_base_layers=True must be a whole number"),
        ({"untied_lm_head": None}, "untied_lm_head=None must be True or False"),
        ({"repaired_modules": "lm_head"}, "repaired_modules='lm_head' must be a list"),
        ({"own_modules_to_save": [1]}, r"own_modules_to_save=\[1\] must be a string"),
    ],
    ids=str,
)
def test_fields_that_are_not_options_are_checked_as_well(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(CutError, match=message):
        LayerDropConfig(**settings)


def test_a_base_may_be_a_path(base: Path, tmp_path: Path) -> None:
    LayerDropConfig(base_model_name_or_path=base).save_pretrained(str(tmp_path))
    assert LayerDropConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == str(base)
