"""The adapter's contract, on tiny models of several kinds."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from hf_layerprune import (
    CutError,
    LayerDropConfig,
    LayerPruneError,
    UnsupportedModelError,
    drop_layers,
    families,
    prune_with,
)

from .matrix import greedy, logits as logits_of, realign
from .tiny_models import EAGER, tiny_input, tiny_model

# Plain and untied; tied with sliding windows; tied, with another layout; experts; a multimodal composite.
TYPES = ("llama", "gemma3_text", "gpt2", "qwen3_moe", "gemma3")
UNTIED = {"tie_word_embeddings": False}
NOTHING: dict[str, Any] = {"tune_layers": 0, "tune_final_norm": False, "tune_lm_head": False}


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Any:
    return realign(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **EAGER))


def save(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(model_type)
    tiny_model(model_type).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=TYPES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param, tmp_path_factory)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("llama", tmp_path_factory)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("gemma3_text", tmp_path_factory)


def logits(model: Any) -> torch.Tensor:
    return logits_of(model, tiny_input())


@torch.no_grad()
def shake(model: Any) -> None:
    """Change all that is trainable, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.02 * torch.randn_like(parameter))


def test_round_trip(base: Path, tmp_path: Path) -> None:
    """Prune, tune, save; every way back gives the same logits, merged or not."""
    plain_cut = load(base)
    drop_layers(plain_cut, [6, 7])
    cut = logits(plain_cut)
    model = get_peft_model(load(base), LayerDropConfig(drop=0.25, keep_dropped=True, tune_lm_head=True))
    assert torch.equal(logits(model), cut)
    shake(model)
    tuned = logits(model)
    assert not torch.equal(tuned, cut)
    model.save_pretrained(tmp_path / "adapter")

    for again in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32, **EAGER),
        PeftModel.from_pretrained(load(base), tmp_path / "adapter"),
    ):
        assert isinstance(again, PeftModel)
        assert torch.equal(logits(again), tuned)
        merged = again.merge_and_unload()
        assert type(merged) is type(plain_cut)
        assert torch.equal(logits(merged), tuned)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(logits(load(tmp_path / "merged")), tuned)

    assert torch.equal(greedy(model, tiny_input(), True), greedy(model, tiny_input(), False))


def test_dense_and_back(base: Path, tmp_path: Path) -> None:
    """`disable_adapter` gives the dense model's exact logits; `unload` gives the untuned cut, tied as the base."""
    dense = load(base)
    before, was_tied = logits(dense), dense.config.tie_word_embeddings
    config_before = families.text_config(dense.config).to_dict() | UNTIED
    model = get_peft_model(dense, LayerDropConfig(drop_layers=[2, 3, 6], keep_dropped=True, tune_lm_head=True))
    cut = logits(model)
    shake(model)
    tuned = logits(model)
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), before)
            assert families.text_config(model.get_base_model().config).to_dict() | UNTIED == config_before
            assert torch.equal(greedy(model, tiny_input(), True), greedy(model, tiny_input(), False))
        assert torch.equal(logits(model), tuned)
    copied = copy.deepcopy(model)
    with copied.disable_adapter():
        assert torch.equal(logits(copied), before)
        assert torch.equal(logits(model), tuned)  # the copy's layers are its own

    plain = model.unload()
    assert torch.equal(logits(plain), cut)
    assert plain.config.tie_word_embeddings == was_tied
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), cut)


def test_what_trains_is_exact(base: Path) -> None:
    """Gradients reach the tail and nothing else, and the frozen trunk builds no graph."""
    model = get_peft_model(load(base), LayerDropConfig(drop=0.25, tune_lm_head=True))
    config = model.peft_config["default"]
    stack = config.modules_to_save[0].rpartition(".")[0]
    assert config.modules_to_save[:3] == [f"{stack}.{i}" for i in (3, 4, 5)]
    assert config.modules_to_save[-1] == "lm_head"
    assert len(config.modules_to_save) == 5
    reached: list[bool] = []
    frozen = model.get_base_model().get_submodule(f"{stack}.2")
    frozen.register_forward_hook(
        lambda module, args, output: reached.append((output[0] if isinstance(output, tuple) else output).requires_grad)
    )
    ids = tiny_input()
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert reached == [False]
    for name, parameter in model.named_parameters():
        in_tail = ".modules_to_save.default." in name
        assert parameter.requires_grad == in_tail, name
        assert (parameter.grad is not None) == in_tail or "expert" in name, name
    inside = {name.split(".modules_to_save.")[0].removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    assert inside == set(config.modules_to_save)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapter_file_holds_the_tail_in_the_base_dtype(base: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = get_peft_model(load(base, dtype), LayerDropConfig(drop=0.25, tune_lm_head=True))
    model.save_pretrained(tmp_path)
    trainable = {name.replace(".modules_to_save.default", "") for name, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        saved = set(file.keys())
        assert {file.get_tensor(name).dtype for name in saved} == {dtype}
    assert saved == trainable
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LAYER_DROP"
    assert config["drop_layers"] == [6, 7]
    assert config["num_base_layers"] == 8
    assert config["base_model_name_or_path"] == str(base)


@pytest.mark.parametrize(
    ("settings", "tuned"),
    [
        ({"tune_layers": 1}, ["model.layers.4", "model.norm", "lm_head"]),
        ({"tune_layers": "cut"}, ["model.layers.1", "model.layers.2", "model.layers.3", "model.norm", "lm_head"]),
        ({"tune_layers": [0, 4], "tune_lm_head": False}, ["model.layers.0", "model.layers.2", "model.norm"]),
        ({"tune_layers": 0, "tune_final_norm": False}, ["lm_head"]),
        (NOTHING, None),
        ({"tune_layers": 0, "tune_lm_head": False, "modules_to_save": ["model.embed_tokens"]}, ["model.norm", "model.embed_tokens"]),
        ({"tune_layers": 3, "modules_to_save": ["mlp.up_proj", "lm_head"]},
         [f"model.layers.{i}" for i in (2, 3, 4)] + ["model.norm", "lm_head"] + [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]),
    ],
)  # fmt: skip
def test_what_to_tune(llama: Path, settings: dict[str, Any], tuned: list[str] | None, tmp_path: Path) -> None:
    model = prune_with(LayerDropConfig(drop_layers=[2, 3, 5], **settings), load(llama))
    assert model.peft_config["default"].modules_to_save == tuned
    shake(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(llama), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_saved_config_repeats_the_cut(llama: Path, tmp_path: Path) -> None:
    model = prune_with(LayerDropConfig(criterion="random", seed=7, drop=3), load(llama))
    model.peft_config["default"].save_pretrained(tmp_path)
    config = LayerDropConfig.from_pretrained(tmp_path)
    config.seed = 8  # a saved cut is not drawn again
    again = prune_with(config, load(llama))
    assert again.peft_config["default"].drop_layers == model.peft_config["default"].drop_layers
    assert torch.equal(logits(again), logits(model))


def test_never_pruned_twice(llama: Path, tmp_path: Path) -> None:
    base = load(llama)
    config = LayerDropConfig(drop=0.25)
    model = prune_with(config, base)
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert merged.config.num_hidden_layers == 6

    # The same adapter on its own pruned checkpoint finds the cut made.
    again = PeftModel.from_pretrained(load(tmp_path / "merged"), tmp_path / "adapter")
    assert again.config.num_hidden_layers == 6
    assert torch.equal(logits(again), logits(merged))
    # So does the same config.
    assert prune_with(config, load(tmp_path / "merged")).config.num_hidden_layers == 6
    # Another base is refused, not cut.
    other = prune_with(LayerDropConfig(drop=3), load(llama)).merge_and_unload()
    with pytest.raises(CutError, match="of a base with 8 layers, and the model has 5"):
        PeftModel.from_pretrained(other, tmp_path / "adapter")
    assert other.config.num_hidden_layers == 5
    # A new config prunes further, and says so.
    further = prune_with(LayerDropConfig(drop=2), load(tmp_path / "merged"))
    assert further.config.num_hidden_layers == 4
    assert further.config.layer_drop == {"drop_layers": [4, 5], "num_base_layers": 6}


def test_another_kind_of_attention_reaches_what_is_tuned(base: Path) -> None:
    """PEFT's copies of layers have configs of their own, and the mask is made for the model's."""
    model = prune_with(LayerDropConfig(drop_layers=[2, 3]), load(base))
    model.add_adapter("second", LayerDropConfig(drop_layers=[2, 3]))
    expected = logits(model)
    model.set_attn_implementation("sdpa")
    for one in (model, copy.deepcopy(model)):
        for name in ("second", "default"):
            one.set_adapter(name)
            torch.testing.assert_close(logits(one), expected)
    merged = model.merge_and_unload()
    merged.set_attn_implementation("eager")
    assert torch.equal(logits(merged), expected)


def test_loading_with_low_memory_keeps_what_was_cut(tmp_path: Path) -> None:
    """PEFT registers parameters as empty ones then; this type has a tensor with a slice for each layer."""
    tiny_model("gemma4_text").save_pretrained(tmp_path / "base")
    model = prune_with(LayerDropConfig(drop_layers=[6, 7], keep_dropped=True), load(tmp_path / "base"))
    shake(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "adapter", low_cpu_mem_usage=True)
    assert torch.equal(logits(again), logits(model))
    with model.disable_adapter(), again.disable_adapter():
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("how", ["merge_and_unload", "unload", "drop_layers"])
def test_lora_on_top_of_a_cut(llama: Path, tmp_path: Path, how: str) -> None:
    """A pruned model in memory is not the base under whose name it was loaded, and PEFT must not record that."""
    pruned = load(llama)
    if how == "drop_layers":
        drop_layers(pruned, [6, 7])
    else:
        adapted = prune_with(LayerDropConfig(drop=0.25, keep_dropped=True), pruned)
        with adapted.disable_adapter():
            assert adapted.get_base_model().name_or_path == str(llama)
        adapted.add_adapter("second", LayerDropConfig(drop=0.25))
        adapted.save_pretrained(tmp_path)
        for folder in (tmp_path, tmp_path / "second"):
            assert LayerDropConfig.from_pretrained(folder).base_model_name_or_path == str(llama)
        assert f"base_model:adapter:{llama}\n" in (tmp_path / "README.md").read_text()
        pruned = getattr(adapted, how)()
    pruned.save_pretrained(tmp_path / "pruned")
    model = get_peft_model(pruned, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    shake(model)
    model.save_pretrained(tmp_path / "lora")
    assert not LoraConfig.from_pretrained(tmp_path / "lora").base_model_name_or_path
    again = PeftModel.from_pretrained(load(tmp_path / "pruned"), tmp_path / "lora")
    assert torch.equal(logits(again), logits(model))


def test_untying_is_told_and_kept(tied: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = prune_with(LayerDropConfig(drop=1, tune_lm_head=True), load(tied))
    assert "adds 4,096 parameters" in caplog.text
    assert "tune_lm_head=False" in caplog.text
    config = model.peft_config["default"]
    assert config.untied_lm_head
    assert not model.config.tie_word_embeddings
    head, embeddings = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embeddings
    assert head.requires_grad
    assert not embeddings.requires_grad
    model.get_base_model().tie_weights()  # what transformers calls after a resize
    assert model.get_output_embeddings().weight is head
    shake(model)
    model.save_pretrained(tmp_path)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again = PeftModel.from_pretrained(load(tied), tmp_path)
    assert "unties" not in caplog.text  # said once, when it was decided
    assert torch.equal(again.get_output_embeddings().weight, head)

    caplog.clear()
    kept = prune_with(LayerDropConfig(drop=1), load(tied))
    assert "unties" not in caplog.text
    assert kept.get_output_embeddings().weight is kept.get_input_embeddings().weight
    assert not kept.peft_config["default"].untied_lm_head
    assert kept.peft_config["default"].tune_lm_head is False  # resolved, as the saved config says what was tuned


@pytest.mark.parametrize(("model_type", "is_cut"), [("llama", True), ("gemma3n_text", False)])
def test_an_offloaded_model_is_cut_or_refused_whole(model_type: str, is_cut: bool) -> None:
    """Offloaded tensors come from accelerate's map before each run, so one with a slice for each layer stays uncut."""
    base = tiny_model(model_type)
    plain = copy.deepcopy(base)
    cpu_offload(base, execution_device="cpu")
    if is_cut:
        drop_layers(plain, [2, 6])
        drop_layers(base, [2, 6])
    else:
        with pytest.raises(CutError, match=r"embed_tokens_per_layer\.weight .* is offloaded.*let prune_with load it"):
            drop_layers(base, [2, 6], check=False)
    assert torch.equal(logits(base), logits(plain))


def test_offloaded_weights_are_neither_tuned_nor_repaired_nor_read(llama: Path, tmp_path: Path) -> None:
    """They would stay as they are without a word: accelerate loads them from its map before each run."""
    places = {f"model.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
    places |= {f"model.layers.{i}": "disk" if i == 4 else "cpu" for i in range(7)}
    on_disk: dict[str, Any] = {"device_map": places, "offload_folder": tmp_path / "off"} | EAGER
    repaired = {"repair": "magnitude", "calibration_samples": 8, "calibration_length": 8} | NOTHING
    prune_with(LayerDropConfig(drop_layers=[3]), load(llama)).save_pretrained(tmp_path / "adapter")
    base = load(llama)
    cpu_offload(base, execution_device="cpu")
    cases: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"drop_layers": [3]}, {"model": base}, "layers.4 of the pruned model is offloaded, so it can't be tuned"),
        ({"drop_layers": [3]}, on_disk, "layers.4 of the pruned model is offloaded, so it can't be tuned"),
        ({"drop_layers": [3]} | repaired, on_disk, r"layers.4.* is offloaded, so it can't be .* repaired"),
        ({"drop_layers": [3]} | repaired, {"model": base}, "choosing layers or fitting a repair reads them"),
        ({"drop": 1, "criterion": "magnitude_l1"} | NOTHING, {"model": base}, "choosing layers or"),
        ({"drop": 1, "criterion": "kl"}, {"model": load(llama).to("meta")}, "on the meta device, and choosing"),
    ]
    for options, source, why in cases:
        config = LayerDropConfig(base_model_name_or_path=str(llama), **options)
        with pytest.raises(CutError, match=why):
            prune_with(config, **source)
    with pytest.raises(CutError, match="is offloaded"):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert base.config.num_hidden_layers == load(llama).config.num_hidden_layers
    places |= {f"model.layers.{i}": "disk" if i in (4, 7) else "cpu" for i in range(8)}
    whole = AutoModelForCausalLM.from_pretrained(llama, **on_disk)  # a layer's name changes with the cut
    with pytest.raises(CutError, match=r"layers\.6 of the pruned model is offloaded"):
        prune_with(LayerDropConfig(drop_layers=[3], tune_layers=[7]), whole)
    prune_with(LayerDropConfig(drop_layers=[3], tune_layers=[5, 6]), whole)

    plain = prune_with(LayerDropConfig(drop_layers=[3], **NOTHING), load(llama))
    assert torch.equal(logits(prune_with(LayerDropConfig(drop_layers=[3], **NOTHING), base)), logits(plain))


@pytest.mark.parametrize("model_type", ["llama", "gemma3n_text"])
def test_what_is_put_aside_follows(model_type: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Casts and modes reach the dropped layers, and where these are back, the tuned ones; dropped ones stay frozen."""
    base = load(save(model_type, tmp_path_factory))
    model = prune_with(LayerDropConfig(drop_layers=[2], keep_dropped=True, check_cut=False), base)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for dtype, training in ((torch.float64, True), (torch.float32, False)):
        model.to(dtype).train(training)
        with model.disable_adapter():
            assert {parameter.dtype for parameter in model.parameters()} == {dtype}
            assert {module.training for module in model.modules()} == {training}
            assert not any(parameter.requires_grad for parameter in model.get_base_model().parameters())
            model.to(torch.bfloat16).train(not training)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert {module.training for module in model.modules()} == {not training}
        assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_unlisted_names_stay_out(llama: Path) -> None:
    for bad, message in (
        ({"target_modules": ["q_proj"]}, "target_modules=.'q_proj'. has no effect"),
        ({"tune_layers": 7}, "the cut leaves 6 layers"),
        # Before any text is read.
        ({"tune_layers": 7, "repair": "linear", "calibration": "missing.txt"}, "the cut leaves 6 layers"),
        ({"tune_layers": 7, "criterion": "kl", "calibration": "missing.txt"}, "the cut leaves 6 layers"),
        ({"tune_layers": [7]}, "layer 7 is dropped"),
        ({"tune_layers": [8]}, r"model's layers are 0\.\.7"),
        ({"tune_layers": -1}, "tune_layers=-1"),
        ({"tune_layers": "all"}, "tune_layers='all'"),
        ({"task_type": "SEQ_CLS"}, "only causal language models"),
        ({**NOTHING, "keep_dropped": True}, r"adapter that tunes nothing.* or use drop_layers\(model, .*keep_dropped"),
    ):
        base = load(llama)
        with pytest.raises(CutError, match=message):
            prune_with(LayerDropConfig(drop=0.25, **bad), base)
        assert base.config.num_hidden_layers == 8, f"{bad} was refused after the cut"


def test_target_modules_that_name_nothing_are_as_good_as_none() -> None:
    assert not LayerDropConfig(drop=1, target_modules=[]).target_modules


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "nothing would be dropped"),
        ([8], r"drop_layers has 8, but the model's layers are 0\.\.7"),
        ([-1], r"drop_layers( has |=\[)-1"),
        ([3, 3], "has 3 more than once"),
        (list(range(8)), "at least one must stay"),
    ],
)
def test_bad_cuts_change_nothing(llama: Path, layers: list[int], message: str) -> None:
    base = load(llama)
    before = logits(base)
    with pytest.raises(CutError, match=message):
        drop_layers(base, layers)
    with pytest.raises(CutError, match=message):
        prune_with(LayerDropConfig(drop_layers=layers), base)
    assert torch.equal(logits(base), before)
    assert base.config.num_hidden_layers == 8


def test_cuts_are_undone_in_reverse_order_only(llama: Path) -> None:
    base, dense = load(llama), load(llama)
    first = drop_layers(base, [5], keep_dropped=True)
    second = drop_layers(base, [1], keep_dropped=True)
    with pytest.raises(CutError, match="changed after this cut was made, such as by another cut; undo that first"):
        first.restore()
    second.restore()
    first.restore()
    assert torch.equal(logits(base), logits(dense))
    drop_layers(base, [1])
    with pytest.raises(CutError, match="changed after this cut was undone"):
        first.reapply()
    assert [layer.self_attn.layer_idx for layer in base.model.layers] == [*range(7)]


def test_model_and_config_disagree(llama: Path) -> None:
    base = load(llama)
    base.config.num_hidden_layers = 6
    with pytest.raises(UnsupportedModelError, match="no list of 6 decoder layers"):
        prune_with(LayerDropConfig(drop=1), base)


def test_encoder_is_refused(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.config.is_decoder = False
    with pytest.raises(UnsupportedModelError, match="it is an encoder"):
        prune_with(LayerDropConfig(drop=1), model)


def test_a_classifier_is_refused_whole(llama: Path) -> None:
    base = AutoModelForSequenceClassification.from_pretrained(llama, num_labels=3)
    for prune in (get_peft_model, lambda model, config: prune_with(config, model)):
        with pytest.raises(
            CutError, match=r"LlamaForSequenceClassification is not a causal .*with drop_layers\(model"
        ):
            prune(base, LayerDropConfig(drop=1))
        assert base.config.num_hidden_layers == len(base.model.layers) == 8
    drop_layers(base, [2])
    assert base(input_ids=tiny_input()[:1]).logits.shape[-1] == 3


def test_unknown_per_layer_field_is_refused(llama: Path) -> None:
    base = load(llama)
    base.config.window_per_layer = [1, 2, 3, 4, 5, 6, 7, 8]
    with pytest.raises(CutError, match="'window_per_layer' is a list with one entry for each of the 8 layers"):
        prune_with(LayerDropConfig(drop=1), base)
    assert base.config.num_hidden_layers == 8


@pytest.mark.parametrize(
    ("model_type", "attention"), [("bamba", [1, 4]), ("recurrent_gemma", [2, 5]), ("lfm2", [1, 4, 6])]
)
def test_a_hybrid_keeps_one_attention_layer(model_type: str, attention: list[int]) -> None:
    model = tiny_model(model_type)
    with pytest.raises(CutError, match=f"no attention layer would be left.*keep one of .{attention[0]}, "):
        drop_layers(model, attention)
    assert families.layer_count(model.config) == 8
    drop_layers(model, attention[:-1])
    assert torch.equal(greedy(model, tiny_input(), True), greedy(model, tiny_input(), False))


def test_positional_scale_is_refused() -> None:
    from hf_layerprune.families import special

    model = tiny_model("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx"):
        drop_layers(model, [2])
    # And where no family rule knows of it, comparing empty models finds it.
    patched = pytest.MonkeyPatch()
    patched.delitem(special.SPECIAL, "gpt2")
    with pytest.raises(CutError, match="computed from the layer's position"):
        drop_layers(model, [2])
    patched.undo()


def test_prune_with_needs_a_base_or_a_model(llama: Path) -> None:
    with pytest.raises(LayerPruneError, match="nothing to prune"):
        prune_with(LayerDropConfig())
    with pytest.raises(LayerPruneError, match="does not exist"):
        prune_with(LayerDropConfig(base_model_name_or_path="./nowhere"))
    with pytest.raises(TypeError, match="dtype"):
        prune_with(LayerDropConfig(), load(llama), dtype=torch.float32)
