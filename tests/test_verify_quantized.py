"""A quantised model: `verify` repeats how it was quantised, and says no to whatever that does not account for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_layerprune import CheckpointError, CutError, LayerDropConfig, prune_with, record_quantized
from hf_layerprune.cli import main
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.publish.card.render import Card
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.outcome import Verification
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.records.fingerprints import fingerprint, weights_hash
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.quantized import describe_quantization, quantization_method
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.versions import installed_version

from .publish_models import base_on_hub
from .tiny_models import tiny_model

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
INT8 = BitsAndBytesConfig(load_in_8bit=True)
DOWN = "model.layers.3.mlp.down_proj.weight"


def torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(quant_type=Int8WeightOnlyConfig())


METHODS = {
    "bitsandbytes, nf4": lambda: NF4,
    "bitsandbytes, int8": lambda: INT8,
    "torchao, Int8WeightOnlyConfig": torchao_int8,
}


def quantise(source: Path, target: Path, how: Any = NF4) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=how, device_map="cpu")
    model.save_pretrained(target)
    return target


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 8 layers, its cut, and that quantised."""
    place = tmp_path_factory.mktemp("quantised")
    model = tiny_model("llama").to(torch.bfloat16)
    model.save_pretrained(place / "base")
    assert main(["prune", str(place / "base"), str(place / "cut"), "--drop-layers", "2,5"]) == 0
    record_quantized(place / "cut", quantise(place / "cut", place / "nf4"))
    return place


@pytest.fixture
def nf4(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "nf4", tmp_path / "nf4"))


def check(folder: Path, **more: Any) -> Verification:
    return verify(VerifyRequest(str(folder), **more))


def said(found: Verification, good: bool | None = None) -> str:
    return "\n".join(f"{line.what}: {line.text}" for line in found.lines if good in (None, line.good))


def claim(folder: Path) -> None:
    """What somebody does who wants to be believed: the records are made to fit the files."""
    lineage = Lineage.load(folder)
    lineage.entries.pop()
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    entry = {"stage": "quantize", "settings": {"quantization_config": settings, "dtype": "bfloat16"}}
    lineage.record(folder, entry | {"layers": lineage.entries[-1]["layers"]})


def edit(folder: Path, name: str, change: Any = None, **notes: str) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        known = file.metadata()
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    if change is not None:
        tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata=known | notes)
    claim(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "desc_act": False}, "gptq, 4 bits"),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized", "bits": 4},
            "compressed-tensors, pack-quantized",
        ),
        ({"quant_method": "torchao", "quant_type": {"default": None}}, "torchao"),
        ({"quant_method": "torchao", "quant_type": {"default": "int4"}}, "torchao, int4"),
        ({"quant_method": "torchao", "quant_type": {"default": ["int4"]}}, "torchao"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnly"}}},
            "torchao, Int8WeightOnly",
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True, "bits": 4}, "bitsandbytes, int8"),
        ({"quant_method": "awq", "bits": "four"}, "awq"),
        ({"quant_method": ["gptq"]}, "unknown"),
        ({"quant_method": ""}, "unknown"),
        ("fp8", "unknown"),
    ],
)
def test_how_other_programs_quantised_in_a_few_words(settings: Any, said: str) -> None:
    assert describe_quantization(settings) == said
    assert quantization_method(settings) == said.partition(",")[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_cut_that_was_quantised_is_repeated_to_the_last_bit(place, tmp_path, name):
    record_quantized(place / "cut", quantise(place / "cut", tmp_path / "q", METHODS[name]()))
    found = check(tmp_path / "q")
    assert found.verdict == f"YES: {tmp_path / 'q'} matches its records and its base, {place / 'base'}", said(
        found, False
    )
    assert "15 are the base's, to the last bit" in said(found, True)  # embeddings, head and norms
    assert f"are what {name.partition(',')[0]} " in said(found, True)
    assert f"quantised: `{name}`" in Card.from_records(Lineage.load(tmp_path / "q")).body()
    assert main(["verify", str(tmp_path / "q")]) == 0


def test_a_method_that_passes_over_every_layer_of_a_type_is_no_stage(tmp_path):
    tiny_model("gpt2").to(torch.bfloat16).save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    with pytest.raises(CheckpointError, match=r"no weight of .*/q is quantised.*torchao passes over"):
        record_quantized(tmp_path / "cut", quantise(tmp_path / "cut", tmp_path / "q", torchao_int8()))
    assert not (tmp_path / "q" / "lineage.json").exists()


def test_the_tokenizer_replaces_the_one_that_was_saved(place, tmp_path):
    cut, nf4 = (Path(shutil.copytree(place / name, tmp_path / name)) for name in ("cut", "nf4"))
    (nf4 / "lineage.json").unlink()
    (cut / "tokenizer_config.json").write_text("ours")
    (cut / "chat_template.jinja").write_text("ours")
    (nf4 / "tokenizer_config.json").write_text("saved")
    (tmp_path / "blob").write_text("elsewhere")
    (nf4 / "chat_template.jinja").symlink_to(tmp_path / "blob")
    record_quantized(cut, nf4)
    assert (nf4 / "tokenizer_config.json").read_text() == (nf4 / "chat_template.jinja").read_text() == "ours"
    assert (tmp_path / "blob").read_text() == "elsewhere"


@pytest.mark.parametrize(
    ("tensor", "change", "says"),
    [
        (DOWN, lambda t: t ^ 1, f"{DOWN} differs from"),
        (f"{DOWN}.absmax", lambda t: t * 1.01, f"{DOWN}.absmax differs from what bitsandbytes"),
        (f"{DOWN}.quant_map", lambda t: t.flip(0), f"{DOWN}.quant_map differs from what bitsandbytes"),
        ("model.norm.weight", lambda t: t * 2, "model.norm.weight differs from the base's"),
    ],
)
def test_any_other_value_is_a_no(nf4, tensor, change, says):
    edit(nf4, tensor, change)
    found = check(nf4)
    assert found.verdict.startswith("NO")
    assert says in said(found, False)
    assert not check(nf4, accept_trained=True).good


def test_what_the_weight_files_note_counts(nf4):
    edit(nf4, DOWN, None, **{DOWN: '{"_type": "Int8Tensor"}'})
    found = check(nf4)
    assert found.verdict.startswith("NO")
    assert f"note on {DOWN} is not what bitsandbytes" in said(found, False)


def test_what_the_weight_files_of_a_quantised_base_note_counts(place, tmp_path):
    base, cut = quantise(place / "base", tmp_path / "base", torchao_int8()), tmp_path / "cut"
    assert main(["prune", str(base), str(cut), "--drop-layers", "2,5"]) == 0
    assert check(cut).good
    path = cut / "model.safetensors"
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    assert not any(name.startswith("model.layers.6.") for name in notes)
    assert "model.layers.6." not in notes["tensor_names"]
    notes[DOWN] = notes[DOWN].replace("[1, 48]", "[1, 24]")
    save_file(load_file(path), path, metadata=notes)
    lineage = Lineage.load(cut)
    lineage.entries[-1]["weights"] = weights_hash(fingerprint(cut))
    lineage.write(cut)
    assert f"note on {DOWN} is not what the base's note" in said(check(cut), False)


def test_layers_that_are_quantised_in_two_ways_stay_so_when_they_are_renumbered(place, tmp_path):
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    ways = [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()]
    names = {f"model.layers.{i}.mlp.{name}_proj": ways[i // 4] for i in range(8) for name in ("gate", "up", "down")}
    how = TorchAoConfig(quant_type=FqnToConfig(names))
    base = quantise(place / "base", tmp_path / "base", how)
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", device_map="cpu")
    plain = [layer.mlp.up_proj.weight.act_quant_kwargs is None for layer in model.model.layers]
    assert plain == [True] * 3 + [False] * 4
    assert check(tmp_path / "cut").good


def test_notes_name_layers_as_the_model_does_where_the_checkpoint_has_other_names(tmp_path):
    from torchao.quantization import FqnToConfig, Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    tiny_model("llava").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    ways = [Int8WeightOnlyConfig(), Int8DynamicActivationInt8WeightConfig()]
    modules = ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    names = {f"model.language_model.layers.{i}.{name}.weight": ways[i // 4] for i in range(8) for name in modules}
    base = tmp_path / "base"
    load_base(tmp_path / "dense", quantization_config=TorchAoConfig(quant_type=FqnToConfig(names))).save_pretrained(
        base
    )
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    model: Any = load_base(tmp_path / "cut")
    plain = [layer.mlp.up_proj.weight.act_quant_kwargs is None for layer in model.model.language_model.layers]
    assert plain == [True] * 3 + [False] * 4
    assert check(tmp_path / "cut").good
    with pytest.raises(CheckpointError, match="as torchao does, and is not loaded cut; cut it on disk"):
        load_pruned(base, [2])
    with pytest.raises(CutError, match=r"q_proj\.weight is quantised and can't be tuned"):
        prune_with(LayerDropConfig(drop_layers=[2], tune_layers=1), load_base(base))


def test_a_cut_that_was_quantised_and_cut_again(place, tmp_path):
    how = torchao_int8()
    how.modules_to_not_convert = ["model.layers.2", "lm_head"]
    record_quantized(place / "cut", quantise(place / "cut", tmp_path / "q", how))
    assert main(["prune", str(tmp_path / "q"), str(tmp_path / "again"), "--drop-layers", "1"]) == 0
    found = check(tmp_path / "again")
    assert found.good, said(found, False)


def test_an_adapter_for_a_quantised_cut(nf4, tmp_path):
    words = ["--drop-layers", "1", "--adapter", "--tune-layers", "0"]
    assert main(["prune", str(nf4), str(tmp_path / "adapter"), *words]) == 0
    found = check(tmp_path / "adapter")
    assert found.good, said(found, False)


def test_an_adapter_for_a_quantised_base_with_notes(place, tmp_path):
    """They are in the base's files, which the adapter leaves alone."""
    base, path = quantise(place / "base", tmp_path / "base"), tmp_path / "base" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "made_by": "somebody"})
    words = ["--drop-layers", "1", "--adapter", "--tune-layers", "0"]
    assert main(["prune", str(base), str(tmp_path / "adapter"), *words]) == 0
    found = check(tmp_path / "adapter")
    assert found.good, said(found, False)


def test_an_adapter_that_nothing_quantised(place, tmp_path):
    """Its records say that its base was quantised before the cut, by a method that can't be repeated."""
    folder = tmp_path / "adapter"
    assert main(["prune", str(place / "base"), str(folder), "--drop-layers", "1", "--adapter"]) == 0
    lineage = Lineage.load(folder)
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    weights = lineage.entries[0]["input_weights"] = "0" * 64
    layers = {"base": 8, "left": 8}
    lineage.entries.insert(0, {"stage": "quantize", "settings": settings, "layers": layers, "weights": weights})
    lineage.write(folder)
    found = check(folder)
    assert not found.consistent
    assert "none was changed by the quantising" in said(found, False)


def test_records_of_a_quantised_model(nf4, tmp_path):
    """The weights of the cut are another hash than the quantised ones."""
    (tmp_path / "card").mkdir()
    shutil.copyfile(nf4 / "lineage.json", tmp_path / "card" / "lineage.json")
    found = check(tmp_path / "card")
    assert found.verdict.startswith("RECORDS ONLY: ")
    assert found.consistent, said(found)


def test_an_extra_tensor_is_a_no(nf4):
    path = nf4 / "model.safetensors"
    save_file(load_file(path) | {f"{DOWN}.extra": torch.ones(1)}, path, metadata={"format": "pt"})
    claim(nf4)
    assert f"{DOWN}.extra is not a tensor of the base" in said(check(nf4), False)


def test_other_settings_than_those_recorded_are_a_no(nf4):
    config = json.loads((nf4 / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = ["model.layers.3"]
    (nf4 / "config.json").write_text(json.dumps(config))
    claim(nf4)
    assert check(nf4).verdict.startswith("NO")


def test_what_was_repaired_before_is_only_as_recorded(place, tmp_path):
    words = ["--repair", "magnitude", "--calibration-samples", "2", "--calibration-length", "16"]
    base = tmp_path / "base"
    hub = type("Hub", (), {"repos": {}})()
    base_on_hub(hub, tmp_path, "base")
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "2,5", *words]) == 0
    record_quantized(tmp_path / "cut", quantise(tmp_path / "cut", tmp_path / "q"))
    changed = Lineage.load(tmp_path / "cut").entries[-1]["repair"]["changed_tensors"]
    found = check(tmp_path / "q")
    assert found.verdict.startswith("IN PART"), said(found)
    assert found.recorded == {"repair": len(changed)}
    assert check(tmp_path / "q", accept_trained=True).verdict.startswith("YES, as recorded")
    # The word of the records is taken for those alone.
    other = next(f"model.layers.{i}.mlp.gate_proj.weight" for i in range(6))
    assert other not in changed
    path = tmp_path / "q" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {other: tensors[other] ^ 1}, path, metadata={"format": "pt"})
    lineage = Lineage.load(tmp_path / "q")
    lineage.entries[-1]["weights"] = weights_hash(fingerprint(tmp_path / "q"))
    lineage.write(tmp_path / "q")
    assert f"{other} differs from" in said(check(tmp_path / "q", accept_trained=True), False)


@pytest.mark.parametrize(
    ("settings", "words", "parts"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq, 4 bits", ("qweight", "scales")),
        (
            {"quant_method": "compressed-tensors", "format": "pack-quantized"},
            "compressed-tensors, pack-quantized",
            ("weight_packed", "weight_scale"),
        ),
        ({"quant_method": "fp8"}, "fp8", ("weight_packed", "weight_scale_inv")),
    ],
    ids=["gptq", "llm-compressor", "fp8, which needs no package"],
)
def test_a_method_that_takes_data_is_only_as_recorded(place, tmp_path, settings, words, parts):
    """What such methods write, in their form: their tensors in place of the base's."""
    shutil.copytree(place / "cut", tmp_path / "gptq")
    (tmp_path / "gptq" / "recipe.yaml").write_text("default_stage: {}\n")  # llm-compressor's own record
    (tmp_path / "gptq" / "lineage.json").unlink()
    path = tmp_path / "gptq" / "model.safetensors"
    tensors = load_file(path)
    module = DOWN.removesuffix(".weight")
    del tensors[DOWN]
    tensors |= {f"{module}.{parts[0]}": torch.ones(2, 2, dtype=torch.int32), f"{module}.{parts[1]}": torch.ones(2)}
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    config["quantization_config"] = settings
    (tmp_path / "gptq" / "config.json").write_text(json.dumps(config))
    record_quantized(place / "cut", tmp_path / "gptq")
    found = check(tmp_path / "gptq")
    assert found.verdict.startswith("IN PART"), said(found)
    assert found.recorded == {"quantize": 2}
    card = Card.from_records(Lineage.load(tmp_path / "gptq")).body()
    assert f"quantised: `{words}`" in card
    assert "None" not in card
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, path, metadata={"format": "pt"})
    assert "model.norm.weight differs from the base's" in said(check(tmp_path / "gptq"), False)


def test_a_quantiser_that_completes_the_names_of_gpt2_and_writes_its_settings(tmp_path):
    base, cut, gptq = (tmp_path / name for name in ("base", "cut", "gptq"))
    tiny_model("gpt2").transformer.save_pretrained(base)  # without the head: names begin with h.
    edit_config = json.loads((base / "config.json").read_text()) | {"architectures": ["GPT2LMHeadModel"]}
    (base / "config.json").write_text(json.dumps(edit_config))
    assert main(["prune", str(base), str(cut), "--drop-layers", "2,5"]) == 0
    shutil.copytree(cut, gptq)
    (gptq / "lineage.json").unlink()
    tensors = {f"transformer.{name}": tensor for name, tensor in load_file(cut / "model.safetensors").items()}
    module = "transformer.h.3.mlp.c_fc"
    del tensors[f"{module}.weight"]
    tensors |= {f"{module}.qweight": torch.ones(2, 2, dtype=torch.int32), f"{module}.scales": torch.ones(2)}
    save_file(tensors, gptq / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "gptq", "bits": 4}
    (gptq / "config.json").write_text(
        json.dumps(json.loads((cut / "config.json").read_text()) | {"quantization_config": settings})
    )
    (gptq / "quantize_config.json").write_text(json.dumps(settings))
    record_quantized(cut, gptq)
    found = check(gptq)
    assert found.verdict.startswith("IN PART"), said(found)
    assert found.recorded == {"quantize": 2}


def test_a_quantised_model_without_its_record_is_told_the_way_out(place, tmp_path):
    folder = quantise(place / "cut", tmp_path / "q")
    assert "record_quantized" in said(check(folder), False)
    shutil.copyfile(place / "cut" / "lineage.json", folder / "lineage.json")
    assert "record_quantized" in said(check(folder), False)


@pytest.mark.parametrize(
    ("prepare", "says"),
    [
        (lambda place, q: (place / "base", q), "lineage.json"),
        (lambda place, q: (place / "cut", place / "cut"), "has a lineage.json already"),
        (lambda place, q: (place / "nf4", q), "is quantised already"),
        (lambda place, q: (place / "cut", place / "base"), "has no quantization_config"),
        (lambda place, q: (place / "cut", place / "none"), "is not a model folder"),
    ],
)
def test_what_can_not_be_recorded_is_refused(place, tmp_path, prepare, says):
    folder = quantise(place / "cut", tmp_path / "q")
    with pytest.raises(CheckpointError, match=says):
        record_quantized(*prepare(place, folder))


def test_a_cut_of_a_quantised_base(place, tmp_path, capsys):
    base, cut = quantise(place / "base", tmp_path / "base"), tmp_path / "cut"
    for options, code, says in (
        ("--check", 2, "--check can't compare the logits: a forward pass can repack quantised weights; leave it out"),
        (
            "--repair=refit",
            1,
            "quantised (bitsandbytes, nf4), and can't be repaired or healed; use the unquantised model\n",
        ),
        ("--repair=refit --adapter", 2, "the layers, and those of this model are quantised; leave it out"),
        (
            "--dtype=float32",
            2,
            "are quantised and stay so when they are loaded, so --dtype float32 can't convert them; leave it out",
        ),
    ):
        assert main(["prune", str(base), str(cut), "--drop-layers", "2", *options.split()]) == code
        told = capsys.readouterr().err
        assert says in told
        assert "calibrate" not in told, "refused before the model writes text"
        assert not cut.exists()
    assert main(["inspect", str(base)]) == 0
    told = capsys.readouterr().out
    assert told.count("the weights are quantised (bitsandbytes, nf4), and can't be repaired or healed") == 1
    assert "can be repaired by" not in told
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    assert "0 notes" not in said(check(cut))
    card = Card.from_records(Lineage.load(cut)).body()
    assert "a quantised transformers checkpoint, like its base (`bitsandbytes, nf4`)" in card
    assert "pip install transformers accelerate 'bitsandbytes>=0.50'" in card


needs_no_gpu = pytest.mark.skipif(
    installed_version("transformers") < Version("5.17"), reason="this transformers may need a GPU's packages for FP8"
)


def in_fp8(folder: Path, what: str = "proj") -> str:
    """A model whose projections, or those with a name, are in FP8, which a machine without a GPU unpacks in loading."""
    tiny_model("llama").to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    plain = [name.removesuffix(".weight") for name in tensors if "proj" in name and what not in name]
    for name in [name for name in tensors if what in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"] |= {"modules_to_not_convert": plain} if plain else {}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@needs_no_gpu
def test_a_repair_of_quantised_weights_is_refused_before_anything_is_copied(tmp_path, monkeypatch, capsys) -> None:
    """Where every weight that it could change is quantised, before the model is loaded."""
    words = ["prune", "BASE", str(tmp_path / "cut"), "--drop-layers", "2", "--repair", "linear"]
    words += ["--calibration-samples", "4", "--calibration-length", "8"]
    monkeypatch.setattr("hf_layerprune.stages.prune_writers.execute_plan", None)
    words[1] = in_fp8(tmp_path / "partly", "down_proj")
    assert main(words) == 1
    assert "down_proj.weight is F8_E4M3" in capsys.readouterr().err
    monkeypatch.setattr("hf_layerprune.stages.prune.prepare_dense", None)
    words[1] = in_fp8(tmp_path / "base")
    assert main(words) == 1
    error = capsys.readouterr().err
    assert "the weights are quantised (fp8), and can't be repaired" in error
    assert "prune BASE FOLDER --dtype bfloat16" in error  # which no other quantiser's weights can have


def test_a_check_of_quantised_weights_is_refused_before_anything_is_copied(
    place, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("hf_layerprune.stages.prune_writers.execute_plan", None)
    assert main(["prune", str(place / "nf4"), str(tmp_path / "cut"), "--drop-layers", "2", "--check"]) == 2
    assert "--check can't compare the logits" in capsys.readouterr().err


@needs_no_gpu
def test_an_adapter_whose_base_was_dequantised_in_loading_is_told_why_it_is_not_proven(tmp_path: Path) -> None:
    in_fp8(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop", "1", "--adapter"]) == 0
    found = verify(VerifyRequest(str(tmp_path / "cut")))
    assert not found.good
    lines = [line.text for line in found.lines if not line.good]
    assert any("and the base's is F8_E4M3" in line and "dequantised in loading" in line for line in lines), lines
