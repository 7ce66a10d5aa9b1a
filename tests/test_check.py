"""A cut is checked by running it: in memory always, of what is on disk on request."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_layerprune import LayerDropConfig, UnsupportedModelError, drop_layers, families
from hf_layerprune.cli import main
from hf_layerprune.cut import check
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.errors import CutError
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.runtime.parts import agree

from .cutting import cut_checkpoint
from .matrix import identities, logits
from .tiny_models import tiny_config, tiny_input, tiny_model

DROP = (2, 3, 5)


@pytest.fixture
def depends_on_position(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release in which what a layer computes depends on where it stands, of which neither config nor modules tell."""
    plain = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return plain(self, hidden_states, *args, **kwargs) * (1 + 0.1 * self.self_attn.layer_idx)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)


@pytest.mark.usefixtures("depends_on_position")
class TestAReleaseThatChangesALayer:
    def test_in_memory(self) -> None:
        model = tiny_model("llama")
        before = logits(model, tiny_input())
        with pytest.raises(check.WrongCutError, match=r"wrong with transformers .*nothing was kept.*proven with"):
            drop_layers(model, DROP)
        assert model.config.num_hidden_layers == len(model.model.layers) == 8
        assert torch.equal(logits(model, tiny_input()), before)

    def test_as_an_adapter(self) -> None:
        with pytest.raises(check.WrongCutError, match="nothing was kept"):
            get_peft_model(tiny_model("llama"), LayerDropConfig(drop_layers=list(DROP)))

    def test_can_be_switched_off(self) -> None:
        assert drop_layers(tiny_model("llama"), DROP, check=False).cut.drop == DROP
        get_peft_model(tiny_model("llama"), LayerDropConfig(drop_layers=list(DROP), check_cut=False))

    def test_on_disk(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        tiny_model("llama").save_pretrained(tmp_path / "base")
        command = ["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2,3,5"]
        assert main([*command, "--check"]) == 1
        assert "nothing was kept" in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
        assert main(command) == 0  # not asked, not seen


def built_with(monkeypatch: pytest.MonkeyPatch, more: Callable[[Any, int, Any], None]) -> Any:
    """A model of a release in which layers have something more, by their position."""
    plain = LlamaDecoderLayer.__init__

    def init(self: Any, config: Any, layer_idx: int) -> None:
        plain(self, config, layer_idx)
        more(self, layer_idx, config)

    monkeypatch.setattr(LlamaDecoderLayer, "__init__", init)
    return tiny_model("llama")


# With layers 2, 3 and 5 dropped, layer 6 is the third, and layer 7 the fourth.
@pytest.mark.parametrize(
    "more",
    [
        lambda layer, i, config: setattr(layer, "index_topk", 2 + 8 * (i % 2)),
        lambda layer, i, config: setattr(layer, "is_index_layer", i % 2 == 0),
        lambda layer, i, config: setattr(layer, "source_index", None if i % 2 else 3),
        lambda layer, i, config: setattr(layer, "depth", i),
        lambda layer, i, config: setattr(layer, "scale", i / 8),
        lambda layer, i, config: setattr(layer, "rope", {"base": [i]}),
        lambda layer, i, config: setattr(layer, "window", 4) if i == 3 else None,
        lambda layer, i, config: setattr(layer, "window", 4) if i == 7 else None,
        lambda layer, i, config: setattr(layer, "kinds", [i] * config.num_hidden_layers),
        lambda layer, i, config: setattr(layer, "act", torch.nn.GELU() if i % 2 else torch.nn.SiLU()),
        lambda layer, i, config: setattr(layer, "act", torch.nn.GELU()) if i == 3 else None,
        lambda layer, i, config: setattr(layer, "act", torch.nn.GELU()) if i == 7 else None,
        lambda layer, i, config: layer.register_buffer("decay", torch.ones(1 + i % 2), persistent=False),
        lambda layer, i, config: layer.register_buffer("decay", torch.ones(1) if i % 2 else None, persistent=False),
    ],
)
def test_what_a_layer_is_built_with_must_not_depend_on_its_position(
    more: Callable[[Any, int, Any], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = built_with(monkeypatch, more)
    model.save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2,3,5"]) == 2
    with pytest.raises(CutError, match="drop other layers"):
        load_pruned(tmp_path / "base", DROP)
    with pytest.raises(CutError, match="drop other layers"):
        drop_layers(model, DROP)
    assert model.config.num_hidden_layers == len(model.model.layers) == 8


def test_a_layers_index_is_that_of_its_new_position(monkeypatch: pytest.MonkeyPatch) -> None:
    def more(layer: Any, i: int, config: Any) -> None:
        layer.layer_number, layer.cache_idx, layer.num_layers = i + 1, 2 * i + 1, config.num_hidden_layers

    model = built_with(monkeypatch, more)
    drop_layers(model, DROP)
    last = model.model.layers[-1]
    assert (last.layer_number, last.cache_idx, last.num_layers) == (5, 9, 5)


@pytest.mark.parametrize("form", [[], ["--adapter"], ["--dtype", "bfloat16"]])
def test_a_right_cut_passes_and_is_told(tmp_path: Path, form: list[str], caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    command = ["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2,3,5", *form]
    checked = "with the dropped layers bypassed"
    assert main([*command, "--check"]) == 0
    assert (tmp_path / "cut").is_dir()
    assert caplog.text.count(checked) == 1
    assert main([*command, "--force"]) == 0
    assert caplog.text.count(checked) == 1


@pytest.mark.parametrize("model_type", ["llama", "chameleon"])  # the second masks logits with the least float
def test_another_models_weights_do_not_pass(tmp_path: Path, model_type: str) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    tiny_model(model_type, seed=1).save_pretrained(tmp_path / "other")
    cut_checkpoint(tmp_path / "other", tmp_path / "cut", DROP)
    with pytest.raises(check.WrongCutError, match="logits differ by"):
        check.check_cut(load_base(tmp_path / "base"), load_base(tmp_path / "cut"))
    check.check_cut(load_base(tmp_path / "other"), load_base(tmp_path / "cut"))


@pytest.mark.parametrize("mask", [-torch.inf, torch.finfo(torch.float32).min])
def test_masked_values_are_equal_or_differ_but_hide_no_others(mask: float) -> None:
    one = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    one[..., :2] = mask
    assert agree(one + 1e-6, one)
    other = one.clone()
    other[..., 2:] += 0.1
    assert not agree(other, one)
    other = one.clone()
    other[..., 0] = 0.0
    assert not agree(other, one)
    assert not agree(one, other)


def test_a_large_token_hides_no_others() -> None:
    """The first token of a row may have states a thousand times as large as the others."""
    one = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    one[:, 0] *= 1000
    other = one.clone()
    other[:, 1:] *= 1.1
    assert agree(one.bfloat16(), one.bfloat16())
    assert not agree(other.bfloat16(), one.bfloat16())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_no_number_is_equal_to_itself_alone(value: float) -> None:
    one = torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(0))
    other = one.clone()
    one[..., 0], other[..., 0] = value, 0.0
    assert agree(one, one)
    assert not agree(other, one)
    assert not agree(one, other)
    one[..., 1] = other[..., 1] = 0.0  # the norm alone would not tell
    one[..., 1, 1] = value
    assert not agree(one[..., 1:], other[..., 1:])


@pytest.mark.parametrize("weight", [torch.nan, 0.0])
def test_logits_that_are_no_numbers_prove_nothing(
    weight: float, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")
    torch.nn.init.constant_(model.model.norm.weight, weight)
    model.save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        drop_layers(model, DROP)
    assert "logits of the cut are not checked: " in caplog.text
    command = ["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2,3,5"]
    assert main([*command, "--check"]) == 2
    assert "--check can't compare the logits: " in capsys.readouterr().err
    assert main(command) == 0


def test_bypassed_layers_are_identities() -> None:
    model = tiny_model("gemma3_text")
    ids = torch.arange(3, 11)[None]
    with identities(model, DROP):
        expected = logits(model, ids)
    assert torch.equal(check.bypassed_logits(model, DROP), expected)


def test_a_training_model_stays_one() -> None:
    model = tiny_model("gpt2").train()  # with dropout
    drop_layers(model, DROP)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda model: model.to("meta"), "model.embed_tokens.weight is not in memory"),
        (lambda model: setattr(model, "is_quantized", True), "a forward pass can repack quantised weights"),
        (lambda model: setattr(model.lm_head.weight, "ds_id", 0), "the dense model's weights are sharded"),
    ],
)
def test_what_can_not_be_run_here_is_not_checked(
    change: Callable[[Any], Any], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model("llama")
    change(model)
    with caplog.at_level(logging.INFO, "hf_layerprune"):
        drop_layers(model, DROP)
    assert f"logits of the cut are not checked: {why}" in caplog.text


class TestAnUnprovenVersion:
    @pytest.fixture(autouse=True)
    def _newer(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(check, "installed_version", lambda name: Version("5.99.0"))
        monkeypatch.setattr(check, "_warned_types", set())

    def test_is_told_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        tiny_model("llama").save_pretrained(tmp_path / "base")
        load_pruned(tmp_path / "base", DROP)
        assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2,3,5"]) == 0
        told = [record.message for record in caplog.records if "is not proven" in record.message]
        assert len(told) == 1
        assert told[0].startswith("a cut of model type llama is not proven with transformers 5.99.0 (proven with ")
        assert "--check" in told[0]

    def test_is_not_told_where_the_cut_is_checked(self, caplog: pytest.LogCaptureFixture) -> None:
        drop_layers(tiny_model("llama"), DROP)
        assert "is not proven" not in caplog.text


def test_a_type_that_goes_wrong_with_this_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "installed_version", lambda _: Version("5.16.1"))
    families.check_supported(tiny_config("llama"))
    with pytest.raises(
        UnsupportedModelError, match=r"'paligemma' is known to go wrong with transformers 5.16.1; .*5.24.0"
    ):
        families.check_supported(tiny_config("paligemma"))
