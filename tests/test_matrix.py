from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_layerprune import UnsupportedModelError, families
from hf_layerprune.families import fields, special
from hf_layerprune.families.types import proven

from . import matrix
from .architectures import proven_types, render
from .matrix import CUT, ProofError, cuts, prove_cut
from .stages import outcomes
from .tiny_models import (
    ALL_TYPES,
    DOCUMENT,
    MODEL_TYPES,
    MULTIMODAL_TYPES,
    is_current,
    tiny_config,
    tiny_model,
    unusable,
)

# One of each kind: plain, sliding windows, experts, shared keys and values, hybrids, index sets, old layouts,
# a multimodal composite, a decoder out of an encoder-decoder, two cache slots a layer.
REPRESENTATIVE = (
    "llama", "gemma3_text", "qwen3_moe", "gemma3n_text", "jamba", "smollm3", "gpt2", "gemma3", "bart", "longcat_flash",
    "llava", "qwen3_vl", "qwen2_audio",
)  # fmt: skip


PROVEN = [
    pytest.param(t, marks=() if t in REPRESENTATIVE else pytest.mark.matrix)
    for t in ALL_TYPES
    if t not in families.REFUSED
]


@pytest.mark.parametrize("model_type", PROVEN)
def test_proven(model_type: str, whole_matrix: bool) -> None:
    """At each stage a type is proven or refused, as the table says.

    A type that is not representative goes through a cut in the middle and one other stage, which takes its turn from type
    to type, with two of healing's three losses and without times and sizes; `make matrix` runs everything. With another
    version of transformers than the table's, this holds for the cut; the other stages may fail with an error, but must
    not give wrong results.
    """
    table = families.proven_stages()[model_type]
    stages, cut = (CUT, *families.STAGES), ""
    if model_type not in REPRESENTATIVE:
        if model_type in MULTIMODAL_TYPES:
            # `make docs` makes the other cut and trains; the layers are those of text decoders that are listed here.
            stages, cut = (CUT, "rank", "evaluate"), "middle"
        if not whole_matrix:
            others = stages[1:]
            stages, cut = (CUT, others[ALL_TYPES.index(model_type) % len(others)]), "middle"
    found = outcomes(model_type, stages, cut)
    if whole_matrix and cut:
        found |= outcomes(model_type, ("evaluate",))  # times and sizes
    for stage, outcome in found.items():
        if stage != CUT and not is_current():
            assert not outcome.startswith(("WRONG: ProofError", "WRONG: AssertionError")), f"{stage}: {outcome}"
        elif stage not in table:
            assert outcome.startswith("refused: model type "), f"{stage}: {outcome}"
        else:
            assert outcome == ("proven=" + ",".join(table[stage])).rstrip("="), f"{stage}: {outcome}"


def test_the_first_of_the_layers_that_share_a_module_can_be_dropped() -> None:
    prove_cut(tiny_model("openai-gpt"), (0,))


@pytest.mark.parametrize("model_type", sorted(t for t in families.REFUSED if t in CONFIG_MAPPING))
def test_refused(model_type: str) -> None:
    config_class = CONFIG_MAPPING[model_type]
    config = config_class.__new__(config_class)  # some can't even be made small
    # With transformers 5.4, the config of evolla has another type than the one that it is listed under.
    said = "can't be pruned by layers: " if config.model_type == model_type else "is not among "
    with pytest.raises(UnsupportedModelError, match=f"model type '{config.model_type}' {said}"):
        families.check_supported(config)


of_this_version = pytest.mark.skipif(
    not is_current(), reason="the table was made with another version of transformers, which has other types"
)


@of_this_version
def test_no_third_state() -> None:
    assert set(ALL_TYPES) <= set(families.REFUSED) | proven()
    assert not set(families.REFUSED) & proven()
    assert len(set(MODEL_TYPES) & proven()) >= 150
    assert len(set(MULTIMODAL_TYPES) & proven()) >= 60
    assert set(proven_types()) <= proven()
    assert not [t for t in proven() - set(proven_types()) if t in CONFIG_MAPPING], "listed, and not proven"


def test_no_third_state_at_any_stage() -> None:
    for model_type, stages in families.proven_stages().items():
        for stage in families.STAGES:
            refused = model_type in families.REFUSED_AT[stage]
            assert refused != (stage in stages), f"{model_type} is neither proven nor refused at {stage}, or both"


@of_this_version
def test_document_is_current() -> None:
    assert DOCUMENT.read_text() == render(), "docs/architectures.md is stale: run `make docs`"


def test_types_that_another_version_lacks_or_breaks_are_named_with_the_reason() -> None:
    assert unusable("llama", "5.4.0") is None
    assert "with transformers 5.4.0 fails uncut as well" in (unusable("gemma3n_text", "5.4.0") or "")
    assert unusable("brand_new", "5.4.0") == "there is no model type brand_new with transformers 5.4.0"


@pytest.mark.parametrize(("stage", "types"), families.REFUSED_AT.items())
def test_refused_at_a_stage_by_name_with_the_way_out(stage: str, types: dict[str, str]) -> None:
    for model_type, reason in types.items():
        if unusable(model_type) is None:
            config = CONFIG_MAPPING[model_type]()
            with pytest.raises(UnsupportedModelError, match=re.escape(reason)) as caught:
                families.check_stage(config, stage)
            trainable = stage != "repair" or model_type not in families.REFUSED_AT["heal"]
            assert families.STAGES[stage if trainable else "heal"].instead in str(caught.value)


# A cut that the config can't describe, or that takes what a kept layer reads; what the error says; and the nearest one that
# is right.
IMPOSSIBLE: list[tuple[str, tuple[int, ...], str, tuple[int, ...]]] = [
    ("gemma3n_text", (3,), "layer 3 .* layer 6 reads; keep it$", (6,)),
    ("gemma4_text", (3,), "layer 3 .* layer 6 reads; keep it$", (6,)),
    ("gemma4_text", (7,), "layer 6, the last one kept", (6, 7)),
    ("glm_moe_dsa", (0,), "layer 0 .* layer 1", (0, 1)),
    ("glm5_next", (6,), "layer 6 .* layer 7", (6, 7)),
    ("mistral_large4", (4, 5), "layer 6 .* layer 4", (4, 5, 6)),
    ("jamba", (1,), "at a fixed period", (0, 1, 2, 3)),
    ("ernie4_5_moe", (2,), "at a fixed interval", (2, 3)),
    ("modernbert-decoder", (0,), "layer 0", (1,)),
    ("zaya", (0,), "layer 0", (1,)),
    ("gpt_neox_japanese", (7,), "layer 7", (6,)),
    ("qwen4_exp_text", (1,), "layer 1", (0,)),
]


@pytest.mark.parametrize(("model_type", "drop", "said", "near"), IMPOSSIBLE)
def test_a_cut_that_a_family_does_not_allow(
    model_type: str, drop: tuple[int, ...], said: str, near: tuple[int, ...]
) -> None:
    config = tiny_config(model_type)
    with pytest.raises(families.CutError, match=said):
        families.cut_config(config, families.make_cut(config, drop))
    families.cut_config(config, families.make_cut(config, near))


def test_all_layers_of_a_kind_may_go() -> None:
    config = tiny_config("jamba")
    experts = range(config.expert_layer_offset, config.num_hidden_layers, config.expert_layer_period)
    new = families.cut_config(config, families.make_cut(config, experts))
    assert new.expert_layer_offset >= new.num_hidden_layers


Numbers = dict[str, Any]
# Settings from which a layer's kind follows, as transformers computes it from the layer's index.
ARITHMETIC: dict[str, tuple[special.Family, list[str], Callable[[Numbers, int, int], object]]] = {
    "ernie4_5_moe": (
        special.INTERVAL_BETWEEN,
        ["moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"],
        lambda f, i, n: (
            (i + 1) % f["moe_layer_interval"] == 0
            and f["moe_layer_start_index"] <= i <= (n - 1 if f["moe_layer_end_index"] == -1 else f["moe_layer_end_index"])
        ),
    ),
    "jamba": (
        special.TWO_PERIODS,
        ["attn_layer_offset", "attn_layer_period", "expert_layer_offset", "expert_layer_period"],
        lambda f, i, n: [i % f[f"{kind}_layer_period"] == f[f"{kind}_layer_offset"] for kind in ("attn", "expert")],
    ),
    "qwen3_moe": (
        special.SPARSE_STEP,
        ["decoder_sparse_step"],
        lambda f, i, n: i not in f.get("mlp_only_layers", ()) and (i + 1) % f["decoder_sparse_step"] == 0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("model_type", ARITHMETIC)
@given(st.data())
def test_kept_layers_stay_what_they_are_or_the_cut_is_refused(model_type: str, data: st.DataObject) -> None:
    family, names, kind_of = ARITHMETIC[model_type]
    n = data.draw(st.integers(1, 9))
    lowest = {"moe_layer_end_index": -1, "moe_layer_start_index": 0, "attn_layer_offset": 0, "expert_layer_offset": 0}
    old = {name: data.draw(st.integers(lowest.get(name, 1), n), label=name) for name in names}
    keep = tuple(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1), label="keep")))
    assert family.rewrite_together is not None
    try:
        new = old | family.rewrite_together(old, fields.Cut(keep, n))
    except families.CutError as error:
        assert "fixed" in str(error)  # noqa: PT017
        return
    assert [kind_of(new, i, len(keep)) for i in range(len(keep))] == [kind_of(old, i, n) for i in keep]


@pytest.mark.parametrize(
    ("value", "name"),
    [([1, 2, 3, 4], "new"), ({"0": 1, "3": 2}, "new"), (3, "special_layer"), (["full"] * 3, "layer_types")],
)
def test_a_field_that_may_be_per_layer_is_refused(value: Any, name: str) -> None:
    cut = fields.Cut((0, 2, 3), 4)
    with pytest.raises(families.CutError, match=f"config field '{name}'"):
        fields.rewrite_fields({name: value}, cut, {})
    assert fields.rewrite_fields({name: value}, cut, {}, skip=[name]) == {}
    others = {
        "new": [1, 2, 3],
        "keyed": {"4": 1},
        "superscript": {"\N{SUPERSCRIPT TWO}": 1},
        "named": {"a": 1},
        "use_layer": True,
        "layer_norm_groups": 4,
        "sizes": 4,
    }
    assert fields.rewrite_fields(others, cut, {}) == {}


def test_unknown_type_is_refused() -> None:
    config = tiny_config("llama")
    type(config).model_type, before = "brand_new", type(config).model_type
    try:
        with pytest.raises(UnsupportedModelError, match="not among the"):
            families.check_supported(config)
    finally:
        type(config).model_type = before


class TestTheProofCanFail:
    """The matrix is worth what it catches."""

    @of_this_version
    def test_no_field_looks_right_when_its_rule_is_wrong(self) -> None:
        """Were a list truncated in place of selected from, or a threshold kept, the middle cut of every type would show it."""
        for model_type in (t for t in ALL_TYPES if t in proven() and not unusable(t)):
            config = tiny_config(model_type)
            cut = families.make_cut(config, cuts(model_type, config)["middle"])
            for name, value in families.text_config(config).to_dict().items():
                if isinstance(value, list) and len(value) == cut.num_layers and value != value[:1] * len(value):
                    assert [value[i] for i in cut.keep] != value[: len(cut.keep)], f"{model_type}: {name}"
                rule = fields.FIELDS.get(name)
                if rule in (fields.count_below, fields.count_last) and value:
                    assert rule(value, cut) != value, f"{model_type}: {name}"

    def test_forgotten_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(fields.FIELDS, "no_rope_layers", lambda value, cut: value[: len(cut.keep)])
        with pytest.raises((ProofError, families.CutError)):
            prove_cut(tiny_model("smollm3"), (2, 3, 5))

    def test_forgotten_threshold(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(fields.FIELDS, "first_k_dense_replace", fields.unchanged)
        with pytest.raises((ProofError, families.CutError)):
            prove_cut(tiny_model("deepseek_v3"), (2, 3, 5))

    def test_forgotten_layer_index(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from hf_layerprune.cut import memory as cut

        monkeypatch.setattr(cut, "dry_run_cut", lambda *args: (0, []))
        with pytest.raises((ProofError, IndexError)):
            prove_cut(tiny_model("llama"), (2, 3, 5))

    @pytest.mark.parametrize(
        ("check", "place", "fault"),
        [
            ("a", "load", lambda own, *given: nudged(own(*given))),
            ("b", "drop_layers", lambda own, model, dropped: own(model, (2, 3, 4))),
            (
                "c",
                "greedy",
                lambda own, *given, use_cache, **media: own(*given, use_cache=use_cache, **media) + use_cache,
            ),
            ("d", "drop_layers", lambda own, model, dropped: forgetful(model, own(model, dropped))),
            ("e", "cut_checkpoint", lambda own, source, target, dropped: own(source, target, (2, 3, 4))),
            ("e", "load_pruned", lambda own, *given, **how: nudged(own(*given, **how))),
        ],
    )
    def test_each_check(
        self, check: str, place: str, fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        dense = tiny_model("llama")
        dense.save_pretrained(tmp_path)
        monkeypatch.setattr(matrix, place, partial(fault, getattr(matrix, place)))
        with pytest.raises(ProofError, match=rf"^\({check}\) "):
            prove_cut(dense, (2, 3, 5), str(tmp_path))

    @pytest.mark.parametrize(("layers", "value"), [((2, 3, 5), 0.0), ((7,), torch.nan)])
    def test_layers_that_do_nothing_or_logits_that_are_no_numbers(self, layers: tuple[int, ...], value: float) -> None:
        dense = tiny_model("llama")
        for layer in (dense.model.layers[i] for i in layers):
            torch.nn.init.constant_(layer.self_attn.o_proj.weight, value)
            torch.nn.init.constant_(layer.mlp.down_proj.weight, value)
        with pytest.raises(ProofError, match=r"^\(b\) .* nothing is proven"):
            prove_cut(dense, (2, 3, 5))


def nudged(loaded: Any) -> Any:
    """One weight of a model that was loaded is off by a little."""
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    return loaded


def forgetful(model: Any, cut: Any) -> Any:
    """A cut model's config that does not tell which layers were dropped."""
    delattr(model.config, families.MARKER)
    return cut
