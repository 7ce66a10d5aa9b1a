"""Drop until a target: what is predicted is what is written, whatever the layers are made of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_layerprune import CutError, LayerDropConfig, drop_layers, prune_model, prune_with, rank_layers
from hf_layerprune.cli import main
from hf_layerprune.cut.sizes import Sizes
from hf_layerprune.families import layer_count
from hf_layerprune.options import CutOptions
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_config
from hf_layerprune.select import decode_times, select_layers
from hf_layerprune.select.targets import Target
from hf_layerprune.stages.inspect import inspect_model
from hf_layerprune.stages.rank import rank
from hf_layerprune.stages.requests import InspectRequest, RankRequest
from hf_layerprune.versions import installed_version

from .cutting import cut_checkpoint
from .evaluate_proofs import real_cache
from .gguf_makers import smollm2
from .measure_models import write_gguf
from .tiny_models import LAYERS, tiny_model

# Layers of one size; dense and expert layers; state spaces; latent attention; windows; a slice for each layer.
TYPES = ("llama", "qwen2_moe", "granitemoehybrid", "deepseek_v3", "gemma2", "gemma3n_text")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for model_type in TYPES:
        tiny_model(model_type).save_pretrained(root / model_type, max_shard_size="60KB")
    return {model_type: root / model_type for model_type in TYPES}


def on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("model_type", TYPES)
def test_exact_against_what_is_written(model_type: str, bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases[model_type]
    sizes = Sizes(load_config(base), str(base))
    assert sizes.file_bytes() == on_disk(base)
    assert sizes.parameters() == tiny_model(model_type).num_parameters()
    drop = [1, 2] if model_type == "gemma3n_text" else [1, 3, 4]
    cut_checkpoint(base, tmp_path / "cut", drop)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut").eval()
    assert sizes.file_bytes(drop) == on_disk(tmp_path / "cut")
    assert sizes.parameters(drop) == model.num_parameters()
    for tokens, batch in ((16, 1), (5, 3)):
        cache = sizes.memory_bytes(drop, context=tokens, batch=batch) - sizes.weight_bytes(drop)
        assert cache == real_cache(model, tokens, batch)


# Towers; a tied head with a bias of its own; a head that only the outer config ties; blocks that layers share; a slice
# for each layer.
@pytest.mark.parametrize(
    "model_type", ["paligemma", "qwen2_5_vl", "modernbert-decoder", "mistral3", "zamba", "gemma3n_text"]
)
def test_all_of_a_model_is_counted(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.config.save_pretrained(tmp_path)
    anatomy = inspect_model(InspectRequest(str(tmp_path), drop=2))
    assert anatomy.total == model.num_parameters()
    assert anatomy.tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    sizes = Sizes(model.config)
    assert sizes.parameters() == model.num_parameters()
    # This version can run zamba without weights.
    if model_type != "zamba" or installed_version("transformers") >= Version("5.16"):
        assert sizes.memory_bytes(context=16) == sizes.weight_bytes() + real_cache(model, 16, 1)
    added = Sizes(model.config, untie=True).parameters() - sizes.parameters()
    assert added == (model.get_input_embeddings().weight.numel() if anatomy.tied else 0)
    if anatomy.refusal:
        return
    assert anatomy.left == sizes.parameters(anatomy.dropped)
    drop_layers(model, anatomy.dropped)
    assert anatomy.left == model.num_parameters()


def test_sizes_are_those_of_the_type_in_which_a_base_was_loaded() -> None:
    """Whatever type the model computes in later, as on a CPU that is slow in 16 bits."""
    config = tiny_model("llama").config
    config.dtype = torch.bfloat16
    sizes = Sizes(config)
    before = sizes.file_bytes([1])
    config.dtype = torch.float32
    assert sizes.file_bytes([2]) == before


def test_integers_stay_what_they_are_in_another_data_type(tmp_path: Path) -> None:
    base = tiny_model("deepseek_v4")
    base.save_pretrained(tmp_path / "base")
    integers = sum(t.numel() * t.element_size() for t in base.state_dict().values() if not t.is_floating_point())
    whole, half = (
        Sizes(base.config, str(tmp_path / "base"), dtype=dtype).weight_bytes() for dtype in ("auto", "bfloat16")
    )
    assert half == integers + (whole - integers) // 2


@pytest.mark.parametrize(
    ("model_type", "option"),
    [("granitemoehybrid", "target_params"), ("qwen2_moe", "target_size"), ("qwen2_moe", "target_memory")],
)
def test_as_few_layers_as_meet_it(model_type: str, option: str, bases: dict[str, Path]) -> None:
    config = load_config(bases[model_type])
    of_base = Target.from_options(CutOptions(**{option: 1}, context=16), config, str(bases[model_type]))
    assert of_base is not None
    dense = of_base.left(())
    for share in (0.95, 0.6):
        choice = CutOptions(**{option: int(share * dense)}, context=16)
        target = Target.from_options(choice, config, str(bases[model_type]))
        assert target is not None
        dropped = select_layers(LAYERS, choice, target=target)
        assert dropped == list(range(LAYERS - len(dropped), LAYERS))
        assert target.left(dropped) <= getattr(choice, option)
        assert len(dropped) == 1 or target.left(dropped[1:]) > getattr(choice, option)


def test_layers_of_unequal_size_are_counted_as_they_are(bases: dict[str, Path]) -> None:
    """Fewer layers go where the criterion drops large ones."""
    config = load_config(bases["qwen2_moe"])
    sizes = Sizes(config, str(bases["qwen2_moe"])).per_layer("params")
    assert len(set(sizes)) == 2
    choice = CutOptions(target_params=int(sum(Sizes(config).per_layer("params")) * 0.7), criterion="reverse_order")
    target = Target.from_options(choice, config, str(bases["qwen2_moe"]))
    assert target is not None
    order = sorted(range(LAYERS), key=sizes.__getitem__)
    counts = [
        target.choose_count(LAYERS, range(LAYERS), picked) for picked in (lambda k: order[:k], lambda k: order[-k:])
    ]
    assert counts[0] > counts[1]
    # A choice that is not nested: with two layers it drops small ones, with three large ones, with four small ones.
    odd = {1: order[:1], 2: order[:2], 3: order[-3:], 4: order[:4], 5: order[:5], 6: order[:6], 7: order[:7]}
    count = target.choose_count(LAYERS, range(LAYERS), odd.__getitem__)
    assert count == 3
    assert target.left(odd[count]) <= target.limit


def test_prune_writes_what_was_predicted(bases: dict[str, Path], tmp_path: Path) -> None:
    base = bases["llama"]
    limit = int(0.75 * on_disk(base))
    assert main(["prune", str(base), str(tmp_path / "cut"), "--target-size", str(limit)]) == 0
    (entry,) = Lineage.load(tmp_path / "cut").entries  # type: ignore[union-attr]
    record = entry["selection"]["target"]
    assert record == {
        "option": "target_size",
        "limit": limit,
        "dense": on_disk(base),
        "left": on_disk(tmp_path / "cut"),
    }
    assert entry["settings"]["target_size"] == limit
    assert "drop" not in entry["settings"]
    assert on_disk(tmp_path / "cut") <= limit < on_disk(base)
    # Half as wide weights need no layer to go; of those, a smaller file does.
    half = ["prune", str(base), str(tmp_path / "half"), "--dtype", "bfloat16", "--target-size"]
    assert main([*half, str(limit)]) == 2
    assert main([*half, str(limit // 2)]) == 0
    assert on_disk(tmp_path / "half") <= limit // 2


@pytest.mark.parametrize(
    ("model_type", "dtype"),
    [("hy_v4", "bfloat16"), ("qwen2_moe", "bfloat16"), ("gpt_oss", "float16"), ("gguf", "bfloat16")],
)
def test_a_size_that_files_of_another_type_just_meet(model_type: str, dtype: str, tmp_path: Path) -> None:
    """Of a HY v4, the head and more stay in float32, of a gpt-oss the norms; in files, each expert has tensors of its own."""
    base, words = tmp_path / "base", ["--dtype", dtype, "--target-size"]
    if model_type == "gguf":
        base, words = write_gguf(tmp_path / "base.gguf"), ["--target-size"]
    else:
        tiny_model(model_type).save_pretrained(base)
    config = load_config(base)
    last = layer_count(config) - 1
    limit = Sizes(config, str(base), dtype=dtype).file_bytes([last])
    for fewer in (0, 1):
        assert main(["prune", str(base), str(tmp_path / str(fewer)), *words, str(limit - fewer)]) == 0
        assert layer_count(load_config(tmp_path / str(fewer))) == last - fewer
    assert on_disk(tmp_path / "0") == limit


def test_files_that_turn_out_too_large_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = write_gguf(tmp_path / "base.gguf")
    monkeypatch.setattr(Sizes, "file_bytes", Sizes.weight_bytes)
    limit = Sizes(load_config(base), str(base), dtype="bfloat16").weight_bytes([3])
    for dtype in ("auto", "bfloat16"):
        words = ["prune", str(base), str(tmp_path / "cut"), "--target-dtype", dtype, "--target-size", str(limit)]
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "more than --target-size allows" in error
        assert error.endswith("use --drop 2 or more instead\n")
        assert not (tmp_path / "cut").exists()


def test_a_size_in_a_type_that_is_not_written(bases: dict[str, Path], tmp_path: Path) -> None:
    """It may be converted later, so the files that are written now may be larger."""
    limit = int(0.45 * on_disk(bases["llama"]))
    words = ["prune", str(bases["llama"]), str(tmp_path / "cut"), "--target-dtype", "bfloat16", "--target-size"]
    assert main([*words, str(limit)]) == 0
    assert Sizes(load_config(tmp_path / "cut"), str(tmp_path / "cut"), dtype="bfloat16").file_bytes() <= limit
    assert on_disk(tmp_path / "cut") > limit


def test_an_adapter_counts_the_head_that_it_unties(bases: dict[str, Path]) -> None:
    dense = tiny_model("gemma2")
    limit = int(0.8 * dense.num_parameters())
    tied = prune_with(LayerDropConfig(target_params=limit), tiny_model("gemma2"))
    untied = prune_with(LayerDropConfig(target_params=limit, tune_lm_head=True), dense)
    left = [model.merge_and_unload().num_parameters() for model in (tied, untied)]
    assert max(left) <= limit
    dropped = [len(model.peft_config["default"].drop_layers) for model in (tied, untied)]
    assert dropped[1] > dropped[0]
    both = LayerDropConfig(target_params=limit, tune_lm_head=True, modules_to_save=["embed_tokens"])
    assert prune_with(both, tiny_model("gemma2")).merge_and_unload().num_parameters() <= limit
    for name in ("embed_tokens", "lm_head"):
        with pytest.raises(CutError, match=r"target_params does not count the matrix .* set tune_lm_head=True"):
            prune_with(LayerDropConfig(target_params=limit, modules_to_save=[name]), tiny_model("gemma2"))
    again = LayerDropConfig(**tied.peft_config["default"].to_dict() | {"peft_type": None})
    assert again.drop_layers == tied.peft_config["default"].drop_layers


def test_speed_follows_measured_times(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = decode_times.DecodeTimes([1.0, 1.0, 1.0, 3.0, 1.0, 1.0, 1.0, 3.0], 2.0)
    monkeypatch.setattr(decode_times, "time_decoding", lambda *_: measured)
    # 14 without layers: dropping the last (3) gives 14 / 11 = 1.27, another (1) gives 1.4.
    for speedup, dropped in ((1.27, [7]), (1.3, [6, 7]), (1.4, [6, 7]), (1.45, [5, 6, 7])):
        model = prune_with(LayerDropConfig(target_speedup=speedup), tiny_model("llama"))
        assert model.peft_config["default"].drop_layers == dropped
    with pytest.raises(
        CutError, match=r"^target_speedup=9 can't be met: without 7 layers, decoding is only 4.67 times as fast"
    ):
        prune_with(LayerDropConfig(target_speedup=9.0), tiny_model("llama"))


def test_times_are_of_the_layers_of_the_model() -> None:
    model = tiny_model("qwen2_moe")
    model.generation_config = habits = GenerationConfig(num_beams=2, eos_token_id=list(range(128)))
    times = decode_times.time_decoding(model, 40, 2)
    assert model.generation_config is habits
    assert len(times.layers) == LAYERS
    assert all(time > 0 for time in times.layers)
    assert times.rest > 0
    assert times.layers[1] == times.layers[3], "layers of a kind are the same work"
    assert times.speedup([0, 1]) == pytest.approx(times.total / (times.total - times.layers[0] - times.layers[1]))


def test_times_are_taken_on_the_device_that_runs_the_layers(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a GPU notes what is moved there; nothing stays behind."""
    moved: list[Any] = []

    @contextmanager
    def note(device: Any, *modules: Any) -> Iterator[None]:
        moved.append(device)
        yield

    monkeypatch.setattr(decode_times, "moved_to", note)
    monkeypatch.setattr("hf_layerprune.runtime.devices.pick_device", lambda name: "meta" if name == "gpu" else name)
    request = RankRequest(str(bases["llama"]), criteria=["reverse_order"], target_speedup=1.2, device="gpu")
    rank(request)
    assert moved == [torch.device("meta")]


def test_layers_that_run_only_with_an_image_take_no_time() -> None:
    model = tiny_model("mllama")
    times = decode_times.time_decoding(model, 40)
    assert [i for i, time in enumerate(times.layers) if not time] == model.config.cross_attention_layers


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), RuntimeError("MPS backend out of memory")])
def test_a_model_that_is_too_large_for_a_device_is_timed_where_it_is(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    @contextmanager
    def too_small(device: Any, *modules: Any) -> Iterator[None]:
        raise error
        yield

    monkeypatch.setattr(decode_times, "moved_to", too_small)
    times = decode_times.time_decoding(tiny_model("llama"), 40, 1, torch.device("meta"))
    assert "meta is too small for the whole model, so decoding is timed on cpu" in caplog.text
    assert times.device == "cpu"
    assert str(times).startswith("on cpu, decoding takes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--target-size", "1KB"],
            "--target-size 1kB can't be met: dropping 7 layers leaves 65.11 kB, which is 64.11 kB too much; raise the target to ",
        ),
        (
            ["--target-params", "1M"],
            "--target-params 1M is met by the model as it is (70.18 k), so there is nothing to drop",
        ),
        (["--target-memory", "200KB", "--context", "999"], "--context 999 is more than the 128 positions"),
        (
            ["--target-params", "20K", "--criterion", "magnitude_l1"],
            "--target-params 20k can't be met: dropping all 2 of the layers that may go leaves",
        ),
    ],
)
def test_impossible_targets(
    words: list[str], message: str, bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(bases["llama"]), str(tmp_path / "cut"), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert list(tmp_path.iterdir()) == []
    if "raise the target to " in error:  # one that can be met, to the byte
        nearest = int(error.partition("raise the target to ")[2].partition(" or more")[0])
        for limit, code in ((nearest - 1, 2), (nearest, 0)):
            assert (
                main(["prune", str(bases["llama"]), str(tmp_path / "cut"), words[0], str(limit), *words[2:]]) == code
            )


def test_rank_takes_targets(bases: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    limit = int(0.7 * tiny_model("qwen2_moe").num_parameters())
    names = ["reverse_order", "magnitude_l1", "angular_distance"]
    request = RankRequest(
        str(bases["qwen2_moe"]), criteria=names, target_params=limit, protect_first=0, protect_last=0,
        calibration_samples=4, calibration_length=16,
    )  # fmt: skip
    ranking = rank(request)
    sizes = Sizes(load_config(bases["qwen2_moe"]))
    for name in names:
        dropped = ranking.drops[name]
        assert sizes.parameters(dropped) <= limit, name
    assert sizes.parameters(ranking.drops["reverse_order"][1:]) > limit


@pytest.mark.parametrize("variant", ["original", "paper"])
@pytest.mark.parametrize("seed", range(4))
def test_rank_names_the_random_layers_that_prune_drops(
    variant: str, seed: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    """Layers of unequal size: how many go depends on which, and the paper's draw on how many go."""
    base = str(bases["deepseek_v3"])
    whole = tiny_model("deepseek_v3").num_parameters()
    for share in (0.85, 0.4):
        options: dict[str, Any] = {"target_params": int(share * whole), "variant": variant, "seed": seed}
        ranked = rank_layers(base, criteria="random", **options)
        pruned = prune_model(base, tmp_path / str(share), criterion="random", **options)
        assert ranked.drops["random"] == pruned.dropped


def test_a_gguf_file_that_stays_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = smollm2()
    words = ["prune", str(base), str(tmp_path / "small.gguf")]
    assert main([*words, "--target-memory", "100MB"]) == 2
    assert "use --target-size, --target-params or --drop N" in capsys.readouterr().err
    assert main([*words, "--target-size", "75MB"]) == 0
    assert (tmp_path / "small.gguf").stat().st_size <= 75_000_000


def test_smollm2_at_a_target(smollm2_folder: Path, tmp_path: Path) -> None:
    """The embeddings stay whole, so a quarter less is more than a quarter of the layers."""
    assert main(["prune", str(smollm2_folder), str(tmp_path / "cut"), "--target-size", "200MB"]) == 0
    (entry,) = Lineage.load(tmp_path / "cut").entries  # type: ignore[union-attr]
    assert entry["selection"]["target"]["left"] == on_disk(tmp_path / "cut") <= 200_000_000
    assert entry["layers"] == {"base": 30, "left": 20}
    sizes = Sizes(load_config(smollm2_folder), str(smollm2_folder))
    # Keys and values of 3 heads of 64, in bfloat16.
    assert sizes.memory_bytes(context=8192, batch=2) == sizes.weight_bytes() + 2 * 8192 * 30 * 2 * 3 * 64 * 2
