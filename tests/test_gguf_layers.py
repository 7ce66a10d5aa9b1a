"""What a GGUF file says about its layers: rewritten exactly, or the cut is refused."""

from pathlib import Path

import pytest
from gguf import GGUFValueType as T

from hf_layerprune.cut.gguf import cut_gguf, plan_gguf_cut
from hf_layerprune.errors import CheckpointError, CutError
from tests.gguf_makers import all_of, array, check_bytes, make_gguf, number, value


def cut(source: Path, drop):
    target = source.with_name("cut.gguf")
    return target, cut_gguf(source, target, drop)


def refused(match: str):
    return pytest.raises(CheckpointError, match=match)


PER_LAYER_CASES = {
    "attention.head_count": ([8, 8, 4, 4, 4, 8], T.UINT32),
    "attention.head_count_kv": ([2, 2, 0, 2, 0, 2], T.INT32),
    "feed_forward_length": ([9, 8, 7, 6, 5, 4], T.UINT64),
    "expert_feed_forward_length": ([9, 8, 7, 6, 5, 4], T.UINT16),
    "attention.sliding_window_pattern": ([True, True, False, True, False, False], T.BOOL),
    "attention.recurrent_layers": ([1, 0, 1, 0, 0, 0], T.INT8),
}


@pytest.mark.parametrize("suffix", PER_LAYER_CASES)
def test_an_array_with_one_value_a_layer_is_cut_in_its_own_type(tmp_path, suffix):
    values, kind = PER_LAYER_CASES[suffix]
    source = make_gguf(tmp_path / "a.gguf", more=array(f"llama.{suffix}", values, kind))
    target, _ = cut(source, (1, 3))
    assert value(target, f"llama.{suffix}") == [values[index] for index in (0, 2, 4, 5)]
    check_bytes(source, target, (1, 3), {"llama.block_count", f"llama.{suffix}"})


def test_keys_without_the_architectures_name_are_cut_too(tmp_path):
    more = array("xielu.alpha_p", [1.0, 2.0, 3.0], T.FLOAT32)
    target, _ = cut(make_gguf(tmp_path / "a.gguf", "apertus", 3, more), [1])
    assert value(target, "xielu.alpha_p") == [1.0, 3.0]


def test_an_array_of_the_same_length_by_accident_is_left_alone(tmp_path):
    more = all_of(
        array("llama.rope.dimension_sections", [1, 2, 3, 4], T.INT32),
        array("tokenizer.ggml.scores", [0.5] * 4, T.FLOAT32),
        array("general.tags", ["a", "b", "c", "d"], T.STRING),
    )
    source = make_gguf(tmp_path / "a.gguf", layers=4, more=more)
    target, _ = cut(source, [1])
    check_bytes(source, target, [1], {"llama.block_count"})


@pytest.mark.parametrize(
    ("arch", "suffix", "before", "drop", "after"),
    [
        ("deepseek", "leading_dense_block_count", 3, (1, 2, 5), 1),
        ("deepseek", "leading_dense_block_count", 3, (4, 5), 3),
        ("deepseek", "leading_dense_block_count", 1, (0,), 0),
        ("glm4moe", "nextn_predict_layers", 1, (1,), 1),
        ("glm4moe", "nextn_predict_layers", 2, (3, 5), 1),
        ("ernie4_5-moe", "interleave_moe_layer_step", 1, (1, 2), 1),
        ("ernie4_5-moe", "interleave_moe_layer_step", 2, (2, 3), 2),
        ("qwen3next", "full_attention_interval", 2, (0, 1), 2),
        ("gemma3", "attention.sliding_window_pattern", 3, (3, 4, 5), 3),
        ("llama", "context_length", 6, (1,), 6),
    ],
)
def test_numbers_that_count_layers_are_counted_again(tmp_path, arch, suffix, before, drop, after):
    source = make_gguf(tmp_path / "a.gguf", arch, 6, number(f"{arch}.{suffix}", before))
    target, _ = cut(source, drop)
    assert value(target, f"{arch}.{suffix}") == after
    assert value(target, f"{arch}.block_count") == 6 - len(drop)


@pytest.mark.parametrize(
    ("arch", "layers", "drop", "fits"),
    [
        ("smollm3", 12, (4, 5, 6, 7), True),
        ("smollm3", 12, (9, 10, 11), True),
        ("smollm3", 12, (3,), False),
        ("smollm3", 12, (0, 1), False),
        ("gemma2", 8, (2, 3), True),
        ("gemma2", 8, (3, 4), True),
        ("gemma2", 8, (3,), False),
        ("gemma2", 46, (44, 45), False),
        ("gemma2", 48, (46, 47), False),
        ("gemma3", 12, (0, 1, 2, 3, 4, 5), True),
        ("gemma3", 12, (0, 1), False),
        ("cohere2", 8, (4, 5, 6), False),
        ("gpt-oss", 8, (0, 1, 4, 5), True),
        ("gpt-oss", 8, (0, 2), False),
        ("olmo2", 8, (0, 2), True),
        ("qwen3next", 8, (0, 1), False),
        ("qwen3next", 8, (0, 1, 2, 3), True),
        ("qwen3next", 8, (3, 4, 5, 6, 7), False),
        ("command-r", 66, (1, 2), True),
        ("command-r", 66, (1, 2, 3), False),
        ("deepseek2", 27, (1,), True),
        ("deepseek2", 27, (1, 2), False),
        ("deepseek2", 30, (1, 2, 3), False),
    ],
)
def test_behaviour_that_readers_tie_to_the_index_is_kept_or_the_cut_refused(tmp_path, arch, layers, drop, fits):
    names = [f"{layer}" for layer in range(layers)]
    source = make_gguf(tmp_path / "a.gguf", arch, layers, layer_names=names)
    if fits:
        assert plan_gguf_cut(source, drop).cut.drop == drop
    else:
        with refused("alternate in groups|reads a"):
            plan_gguf_cut(source, drop)


def test_a_sliding_olmo2_is_periodic(tmp_path):
    source = make_gguf(tmp_path / "a.gguf", "olmo2", 8, number("olmo2.attention.sliding_window", 128))
    with refused(r"groups of 4 .*, and layer 3 would become layer 2, .* for example 0-3"):
        plan_gguf_cut(source, [2])


@pytest.mark.parametrize(
    ("more", "drop", "match"),
    [
        (array("llama.mystery", [1] * 6, T.UINT32), [1], "llama.mystery may say something about the layers"),
        (array("llama.mystery", ["x"] * 6, T.STRING), [1], "llama.mystery"),
        (array("other.mystery", [1] * 6, T.UINT32), [1], "other.mystery"),
        (array("llama.rope.freq_base", [1.0] * 6, T.FLOAT32), [1], "llama.rope.freq_base"),
        (number("llama.mystery_layers", 2), [1], "llama.mystery_layers"),
        (number("llama.odd_interval", 2), [1], "llama.odd_interval"),
        (number("llama.mystery", 6), [1], "llama.mystery"),
        (number("clip.vision.block_count", 3), [1], "clip.vision.block_count"),
        (number("llama.rescale_every_n_layers", 2), [1], "may say something about the layers"),
        (array("llama.deepstack_mapping", [-1, 0, -1, 1, -1, -1], T.INT32), [4], "may say something about the layers"),
        (number("llama.leading_dense_block_count", 1, T.FLOAT32), [1], "one whole number"),
        (number("llama.leading_dense_block_count", -1, T.INT32), [1], "cannot be negative"),
        (number("llama.nextn_predict_layers", 6), [1], "does not fit the 6 layers"),
        (number("llama.nextn_predict_layers", 2), [0, 1, 2, 3], r"all of the decoder's layers 0\.\.3"),
        (array("llama.attention.head_count", [8] * 5, T.UINT32), [1], "array of 5"),
        (array("llama.attention.head_count", [8, 4, 4, 4, 4, 4], T.UINT32), [0], "so keep layer 0"),
        (array("llama.attention.head_count_kv", [2, 0, 2, 2, 2, 2], T.UINT32), [1], "keep a layer of each"),
        (array("llama.attention.head_count", ["x"] * 6, T.STRING), [1], "6 strings"),
        (array("general.tensor_extra.name", ["blk.0.x"], T.STRING), [1], "lists tensors by name"),
        (number("split.count", 3, T.UINT16), [1], "one of 3 parts of a split model"),
    ],
)
def test_what_cannot_be_rewritten_exactly_is_refused_by_name(tmp_path, more, drop, match):
    # All decoder layers at once is a bad choice of layers; everything else is about the file.
    kind = CutError if match.startswith("all of") else CheckpointError
    with pytest.raises(kind, match=match):
        plan_gguf_cut(make_gguf(tmp_path / "a.gguf", more=more), drop)


def test_a_file_with_only_one_part_is_no_split_file(tmp_path):
    cut(make_gguf(tmp_path / "a.gguf", more=number("split.count", 1, T.UINT16)), [1])


@pytest.mark.parametrize("arch", ["gemma3n", "rwkv7", "hal9000"])
def test_an_unknown_architecture_is_refused(tmp_path, arch):
    with refused(f"'{arch}' cannot be cut in this format"):
        plan_gguf_cut(make_gguf(tmp_path / "a.gguf", arch), [1])


@pytest.mark.parametrize(
    ("name", "label", "new_name", "new_label"),
    [
        ("Big 47K-chat v1.47K", "47K", "Big 31K-chat v1.47K", "31K"),
        ("Nameless", "47K", "Nameless 31K", "31K"),
        ("Plain", None, "Plain 31K", None),
    ],
)
def test_name_and_size_label_follow_the_size(tmp_path, name, label, new_name, new_label):
    texts = {"general.name": name} | ({"general.size_label": label} if label else {})
    steps = [number(key, text, T.STRING) for key, text in texts.items()]
    target, _ = cut(make_gguf(tmp_path / "a.gguf", more=all_of(*steps)), [1, 4])
    reader = {key: value(target, key) for key in texts}
    assert reader == {"general.name": new_name} | ({"general.size_label": new_label} if label else {})


def test_the_size_label_of_experts_counts_one_experts_parameters(tmp_path):
    more = all_of(number("general.size_label", "4x12K", T.STRING), number("llama.expert_count", 4))
    target, _ = cut(make_gguf(tmp_path / "a.gguf", more=more), [1, 4])
    assert value(target, "general.size_label") == "4x8.2K"
