"""Quantisation settings that name layers by index: rewritten exactly, or refused."""

import copy
import json
import re

import pytest
from hypothesis import given, settings, strategies as st
from torch import nn
from transformers import AutoConfig, AwqConfig, BitsAndBytesConfig

from hf_layerprune import drop_layers, families
from hf_layerprune.cut.disk import plan_cut
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.errors import CutError
from hf_layerprune.families.fields import Cut
from hf_layerprune.families.quantization import names_layers, rewrite_quantization
from tests.tiny_models import tiny_model

CUT = Cut((0, 1, 4, 5, 6, 10, 11), 12)  # 4 is 2 now, 5 is 3, 6 is 4, 10 is 5, 11 is 6


def ignore(entry: str, **options) -> list[str]:
    """Of a quantiser with wildcards."""
    return rewrite_quantization({"quant_method": "quark", "ignore": [entry]}, CUT, **options)["ignore"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("lm_head", ["lm_head"]),
        ("Linear", ["Linear"]),
        ("model.layers.4.mlp.down_proj", ["model.layers.2.mlp.down_proj"]),
        ("model.layers.4", ["model.layers.2"]),
        ("model.layers.3.mlp", []),
        ("model.layers.12.eh_proj", []),
        ("transformer.h.10.attn", ["transformer.h.5.attn"]),
        ("layers.4.mlp", ["layers.2.mlp"]),
        ("model.layers.4.block_sparse_moe.experts.7.w1", ["model.layers.2.block_sparse_moe.experts.7.w1"]),
        ("mtp.layers.3.mlp.gate", ["mtp.layers.3.mlp.gate"]),
        ("visual.blocks.3.mlp", ["visual.blocks.3.mlp"]),
        ("visual.layer_3", ["visual.layer_3"]),
        ("model.layers.*.mlp", ["model.layers.*.mlp"]),
        ("model.vision_tower.encoder.layers.3.mlp", ["model.vision_tower.encoder.layers.3.mlp"]),
        ("*.layers.4.*", ["*.layers.2.*"]),
        ("*.layers.*.mlp.experts.3", ["*.layers.*.mlp.experts.3"]),
        ("model.layers.10*", ["model.layers.5", "model.layers.5.*"]),
        ("model.layers.12*", []),
        ("re:.*lm_head", ["re:.*lm_head"]),
        ("re:.*mlp\\.gate$", ["re:.*mlp\\.gate$"]),
        (r"re:.*layers\.\d+\.mlp", [r"re:.*layers\.\d+\.mlp"]),
        (r"re:.*layers\.[0-9]+\.mlp", [r"re:.*layers\.[0-9]+\.mlp"]),
        (r"re:.*layers\..*\.mlp", [r"re:.*layers\..*\.mlp"]),
        (r"re:.*layers\.(\d+)\.mlp", [r"re:.*layers\.(\d+)\.mlp"]),
        (r"re:.*layers\.(?:[^.]+)\.mlp", [r"re:.*layers\.(?:[^.]+)\.mlp"]),
        (r"re:.*layers\.(?!.*self_attn).*", [r"re:.*layers\.(?!.*self_attn).*"]),
        (r"re:(visual|vision_tower)\.blocks\.[0-3]\.", [r"re:(visual|vision_tower)\.blocks\.[0-3]\."]),
        (r"re:.*\.\d+\.mlp", [r"re:.*\.\d+\.mlp"]),
        (r"re:.*experts\.[0-3]\.w1", [r"re:.*experts\.[0-3]\.w1"]),
        (r"re:.*mlp\.w[12]$", [r"re:.*mlp\.w[12]$"]),
        (r"re:.*layers.\d+.mlp", [r"re:.*layers.\d+.mlp"]),
    ],
)
def test_entries_are_rewritten(old, new):
    assert ignore(old) == new


@pytest.mark.parametrize(
    "entry",
    [
        r"re:.*\.3\..*", r"re:.*(layers|h)\.3\.mlp", r"re:.*layers.*12", r"re:.*layers\.(?!4)\d+\.mlp", "*.10.mlp",
        "3.mlp.down_proj", "blk.3.ffn", "layer_3", "model.layers3.mlp", r"re:model\.layers\.1", "model.layers.[0-3].mlp", r"re:.*layers\.(4", "model.layers.1?.mlp", r"re:.*layers\.4[a-z]",
        r"re:.*layers\.4\.mlp", r"re:.*layers\.(4|5|3)\.mlp", r"re:.*layers\.[23]\.mlp", r"re:.*layers\.1\d\.mlp",
        r"re:.*layers\.\d\.mlp", r"re:.*layers\..\d+\.mlp", r"re:.*layers.\d+..mlp", r"re:.*layers.\d+.\d+.mlp", r"re:.*layers\..\.mlp",
        "model.layers.?.mlp", r"re:.*layers\.[^.]\.mlp", r"re:.*layers\.(?:(.))\.mlp", r"re:.*layers\.[^.]{2}\.mlp", r"re:(visual|model)\.layers\.3\.", r"^model\.layers\.(4|6)\.",
        ".3.mlp", "*3.mlp", "model.?.3.mlp", "model.layers.\u0664.mlp", "-:model.layers.4", r"re:.*layers_\d\.mlp",
        "model.layer?.3.mlp", "re:model.layers.4", "model.layers.4.mlp|model.layers.5.mlp",
    ],
)  # fmt: skip
def test_what_can_not_be_rewritten_exactly_is_refused_by_name(entry):
    with pytest.raises(CutError, match=re.escape(repr(entry))) as caught:
        ignore(entry)
    assert "\n" not in str(caught.value)


def test_patterns_that_may_mean_another_stack_are_refused_where_there_is_one():
    for entry in ("layers.4.mlp", "qformer.encoder.layer.4.mlp", "*.layers.4.mlp", "model.*layers.4.mlp"):
        with pytest.raises(CutError, match="outside the decoder"):
            ignore(entry, several_stacks=True)
    for old, new in (
        ("model.language_model.layers.4.mlp", ["model.language_model.layers.2.mlp"]),
        (r"re:.*layers\.\d+\.mlp", [r"re:.*layers\.\d+\.mlp"]),
        (r"re:vision_tower.*layers\.4\.mlp", [r"re:vision_tower.*layers\.4\.mlp"]),
        ("model.layers.4.mlp", ["model.layers.2.mlp"]),
        ("transformer.h.4.mlp", ["transformer.h.2.mlp"]),
        ("thinker.model.layers.4.mlp", ["thinker.model.layers.2.mlp"]),
    ):
        assert ignore(old, several_stacks=True) == new


def test_every_place_is_looked_at():
    old = {
        "quant_method": "x", "version": "0.9.1.a1+g3", "bits": 4, "weight_block_size": [128, 128], "modules_to_not_convert": None,
        "llm_int8_skip_modules": ["model.layers.3", "model.layers.4"],
        "ignored_layers": ["model.layers.11.mlp"], "exclude": ["model.layers.2"],
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["model.layers.5.mlp", "model.layers.3.mlp"]],
        "config_groups": {"group_0": {"targets": ["Linear", "model.layers.4.mlp"], "weights": {"num_bits": 8}}},
        "dynamic": {r"+:.*\.layers\.\d+\.mlp.*": {"bits": 8}, r"-:.*\.gate.*": {}},
        "modules": {"model.layers.10.q": {"bits": 8}, "model.layers.2.q": {"bits": 2}},
    }  # fmt: skip
    before = copy.deepcopy(old)
    new = rewrite_quantization(old, CUT)
    assert old == before
    assert new == old | {
        "llm_int8_skip_modules": ["model.layers.2"],
        "ignored_layers": ["model.layers.6.mlp"], "exclude": [],
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["model.layers.3.mlp"]],
        "config_groups": {"group_0": {"targets": ["Linear", "model.layers.2.mlp"], "weights": {"num_bits": 8}}},
        "modules": {"model.layers.5.q": {"bits": 8}},
    }  # fmt: skip
    for by_index in (
        {"skip_layers": [1, 2]}, {"skip_layers": ["1", "2"]}, {"skip_layers": "1-2"}, {"first_layer": 2},
        {"skipLayers": [1, 2]}, {"Layers": {"1": {"bits": 8}, "other": {"bits": 4}}}, {"layers": {"1": {"bits": 8}, "2": {"bits": 4}}}, {"layers": {"1": {"bits": 8}, "other": {"bits": 4}}}, {"bits": [8, 4] * 6}, {"bits": {"1": 8, "2": 4}},
    ):  # fmt: skip
        with pytest.raises(CutError, match=f"field '{next(iter(by_index))}' .* is ambiguous; list modules instead"):
            rewrite_quantization(by_index, CUT)
    for field in ("module_quant_configs", "dynamic"):
        with pytest.raises(CutError, match="may pick layers by their index"):
            rewrite_quantization({field: {"layers.1": {"num_bits": 8}}}, CUT)
    for per_module in ({"skip": [f"part{i}" for i in range(CUT.num_layers)]}, {"sizes": {"block": [128, 64]}}):
        for cut in (CUT, Cut((1,), 2)):
            assert rewrite_quantization(per_module, cut) == per_module
    for entry in ("model.layers.4.*", "model.layers.1*"):  # 10 and 11 too, if it is a regular expression
        with pytest.raises(CutError, match="could be a wildcard or a regular expression"):
            rewrite_quantization({"quant_method": "bitsandbytes", "llm_int8_skip_modules": [entry]}, CUT)
        with pytest.raises(CutError, match="could be a wildcard or a regular expression"):
            rewrite_quantization({"ignore": [entry]}, CUT)
    with pytest.raises(CutError, match="can hold only one name"):
        rewrite_quantization({"block": "model.layers.3"}, CUT)
    with pytest.raises(CutError, match="two settings"):
        rewrite_quantization({"producer": {}, "modules": {"layers.1*": 1, "layers.10": 2}}, CUT)


def test_what_may_name_layers():
    assert names_layers({"a": ["x", ("model.layers.3",)]})
    assert not names_layers(["model.layers.*", "layers", "w3", 3, None])


def test_a_name_that_begins_those_of_other_layers():
    """transformers 5.4 leaves layers 10 and 11 unquantised, too, if it is to leave `model.layers.1`."""

    def skip(*names: int, cut: Cut = CUT) -> list[str]:
        return rewrite_quantization({"modules_to_not_convert": [f"model.layers.{i}" for i in names]}, cut)[
            "modules_to_not_convert"
        ]

    assert skip(0, 1, 10, 11, 4) == [f"model.layers.{i}" for i in (0, 1, 5, 6, 2)]
    for names, cut in (((1,), CUT), ((1, 11), CUT), ((2,), Cut((0, *range(2, 14)), 14))):
        with pytest.raises(CutError, match=r"some loaders also take it for 'model\.layers\.10'"):
            skip(*names, cut=cut)
    # Whether or not 10 to 19 are meant, the same layers are before and after.
    for names, left, cut in (
        ((1,), (1,), Cut(tuple(range(12)), 14)),
        ((1, 3), (0, 2), Cut((1, 2, 3), 4)),
        ((12,), (11,), Cut((0, *range(2, 14)), 14)),
    ):
        assert skip(*names, cut=cut) == [f"model.layers.{i}" for i in left]
    with pytest.raises(
        CutError, match=r"some loaders also take it for 'model\.layers\.10', but would not after the cut"
    ):
        skip(1, cut=Cut((0, 1, *range(4, 12)), 12))
    with pytest.raises(CutError, match=r"by 'model\.layers\.1', .* 'model\.layers\.10', but only after the cut"):
        skip(2, cut=Cut((0, *range(2, 14)), 14))
    assert rewrite_quantization({"skip": ["visual.blocks.1"]}, CUT) == {"skip": ["visual.blocks.1"]}
    assert rewrite_quantization({"producer": {}, "skip": ["model.layers.1"]}, CUT)["skip"] == ["model.layers.1"]


INDEX = st.one_of(
    st.integers(0, 11).map(str),
    st.lists(st.integers(0, 11), min_size=1, max_size=4).map(lambda found: f"({'|'.join(map(str, found))})"),
    st.sampled_from([r"\d", r"\d+", "[0-9]+", "[0-9]{1,2}", "1[01]", "[5-9]", "(?:[0-4]|1\\d)", ".*"]),
    st.sampled_from(["[^.]", "([^.])", "(?:.)", r"[\w]{1,2}", "[^.]+", "([^.]*)"]),
    st.sampled_from(r"(?:.+) (?P<i>.) (?!.\.).* (?=[^.]\.).+ (?!.*attn).* (?>.) (\d+) (?P<i>[0-9]+) (\d+)?".split()),
)
BEFORE = st.sampled_from(
    r".* model\. .*\. ^model\. .*\b (?!visual).* (visual|model)\. visual|model\. (visual\.)?model\.".split()
)
AFTER = st.sampled_from([r"\..*", r"\.mlp$", r"\.(mlp|attn)", ".*", r"\.mlp\.experts\.1\.w2", ".+mlp", "$", ""])


@settings(max_examples=400, deadline=None)
@given(BEFORE, INDEX, AFTER)
def test_a_pattern_that_is_kept_picks_all_layers_or_none(before, index, after):
    entry = f"{before}layers\\.{index}{after}"
    try:
        assert ignore(f"re:{entry}") == [f"re:{entry}"]
    except CutError:
        return
    for rest in ("", ".mlp", ".attn.q", ".mlp.experts.1.w2"):
        assert len({bool(re.match(entry, f"model.layers.{i}{rest}")) for i in range(CUT.num_layers)}) == 1


@settings(max_examples=300, deadline=None)
@given(st.text("layersh.0123*?[]()|\\d+re:^$", max_size=30))
def test_no_text_does_anything_but_fail_cleanly(text):
    for entry in (text, f"re:{text}", f"model.layers.{text}", f"re:layers\\.{text}"):
        try:
            rewrite_quantization({"ignore": [entry], "dynamic": {entry: {}}}, CUT)
        except CutError as error:
            message = str(error)
        else:
            message = ""
        assert "\n" not in message


def test_the_config_of_a_cut_model_carries_it():
    config = AutoConfig.for_model("llama", num_hidden_layers=12)
    for value, name in (
        (AwqConfig(modules_to_not_convert=["model.layers.4.mlp", "model.layers.3"]), "modules_to_not_convert"),
        (BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["model.layers.4.mlp"]), "llm_int8_skip_modules"),
    ):
        for settings_ in (value, value.to_dict()):
            config.quantization_config = settings_
            new = families.cut_config(config, CUT)
            assert type(new.quantization_config) is type(settings_)
            fields = new.quantization_config if isinstance(settings_, dict) else new.quantization_config.to_dict()
            assert fields[name] == ["model.layers.2.mlp"]
            assert fields["quant_method"] == value.quant_method
    config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    assert families.cut_config(config, CUT).quantization_config.to_dict() == config.quantization_config.to_dict()


def test_on_disk_settings_keep_their_order_and_those_of_other_programs_are_rewritten_too(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    dynamic = {r".*layers\.\d+\.mlp.up_proj": {"bits": 8}, r".*up_proj": {"bits": 2}}  # the first that matches counts
    gptq = {"quant_method": "gptq", "bits": 4, "dynamic": dynamic, "modules_to_not_convert": ["model.layers.3.mlp"]}
    mlx = {"bits": 4, "model.layers.3.mlp.up_proj": {"bits": 8}, "model.layers.1.mlp.up_proj": {"bits": 8}}
    others = {
        "quantization": mlx,
        "packed": {"but": ["lm_head", "model.layers.3.mlp"]},
        "plain": ["model.layers.3.mlp"],
    }
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": gptq} | others
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps(gptq))
    files = {name: json.loads(text) for name, text in plan_cut(tmp_path, [1]).files.items()}
    assert files["config.json"]["quantization"] == {"bits": 4, "model.layers.2.mlp.up_proj": {"bits": 8}}
    assert files["config.json"]["packed"] == {"but": ["lm_head", "model.layers.2.mlp"]}
    assert files["config.json"]["plain"] == ["model.layers.2.mlp"]
    for written in (files["config.json"]["quantization_config"], files["quantize_config.json"]):
        assert list(written["dynamic"]) == list(dynamic)
        assert written["modules_to_not_convert"] == ["model.layers.2.mlp"]


def test_in_memory_and_while_loading_the_same_layers_are_left_unquantised(tmp_path):
    settings_ = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["model.layers.3", "model.layers.6"])
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    model.config.quantization_config = copy.deepcopy(settings_)
    cut = drop_layers(model, [2, 3], keep_dropped=True)
    assert model.config.quantization_config.llm_int8_skip_modules == ["model.layers.4"]
    cut.restore()
    assert model.config.quantization_config.llm_int8_skip_modules == ["model.layers.3", "model.layers.6"]
    model = load_pruned(tmp_path, [2, 3], quantization_config=settings_)
    assert model.config.quantization_config.llm_int8_skip_modules == ["model.layers.4"]
    assert [type(layer.mlp.up_proj) is nn.Linear for layer in model.model.layers] == [False] * 4 + [True, False]
