"""The closed-form repair: what it fits, where it goes, and that all ways to a repaired model give the same one."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_layerprune import CheckpointError, CutError, LayerDropConfig, LayerPruneError, drop_layers, prune_with
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.cli import main
from hf_layerprune.cut.patch import patch_layers
from hf_layerprune.measure.subject import identify
from hf_layerprune.records.history import read_history
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.repair.fit import Repair, fit_repair
from hf_layerprune.repair.frozen import freeze, unfreeze
from hf_layerprune.repair.linear import NormalEquations, fit_linear_map, solve_ridge, token_weights
from hf_layerprune.repair.mixtures import find_output_axes
from hf_layerprune.repair.registry import REPAIRS
from hf_layerprune.repair.writers import find_writers
from hf_layerprune.runtime.loading import load_config
from hf_layerprune.runtime.model_class import layer_modules
from hf_layerprune.runtime.walk import LayerWalk

from .folders import snapshot
from .tiny_models import LAYERS, tiny_config, tiny_input, tiny_model

CPU = torch.device("cpu")
DROP = [3, 4, 6]


def calibration(model, samples=12, length=32):
    return CalibrationSet.from_ids(tiny_input(seed=1, batch=samples, length=length), "random")


@torch.no_grad()
def states(model, ids):
    """The hidden states that enter each layer, and those that leave the last."""
    walk = LayerWalk(model)
    batch = walk.begin(ids)
    found = [batch.hidden]
    for i in range(walk.num_layers):
        with walk.layer(i) as run:
            batch.hidden = run(batch.hidden, batch)
        found.append(batch.hidden)
    return found


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


@pytest.fixture
def base(tmp_path, request):
    model = tiny_model(getattr(request, "param", "llama"))
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_freezing_keeps_the_parameters_themselves():
    """DeepSpeed ZeRO-3 keeps a module's weights in attributes of its parameters."""
    module = torch.nn.Linear(2, 3)
    before = [*module.parameters()]
    freeze(module)
    assert all(one is other for one, other in zip(before, module.parameters(), strict=True))
    assert not any(p.requires_grad for p in copy.deepcopy(module).requires_grad_().parameters())
    unfreeze(module)
    assert all(p.requires_grad for p in module.requires_grad_().parameters())


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", ["mlp.down_proj", "self_attn.o_proj"]),
        ("gpt2", ["mlp.c_proj", "attn.c_proj"]),
        ("gpt_neox", ["mlp.dense_4h_to_h", "attention.dense"]),  # attention and MLP side by side
        ("opt", ["fc2", "self_attn.out_proj"]),
        ("granite", ["mlp.down_proj", "self_attn.o_proj"]),
        ("gemma2", ["mlp.down_proj", "self_attn.o_proj"]),  # a norm behind each
        ("bert", []),  # a norm of the sum
        ("mixtral", []),  # experts write, and what attention writes passes through them as well
    ],
)
def test_writers_are_found_by_trying(model_type, names):
    model = tiny_model(model_type)
    walk = LayerWalk(model)
    batch = walk.begin(tiny_input())
    with walk.layer(0) as run:
        found = find_writers(walk.layers[0], run, batch)
    assert [writer.name for writer in found] == names
    gain = getattr(model.config, "residual_multiplier", 1.0)
    assert all(writer.gain == pytest.approx(gain, rel=1e-3) for writer in found)


@pytest.mark.parametrize(
    ("model_type", "name", "axes", "norm"),
    [
        ("mixtral", "mlp", {"experts.down_proj": 1}, None),
        ("gpt_oss", "mlp.experts", {"down_proj": 2, "down_proj_bias": 1}, None),
        ("jetmoe", "mlp", {"bias": 0, "output_linear.weight": 1}, None),
        ("qwen3_5_moe_text", "mlp", {"experts.down_proj": 1, "shared_expert.down_proj.weight": 0}, None),
        ("flex_olmo", "mlp", {"experts.down_proj": 1}, "post_feedforward_layernorm"),
    ],
)
def test_what_a_mixture_of_experts_writes_with_is_found_by_trying(model_type, name, axes, norm):
    walk = LayerWalk(tiny_model(model_type))
    batch = walk.begin(tiny_input())
    with walk.layer(0) as run:
        batch.hidden = run(batch.hidden, batch)
    before = {name: value.clone() for name, value in walk.layers[1].named_parameters()}
    with walk.layer(1) as run:
        writer = find_writers(walk.layers[1], run, batch, mixtures=True)[0]
    assert (writer.name, dict(writer.axes), writer.norm and writer.norm.name) == (name, axes, norm)
    assert all(torch.equal(value, before[name]) for name, value in walk.layers[1].named_parameters())


class Mixture(torch.nn.Module):
    """Two experts of which a token has one, with something of its own."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.down = kind, torch.nn.Parameter(torch.randn(2, 8, 4))
        self.scale = torch.nn.Parameter(torch.randn(8)) if kind == "scaled" else 1.0
        self.single = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2 * (kind == "single")))

    def forward(self, x):
        y = x[..., :4] @ self.down[0].T * self.scale
        return y + x if self.kind == "input" else y + self.single[0](x) if self.kind == "single" else y


@pytest.mark.parametrize("kind", ["plain", "input", "scaled", "single"])
def test_a_mixture_is_not_taken_if_its_output_is_made_of_more(kind):
    """Of what enters it; of a scale, to which no matrix can be applied; of an expert that no token reached."""
    module, x = Mixture(kind), torch.randn(1, 16, 8)
    found = find_output_axes(module, lambda: module(x))
    assert found == ({"down": 1} if kind == "plain" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bias", "first"), [(1.0, 1.0), (0.05, 1.0), (1.0, 3e3), (0.05, 3e3)])
def test_small_parts_of_a_mixture_are_found_in_16_bits(dtype, bias, first):
    """Beside larger ones, and beside a first token with massive activations."""
    torch.manual_seed(0)
    module = Mixture("plain")
    module.bias = torch.nn.Parameter(torch.randn(8) * bias)
    module.forward = lambda x: Mixture.forward(module, x) + module.bias
    module, x = module.to(dtype), torch.randn(1, 32, 8)
    x[:, 0] *= first
    x = x.to(dtype)
    assert find_output_axes(module, lambda: module(x)) == {"down": 1, "bias": 0}


def test_a_part_of_a_mixture_that_is_too_small_to_be_squared():
    module, x = Mixture("plain"), torch.randn(1, 16, 8)
    module.bias = torch.nn.Parameter(torch.tensor([1e-30] + [0.0] * 7))
    with torch.no_grad():
        module.down[..., 0, :] = 0  # so that the bias alone is in the first channel
    module.forward = lambda x: Mixture.forward(module, x) + module.bias
    assert find_output_axes(module, lambda: module(x)) == {"down": 1}


def test_normal_equations_agree_with_least_squares():
    torch.manual_seed(0)
    features, truth = torch.randn(400, 8), torch.randn(8, 8)
    change = features @ truth + 0.01 * torch.randn(400, 8)
    fitted, held_out = NormalEquations(8, 8, CPU), NormalEquations(8, 8, CPU)
    for piece, wanted in zip(features[:300].split(50), change[:300].split(50), strict=True):
        fitted.add(piece[None], wanted[None])
    held_out.add(features[300:], change[300:])
    fit = solve_ridge(fitted, held_out)
    expected = torch.linalg.lstsq(features[:300].double(), change[:300].double()).solution
    torch.testing.assert_close(fit.change, expected, rtol=1e-4, atol=1e-4)
    left = (change[300:].double() - features[300:].double() @ fit.change).square().sum() / change[300:].square().sum()
    assert fit.unexplained == pytest.approx(left.item(), rel=1e-3)


@pytest.mark.parametrize("batches", [1, 5])
def test_a_fit_to_fewer_tokens_than_features_is_that_of_all_their_sums(batches):
    torch.manual_seed(0)
    features, change = torch.randn(5, 6, 40), torch.randn(5, 6, 3)
    features[0, 1] = features[0, 0]  # a token that occurs twice
    if batches == 1:
        features, change = features.view(1, 5, 6, 40), change.view(1, 5, 6, 3)
    weights = [token_weights(one) for one in features]
    fit = fit_linear_map(zip(features, change, weights, strict=True), batches)
    fitted, held_out = NormalEquations(40, 3, CPU), NormalEquations(40, 3, CPU)
    last, weight = (features[-1, -1], weights[-1][-1]) if batches == 1 else (features[-1], weights[-1])
    fitted.add(features.flatten(0, -2)[:24], change.flatten(0, -2)[:24])
    held_out.add(last * weight.sqrt(), change.flatten(0, -2)[24:] * weight.sqrt())
    wanted = solve_ridge(fitted, held_out)
    assert (fit.strength, fit.tokens) == (wanted.strength, (24, 6))
    assert fit.unexplained == pytest.approx(wanted.unexplained)
    torch.testing.assert_close(fit.change, wanted.change)


@pytest.mark.parametrize("width", [8, 40])
def test_features_that_are_not_numbers_change_nothing(width):
    features, change = torch.randn(5, 6, 4, width), torch.randn(5, 6, 4, 3)
    features = features[:, :1] if width > 24 else features
    features[0, 0, 1, 2] = float("nan")
    change = change[:, : features.shape[1]]
    fit = fit_linear_map(zip(features, change, map(token_weights, features), strict=True), 5)
    assert fit.strength == float("inf")
    assert fit.change.shape == (width, 3)
    assert not fit.change.any()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_one_massive_held_out_token_does_not_choose_the_ridge_for_all_others(kind):
    torch.manual_seed(0)
    features, truth = torch.randn(5, 4, 64, 16), torch.randn(16, 8)
    if kind == "sparse":
        features[:, :, 1:40] = 0  # the median token has no features
    change = features @ truth + torch.randn(5, 4, 64, 8)

    def rows():
        return zip(features, change, map(token_weights, features), strict=True)

    wanted = fit_linear_map(rows(), 5)
    if kind == "dense":
        features[4, 0, 50] *= 1000  # in the held-out batch, and its change stays
    fit = fit_linear_map(rows(), 5)
    assert fit.strength == wanted.strength < 0.1
    assert fit.unexplained < 2 * wanted.unexplained


def test_noise_is_not_fitted():
    """Where the features say nothing of the change, the plain cut is kept."""
    torch.manual_seed(0)
    fitted, held_out = NormalEquations(16, 16, CPU), NormalEquations(16, 16, CPU)
    fitted.add(torch.randn(20, 16), torch.randn(20, 16))
    held_out.add(torch.randn(400, 16), torch.randn(400, 16))
    fit = solve_ridge(fitted, held_out)
    assert fit.unexplained <= 1
    assert fit.change.norm() < 0.2


@pytest.mark.parametrize(
    ("model_type", "method", "drop"),
    [
        ("llama", "linear", [3, 4]), ("gpt2", "refit", [3, 4]), ("opt", "borrow", [3, 4]), ("gemma2", "linear", [3, 4]),
        ("olmo2", "borrow", [3, 4]), ("llama", "linear", [2, 5]),
        ("llama", "linear", [6, 7]),  # the states before the final norm
    ],
)  # fmt: skip
def test_a_fitted_repair_brings_the_states_behind_the_cut_closer(model_type, method, drop):
    model = tiny_model(model_type)
    repair = fit_repair(model, drop, calibration(model, samples=400), method)
    unseen, end = tiny_input(seed=9, batch=16, length=32), drop[-1] + 1
    wanted = states(model, unseen)[end]
    plain, repaired = copy.deepcopy(model), copy.deepcopy(model)
    cut = drop_layers(plain, drop).cut
    drop_layers(repaired, drop)
    repair.apply(LayerWalk(repaired).layers, cut.new_index)
    before, after = ((states(one, unseen)[end - 2] - wanted).square().sum() for one in (plain, repaired))
    assert after < 0.9 * before
    assert repair.cuts[0]["unexplained_share"] < 0.95


def test_behind_a_repaired_cut_the_next_one_sees_the_repaired_states():
    model = tiny_model("llama")
    ids = calibration(model, samples=400)
    both, alone = fit_repair(model, [2, 5], ids), fit_repair(model, [5], ids)
    assert list(both.tensors) == [(1, "mlp.down_proj.weight"), (4, "mlp.down_proj.weight")]
    assert not torch.equal(both.tensors[4, "mlp.down_proj.weight"], alone.tensors[4, "mlp.down_proj.weight"])


def test_magnitude_has_nothing_to_do_at_the_tail(caplog):
    model = tiny_model("llama")
    repair = fit_repair(model, [6, 7], calibration(model), method="magnitude")
    assert not repair.tensors
    assert "changes nothing" in caplog.text


@pytest.mark.parametrize(
    ("model_type", "drop", "method", "message"),
    [
        ("llama", [0, 1], "linear", "layer 0 is dropped"),
        ("llama", [0, 1], "refit", "layer 0 is dropped"),
        ("bert", [3, 4], "linear", "model type 'bert' can't be repaired"),
        ("mixtral", [3, 4], "refit", "model type 'mixtral' has no layer .* linear, magnitude"),
        ("qwen3_moe", [2, 6], "refit", r"layer 5, whose MLP is a mixture of experts; use repair=\"linear\""),
        ("gemma2", [3, 4], "magnitude", "model type 'gemma2' has no layer .* linear, refit, borrow"),
    ],
)
def test_what_cannot_be_repaired_is_refused(model_type, drop, method, message):
    model = tiny_model(model_type)
    with pytest.raises(LayerPruneError, match=message):
        fit_repair(model, drop, calibration(model), method=method)


@pytest.mark.parametrize(
    ("model_type", "drop", "samples", "message"),
    [
        ("llama", [0, 1], 8, "layer 0 is dropped"),
        ("llama", [3, 4], 1, "two calibration rows or more"),
        ("jamba", [1], 8, "can only describe attention layers at a fixed period"),
    ],
)
def test_it_is_refused_before_the_model_writes_text(model_type, drop, samples, message, monkeypatch):
    """Writing takes minutes on a real model."""
    monkeypatch.setattr(
        "hf_layerprune.adapter.prepare.load_calibration_for", lambda *given: pytest.fail("text was written")
    )
    with pytest.raises(CutError, match=message):
        prune_with(
            LayerDropConfig(drop_layers=drop, repair="borrow", calibration_samples=samples), tiny_model(model_type)
        )


@pytest.mark.parametrize(
    ("base", "method", "tune_layers"),
    [
        *(("llama", method, "cut") for method in REPAIRS),
        ("llama", "refit", 2),
        ("mixtral", "linear", "cut"),  # stored expert by expert
        ("gpt_oss", "linear", 2),  # with biases
        ("qwen3_5_moe_text", "magnitude", "cut"),  # with a gated shared expert
    ],
    indirect=["base"],
)
def test_every_way_gives_the_same_repaired_model(base, tmp_path, method, tune_layers):
    """From a live model, from a folder, and on disk; as an adapter that was saved and read back; merged."""
    settings = {"drop_layers": DROP, "repair": method, "calibration_samples": 12, "calibration_length": 32}
    settings |= {"tune_layers": tune_layers}
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    ids = tiny_input()
    dense = AutoModelForCausalLM.from_pretrained(base)
    dense_logits = logits(dense, ids)
    config = LayerDropConfig(base_model_name_or_path=str(base), **settings)
    live = get_peft_model(dense, LayerDropConfig(**settings, keep_dropped=True))
    loaded = prune_with(config)
    repaired = loaded.peft_config["default"].repaired_modules
    assert repaired
    torch.testing.assert_close(logits(live, ids), logits(loaded, ids), rtol=1e-4, atol=1e-4)
    with live.disable_adapter():
        torch.testing.assert_close(logits(live, ids), dense_logits, rtol=0, atol=0)

    plain = prune_with(LayerDropConfig(base_model_name_or_path=str(base), **(settings | {"repair": None})))
    assert not torch.allclose(logits(plain, ids), logits(loaded, ids), atol=1e-2)

    loaded.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    assert torch.equal(logits(again, ids), logits(loaded, ids))
    assert again.peft_config["default"].repaired_modules == repaired

    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    words = ["--drop-layers", "3-4,6", "--repair", method, "--calibration-samples", "12", "--calibration-length", "32"]
    assert main(["prune", str(base), str(tmp_path / "on-disk"), *words]) == 0
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "on-disk")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert all(type(module).__module__.startswith(("torch", "transformers")) for module in saved.modules())
    torch.testing.assert_close(logits(on_disk, ids), logits(saved, ids), rtol=1e-4, atol=1e-4)
    for name, value in on_disk.state_dict().items():
        torch.testing.assert_close(value, saved.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_a_repaired_module_is_saved_and_not_trained(base):
    settings = {"drop_layers": [3, 4], "repair": "linear", "calibration_samples": 12, "calibration_length": 32}
    model = prune_with(LayerDropConfig(base_model_name_or_path=str(base), tune_layers=1, **settings))
    assert model.peft_config["default"].repaired_modules == ["model.layers.2.mlp.down_proj"]
    trained = {name.split("modules_to_save")[0] for name, value in model.named_parameters() if value.requires_grad}
    assert not any("layers.2" in name for name in trained)
    assert any(f"layers.{LAYERS - 3}" in name for name in trained)
    model.set_adapter("default")
    assert not any("layers.2" in name for name, value in model.named_parameters() if value.requires_grad)


def test_a_config_that_was_used_repairs_again(base, tmp_path):
    """The object itself, a changed copy, a saved one; after a refusal too. A copy of the adapter takes over its weights."""
    ids, settings = tiny_input(), {"drop_layers": [3, 4], "tune_layers": 1, "calibration_samples": 12}
    config = LayerDropConfig(**settings, repair="linear", calibration_length=32)

    def load():
        return AutoModelForCausalLM.from_pretrained(base)

    model = load()
    with pytest.raises(CutError, match="no such module"):  # what was fitted for it is not for the next
        get_peft_model(model, replace(config, drop_layers=[1, 2], modules_to_save=["another"]))
    first = get_peft_model(model, config)
    expected = logits(first, ids)
    first.save_pretrained(tmp_path)
    saved = LayerDropConfig.from_pretrained(tmp_path)
    for again in (config, replace(first.peft_config["default"], tune_layers=1), first.peft_config["default"], saved):
        assert torch.equal(logits(get_peft_model(load(), again), ids), expected)
    saved.base_model_name_or_path = str(base)
    torch.testing.assert_close(logits(prune_with(saved), ids), expected, rtol=1e-4, atol=1e-4)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(load(), tmp_path, is_trainable=trainable)
        assert loaded.base_model.prepared is None
        assert torch.equal(logits(loaded, ids), expected)
    assert torch.equal(logits(get_peft_model(load(), loaded.peft_config["default"]), ids), expected)
    loaded.add_adapter("reference", loaded.peft_config["default"])  # as TRL does, and copies the weights
    names = {name.replace(".default.", ".reference.") for name, _ in loaded.named_parameters() if ".default." in name}
    assert names <= {name for name, _ in loaded.named_parameters()}


def test_the_lineage_says_what_a_repair_did(base, tmp_path):
    words = ["--drop-layers", "3-4", "--repair", "linear", "--calibration-samples", "12", "--calibration-length", "32"]
    assert main(["prune", str(base), str(tmp_path / "out"), *words]) == 0
    entry = json.loads((tmp_path / "out" / "lineage.json").read_text())["entries"][0]
    assert entry["repair"]["changed_tensors"] == ["model.layers.2.mlp.down_proj.weight"]
    assert entry["repair"]["cuts"][0]["layers"] == [3, 4]
    assert entry["repair"]["seconds"] > 0
    assert entry["settings"]["repair"] == "linear"
    assert len(entry["calibration"]["fingerprint"]) == 64


def test_a_repair_that_hardly_helps_is_warned_of(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(NormalEquations, "unexplained", lambda *args: 0.95)
    words = ["--drop-layers", "3-4", "--repair", "linear", "--calibration-samples", "12", "--calibration-length", "32"]
    assert main(["prune", str(base), str(tmp_path / "out"), *words]) == 0
    said = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert any("leaves 95 % of what layers 3-4 did unexplained; use more" in line for line in said), said


@pytest.mark.parametrize(
    ("method", "drop"), [("linear", "3-4"), ("refit", "3-4"), ("borrow", "3-4"), ("magnitude", "6-7")]
)
def test_a_repair_that_changes_nothing_is_not_called_one(base, tmp_path, monkeypatch, caplog, method, drop):
    monkeypatch.setattr(
        NormalEquations, "unexplained", lambda *args: 1.0
    )  # as if no map had helped on the rows held out
    words = ["--drop-layers", drop, "--repair", method, "--calibration-samples", "12", "--calibration-length", "32"]
    for name, more in (("model", []), ("adapter", ["--adapter"])):
        folder = tmp_path / name
        caplog.clear()
        assert main(["prune", str(base), str(folder), *words, *more]) == 0
        assert "changes nothing" in caplog.text
        assert identify(folder).role == "cut"
        entry = json.loads((folder / "lineage.json").read_text())["entries"][0]
        assert entry["repair"]["changed_tensors"] == []
        assert [stage.name for stage in read_history(Lineage.load_required(folder)).stages] == ["prune"]
        assert main(["verify", str(folder)]) == 0
        assert main(["card", str(folder)]) == 0
        card = (folder / "README.md").read_text()
        assert "It is a plain cut" in card
        assert f"dropped; its repair, `{method}`, changed nothing." in card
        assert "was repaired" not in card


def test_what_a_repair_leaves_as_it_was_is_not_among_its_changes(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    layers = model.model.layers
    kept, name = layers[1].mlp.down_proj.weight.detach().clone(), "mlp.down_proj.weight"
    repair = Repair("refit", {(1, name): kept, (4, name): kept})
    repair.leave_out_unchanged(layers)
    assert list(repair.tensors) == [(4, name)]


def test_experts_for_text_alone_are_left_as_they_are(tmp_path, capsys):
    """ERNIE has others for images, which no text reaches, and its checkpoints store them together."""
    model = tiny_model("ernie4_5_vl_moe")
    walk, found = LayerWalk(model), set()
    batch = walk.begin(tiny_input())
    for i, layer in enumerate(walk.layers):
        with walk.layer(i) as run:
            found |= {writer.name for writer in find_writers(layer, run, batch, mixtures=True)}
            batch.hidden = run(batch.hidden, batch)
    assert "mlp.shared_experts.down_proj" in found
    assert not any("text_moe" in name for name in found)
    model.save_pretrained(tmp_path / "base")
    words = ["--drop-layers", "3-4", "--repair", "magnitude", "--calibration-length", "16"]
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "out"), *words]) == 2
    assert "has no layer for --repair magnitude" in capsys.readouterr().err


def test_experts_that_are_stored_one_by_one_belong_to_one_module():
    """An adapter on top of a repaired checkpoint saves that module."""
    stored = [f"model.layers.2.block_sparse_moe.experts.{i}.w2.weight" for i in range(4)]
    assert layer_modules(tiny_config("mixtral"), stored) == ["model.layers.2.mlp.experts"]


@pytest.mark.parametrize("more", [[], ["--dtype", "bfloat16"]])
@pytest.mark.parametrize(
    ("model_type", "method"),
    [("hy_v3", "refit"), ("minimax_m3_vl", "refit"), ("minimax_m3_vl", "linear"), ("granitemoe", "magnitude")],
)
def test_a_repaired_tensor_that_the_checkpoint_names_otherwise(model_type, method, more, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    words = ["--drop-layers", "3-4", "--repair", method, "--calibration-samples", "4", "--calibration-length", "16"]
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "out"), *words, *more]) == 0
    entry = json.loads((tmp_path / "out" / "lineage.json").read_text())["entries"][0]
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(entry["repair"]["changed_tensors"]) <= set(file.keys())
    assert main(["verify", str(tmp_path / "out"), "--accept-trained"]) == 0


def test_linked_files_are_never_patched(base, tmp_path, capsys):
    assert main(["prune", str(base), str(tmp_path / "out"), "--repair", "linear", "--link"]) == 2
    assert "--link" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_repair_of_another_type_than_the_checkpoint_has_is_refused(base, tmp_path, capsys):
    tiny_model("llama").half().save_pretrained(base)
    config = (base / "config.json").read_text()
    (base / "config.json").write_text(config.replace('"float16"', '"bfloat16"'))
    words = ["--drop-layers", "3", "--repair", "linear", "--calibration-samples", "4", "--calibration-length", "16"]
    assert main(["prune", str(base), str(tmp_path / "out"), *words]) == 1
    assert "is F16[32, 48] in the checkpoint, and the repair computed bfloat16[32, 48]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "shape", "linked", "message"), [
    ("mlp.down_proj.weight", (32, 48), True, "is a hard link to a file of the base"),
    ("mlp.down_proj.weight", (48, 32), False, r"is F32\[32, 48\] in the checkpoint, .* float32\[48, 32\]"),
    ("mlp.other.weight", (32, 48), False, "has no tensor model.layers.1.mlp.other.weight to repair"),
])  # fmt: skip
def test_where_one_value_does_not_fit_none_is_patched(base, tmp_path, name, shape, linked, message):
    if linked:
        os.link(base / "model.safetensors", tmp_path / "model.safetensors")
    before = snapshot(base)
    values = {(0, "mlp.down_proj.weight"): torch.zeros(32, 48), (1, name): torch.zeros(shape)}
    with pytest.raises(CheckpointError, match=message):
        patch_layers(base, load_config(base), values, "out")
    assert snapshot(base) == before
