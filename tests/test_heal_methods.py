"""Methods by name: what they train, how fast, and which one is chosen."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from trl import ModelConfig

from hf_layerprune import CutError, drop_layers
from hf_layerprune.families import Cut
from hf_layerprune.heal.methods import METHODS, Tuning, choose_method, method_help, parse_method
from hf_layerprune.runtime.prefix import first_trained_layer

from .tiny_models import tiny_model


def cut(drop: list[int], n: int = 8) -> Cut:
    return Cut(tuple(i for i in range(n) if i not in drop), n)


@pytest.mark.parametrize(
    ("name", "parts", "head", "norm"),
    [
        ("lm_head", {"lm_head": 0}, True, True),
        ("lm_head+last3", {"lm_head": 0, "last": 3}, True, True),
        ("last12", {"last": 12}, False, True),
        ("cut", {"cut": 1}, False, False),
        ("lm_head+cut2", {"lm_head": 0, "cut": 2}, True, True),
        ("behind2", {"behind": 2}, False, True),
    ],
)
def test_names(name: str, parts: dict[str, int], head: bool, norm: bool) -> None:
    method = parse_method(name)
    assert {part.name: number for part, number in method.parts} == parts
    config = method.tail_config(cut(list(range(2, 30)), 60), None)
    assert (config.tune_lm_head, config.tune_final_norm) == (head, norm)


@pytest.mark.parametrize(("name", "adapter"), [("lora", True), ("qlora", True), ("full", False)])
def test_methods_that_train_no_whole_layers(name: str, adapter: bool) -> None:
    method = parse_method(name)
    assert not method.trains_layers
    lora = method.adapter(ModelConfig())
    if lora is not None:  # a pattern stays one
        for where, wanted in (("q_proj", {"q_proj"}), (r"model\.layers\.[01]\..*_proj", None)):
            made = method.adapter(ModelConfig(lora_target_modules=[where]))
            assert made is not None
            assert made.target_modules == (wanted or where)
    assert (lora is not None) == adapter


def test_a_new_method_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read, joined with others, and named in errors and help."""
    first = Tuning("first", "the first N layers", lambda width: 1e-3, lambda cut, n: cut.keep[:n], "N")
    monkeypatch.setitem(METHODS, "first", first)
    assert parse_method("lm_head+first2").layers(cut([1, 6])) == [0, 2]
    assert parse_method("first2").learning_rate(64) == 1e-3
    assert "firstN (the first N layers)" in method_help()
    with pytest.raises(CutError, match=r"'frist2' is unknown; it may be auto, lm_head, .*, full, firstN"):
        parse_method("frist2")


def test_help_has_every_method() -> None:
    from hf_layerprune.heal.config import HealConfig

    assert HealConfig.__dataclass_fields__["method"].metadata["help"] == f"{method_help()}."


@pytest.mark.parametrize(
    "name", ["", "head", "last", "last0", "lm_head+", "last1+last2", "lora+last1", "full+lora", "cut0", "LAST1"]
)
def test_other_names(name: str) -> None:
    with pytest.raises(CutError, match="is unknown; it may be auto, lm_head"):
        parse_method(name)


@pytest.mark.parametrize(
    ("name", "drop", "layers"),
    [
        ("last3", [6, 7], [3, 4, 5]),
        ("last3", [5, 6], [3, 4, 7]),
        ("cut", [3, 4], [2, 5]),
        ("cut2", [3, 4], [1, 2, 5, 6]),
        ("cut2", [1, 5], [0, 2, 3, 4, 6, 7]),
        ("cut", [6, 7], [5]),
        ("cut3", [0], [1, 2, 3]),
        ("lm_head", [6, 7], []),
        ("behind", [3, 4], [2, 5, 6, 7]),
        ("behind2", [2, 5], [0, 1, 3, 4, 6, 7]),
        ("behind", [0], [1, 2, 3, 4, 5, 6, 7]),
        ("behind3", [6, 7], [3, 4, 5]),
    ],
)
def test_layers_in_the_base(name: str, drop: list[int], layers: list[int]) -> None:
    assert parse_method(name).layers(cut(drop)) == layers


def test_more_layers_than_there_are() -> None:
    with pytest.raises(CutError, match="trains the last 7 layers, but only 6 remain"):
        parse_method("last7").layers(cut([6, 7]))


def test_the_method_that_suits() -> None:
    def chosen(drop: list[int], tied: bool, width: int = 576) -> tuple[str, str]:
        method, why = choose_method(cut(drop), tied, width)
        return method.name, why

    assert chosen([6, 7], tied=False)[0] == "lm_head+last3"
    assert chosen([6, 7], tied=True)[0] == "last3"
    assert chosen([3, 4], tied=True)[0] == chosen([3, 4], tied=False)[0] == "behind2"
    assert "inside the model" in chosen([3, 4], tied=False)[1]
    assert chosen([3, 4], tied=False, width=4096)[0] == "cut2"
    assert chosen([2, 3, 4, 5, 6, 7], tied=True)[0] == "last2"


def test_learning_rates() -> None:
    tail, lora, behind = (parse_method(name) for name in ("lm_head+last3", "lora", "behind2"))
    assert lora.learning_rate(576) == lora.learning_rate(4096) == 2e-4
    assert tail.learning_rate(4096) == pytest.approx(2.4e-5, rel=0.02)
    assert tail.learning_rate(576) / tail.learning_rate(4096) == pytest.approx(4096 / 576)
    assert behind.learning_rate(4096) == tail.learning_rate(4096)


@pytest.mark.parametrize(
    ("name", "drop", "first"),
    [
        ("last2", [5, 6], 4),
        ("lm_head", [6, 7], 6),
        ("cut", [3, 4], 2),
        ("last6", [6, 7], 0),
        ("lm_head+last1", [6, 7], 5),
    ],
)
def test_first_trained_layer(name: str, drop: list[int], first: int) -> None:
    model = tiny_model("llama")
    drop_layers(model, drop)
    peft = get_peft_model(model, parse_method(name).tail_config(cut(drop), None))
    assert first_trained_layer(peft.get_base_model()) == first


def test_first_trained_layer_where_something_before_the_layers_is_trained() -> None:
    model = tiny_model("llama").requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    model.model.layers[7].requires_grad_(True)
    assert first_trained_layer(model) == 0
    tied = tiny_model("gemma2").requires_grad_(False)
    assert tied.lm_head.weight is tied.get_input_embeddings().weight
    tied.lm_head.weight.requires_grad_(True)
    assert first_trained_layer(tied) == 0
    assert torch.is_grad_enabled()
