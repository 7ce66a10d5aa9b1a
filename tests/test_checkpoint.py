"""Cutting checkpoints on disk: the same tensors, names and logits as a cut in memory, over the architectures."""

import copy
import json
import logging
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from hf_layerprune.cut.disk import plan_cut
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.cut.memory import drop_layers
from hf_layerprune.errors import CheckpointError, CutError, UnsupportedModelError
from hf_layerprune.runtime.loading import load_base

from .cutting import cut_checkpoint
from .matrix import cuts, logits
from .tiny_models import EAGER, tiny_input, tiny_model

TYPES = (
    "llama", "gpt2", "bert", "qwen3_moe", "gemma3", "gemma3n_text", "gemma4_text", "mixtral", "gpt_neo", "deepseek_v3",
    "nemotron_h", "mamba2", "qwen2_moe", "jamba", "qwen2", "phi3",
)  # fmt: skip
RELOADED = ("_name_or_path", "transformers_version")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file; an index must name exactly these."""
    found, where = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not part.keys() & found.keys()
        found |= part
        where |= dict.fromkeys(part, path.name)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        assert content["weight_map"] == where
        assert content["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    return found


def assert_same(mine: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert sorted(mine) == sorted(wanted)
    for name, tensor in wanted.items():
        assert mine[name].dtype == tensor.dtype, name
        assert torch.equal(mine[name], tensor), name


def plain(config) -> dict:
    return {name: value for name, value in config.to_dict().items() if name not in RELOADED}


@pytest.mark.parametrize("model_type", TYPES)
def test_a_cut_on_disk_is_a_cut_in_memory(tmp_path, model_type):
    """In shards; the matrix proves it of single files."""
    torch.set_num_threads(1)
    dense = tiny_model(model_type)
    base = tmp_path / "base"
    dense.save_pretrained(base, max_shard_size="40KB")
    assert not (base / "model.safetensors").exists()
    for name, dropped in cuts(model_type, dense.config).items():
        target, saved = tmp_path / name, tmp_path / f"saved-{name}"
        plan = cut_checkpoint(base, target, dropped)
        assert plan.cut.drop == dropped

        model = copy.deepcopy(dense)
        drop_layers(model, dropped)
        model.save_pretrained(saved)
        assert_same(tensors(target), tensors(saved))
        config = AutoConfig.from_pretrained(target)
        assert plain(config) == plain(AutoConfig.from_pretrained(saved))
        assert (
            json.loads((base / "config.json").read_text()).keys()
            <= json.loads((target / "config.json").read_text()).keys()
        )

        loader = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else type(dense)
        again, info = loader.from_pretrained(target, dtype=torch.float32, output_loading_info=True, **EAGER)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        for parameter in again.parameters():
            parameter.data = parameter.data.clone()  # mapped weights are aligned differently, and kernels may round so
        assert torch.equal(logits(again.eval(), tiny_input()), logits(model, tiny_input()))


# --- a hand-made checkpoint: everything that may lie in one ---------------------------------------------------

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 4, "hidden_size": 16,
    "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32,
    "max_position_embeddings": 64, "torch_dtype": "bfloat16", "rope_theta": 500000.0, "rope_scaling": None,
    "tie_word_embeddings": True, "use_cache": True, "a_note": {"from": "the maker"},
}  # fmt: skip


def layer(i: int, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    square = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    weights = {
        **{f"{name}.weight": torch.randn(16, 16, generator=generator).bfloat16() for name in square},
        "mlp.gate_proj.weight": torch.randn(24, 16, generator=generator).bfloat16(),
        "mlp.up_proj.weight": torch.randn(24, 16, generator=generator).bfloat16(),
        "mlp.down_proj.weight": torch.randn(16, 24, generator=generator).to(torch.float8_e4m3fn),
        "self_attn.rotary_emb.inv_freq": torch.randn(1, generator=generator),  # as old checkpoints have it
        "input_layernorm.weight": torch.randn(16, generator=generator),
        "post_attention_layernorm.weight": torch.randn(16, generator=generator),
        **extra,
    }
    return {f"model.layers.{i}.{name}": tensor for name, tensor in weights.items()}


def make(folder: Path, shards: list[dict[str, torch.Tensor]], config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or LLAMA))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt", "note": 'a "quoted" ü'})
        return folder
    weight_map = {}
    for number, part in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt", "shard": str(number)})
        weight_map |= dict.fromkeys(part, name)
    everything = [tensor for part in shards for tensor in part.values()]
    metadata = {
        "total_size": sum(t.nbytes for t in everything),
        "total_parameters": sum(t.numel() for t in everything),
        "maker": "me",
    }
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


EMBED = {"model.embed_tokens.weight": torch.arange(512.0).reshape(32, 16).bfloat16()}
NORM = {"model.norm.weight": torch.ones(16)}


def sharded(folder: Path, config: dict | None = None) -> Path:
    return make(folder, [EMBED | layer(0), layer(1), layer(2), layer(3) | NORM], config)


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def test_shards_keep_their_grouping_and_are_numbered_anew(tmp_path):
    plan = cut_checkpoint(sharded(tmp_path / "base"), tmp_path / "cut", [1])
    target = tmp_path / "cut"
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [metadata_of(target / name)["shard"] for name in files] == ["1", "3", "4"]
    wanted = EMBED | layer(0) | NORM
    for old, new in ((2, 1), (3, 2)):
        wanted |= {name.replace(f".{old}.", f".{new}."): tensor for name, tensor in layer(old).items()}
    assert_same(tensors(target), wanted)
    assert plan.tensor_names["model.layers.3.input_layernorm.weight"] == "model.layers.2.input_layernorm.weight"
    assert plan.layer_prefix == "model.layers."
    metadata = json.loads((target / "model.safetensors.index.json").read_text())["metadata"]
    assert metadata["maker"] == "me"
    assert "total_parameters" not in metadata
    # What was promised is what was written.
    assert plan.target_bytes == sum(path.stat().st_size for path in target.rglob("*") if path.is_file())


def test_one_file_stays_one_file_with_its_notes(tmp_path):
    base = make(tmp_path / "base", [EMBED | layer(0) | layer(1) | layer(2) | layer(3) | NORM])
    cut_checkpoint(base, tmp_path / "cut", [0, 2])
    names = sorted(path.name for path in (tmp_path / "cut").iterdir())
    assert names == ["config.json", "model.safetensors"]
    assert metadata_of(tmp_path / "cut/model.safetensors") == {"format": "pt", "note": 'a "quoted" ü'}
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert config["num_hidden_layers"] == 2
    assert config["layer_drop"] == {"drop_layers": [0, 2], "num_base_layers": 4}
    assert config.keys() >= LLAMA.keys()
    assert {name: config[name] for name in ("torch_dtype", "rope_theta", "a_note", "use_cache")} == {
        name: LLAMA[name] for name in ("torch_dtype", "rope_theta", "a_note", "use_cache")
    }


def test_a_stale_layer_count_under_another_name_does_not_survive(tmp_path):
    dense = tiny_model("gpt2")
    dense.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base/config.json").read_text()) | {"num_hidden_layers": 8}
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    cut_checkpoint(tmp_path / "base", tmp_path / "cut", [7])
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert (config["n_layer"], config["num_hidden_layers"]) == (7, 7)


def test_tensors_stay_aligned_when_odd_ones_before_them_go(tmp_path):
    odd = [layer(i, **{"self_attn.rotary_emb.inv_freq": torch.full((3,), i, dtype=torch.uint8)}) for i in range(4)]
    base = tmp_path / "base"
    make(base, [EMBED | NORM | odd[0] | odd[1] | odd[2] | odd[3]])
    # The safetensors library sorts by width; another writer may not.
    path = base / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    notes = header.pop("__metadata__")
    order = sorted(header, key=lambda name: (not name.endswith("inv_freq"), name))
    order.insert(4, order.pop())
    data, entries = b"", {}
    for name in order:
        start, end = header[name]["data_offsets"]
        entries[name] = header[name] | {"data_offsets": [len(data), len(data) + end - start]}
        data += raw[8 + length + start : 8 + length + end]
    text = json.dumps({"__metadata__": notes} | entries).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    before = tensors(base)
    cut_checkpoint(base, tmp_path / "cut", [1])
    raw = (tmp_path / "cut/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    header = json.loads(raw[8 : 8 + length])
    width = {"BF16": 2, "F32": 4, "U8": 1, "F8_E4M3": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert entry["data_offsets"][0] % width[entry["dtype"]] == 0, name
    plan = plan_cut(base, [1])
    assert_same(tensors(tmp_path / "cut"), {new: before[old] for old, new in plan.tensor_names.items()})


def test_layers_for_multi_token_prediction_are_dropped_too(tmp_path, caplog):
    drafts = layer(4, eh_proj=torch.ones(2)) | {"mtp.norm.weight": torch.ones(2)}
    shard = EMBED | layer(0) | layer(1) | layer(2) | layer(3) | NORM | drafts
    with caplog.at_level(logging.INFO):
        base = make(tmp_path / "base", [shard], LLAMA | {"num_nextn_predict_layers": 1})
        cut_checkpoint(base, tmp_path / "cut", [3])
    assert f"{len(drafts)} tensors of layers for multi-token prediction are dropped too" in caplog.text
    assert_same(tensors(tmp_path / "cut"), EMBED | NORM | layer(0) | layer(1) | layer(2))


def test_the_other_files_of_a_model_go_along(tmp_path):
    base = sharded(tmp_path / "base")
    goes = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "LICENSE",
            "NOTICE", "USE_POLICY.md", "merges.txt", "tokenizer.model", "additional_chat_templates/rag.jinja",
            "additional_chat_templates/.x.jinja", "MODEL_LICENSE", "third_party_notices.txt", "Model License.pdf",
            "spm.model", "own.tiktoken", "tekken.json", "tokenizer.model.v3", "tokenizer.4.0.json", "nmt.spm"]  # fmt: skip
    stays = ["README.md", "pytorch_model.bin", "pytorch_model.bin.index.json", "a.pt", "a.pth", "a.gguf", "metrics.json",
             "consolidated.00.pth", "consolidated.safetensors", "original/params.json", ".git/config", ".gitattributes",
             "optimizer.pt", "training_args.bin", "trainer_state.json", "rng_state.pth", "params.json",
             "model.fp16.safetensors", "onnx/model.onnx", "model.safetensors.index.fp16.json", "modeling_mine.py",
             "notes.txt", "all_results.json", "SECURITY.md"]  # fmt: skip
    for name in goes + stays:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    (base / "blob").write_text("from elsewhere in the folder")
    (base / "vocab.txt").symlink_to("blob")
    cut_checkpoint(base, tmp_path / "cut", [1])
    target = tmp_path / "cut"
    found = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    weights = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert found == {*goes, *weights, "vocab.txt", "config.json", "model.safetensors.index.json"}
    assert (target / "vocab.txt").read_text() == "from elsewhere in the folder"
    assert not (target / "vocab.txt").is_symlink()
    assert (target / "LICENSE").read_text() == "LICENSE"
    cut_checkpoint(base, target, [1], force=True)  # none of them may be somebody's own


def test_an_index_without_metadata_gets_it_as_transformers_does_not_load_it_otherwise(tmp_path):
    index = sharded(tmp_path / "base") / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"]}))
    cut_checkpoint(tmp_path / "base", tmp_path / "cut", [1])
    assert len(tensors(tmp_path / "cut")) == 2 + 3 * len(layer(0))  # also checks the metadata


def test_what_a_config_says_about_the_files_of_the_base_does_not_survive(tmp_path):
    """Which of them are its weights is heeded, on disk and while loading."""
    dense, base = tiny_model("llama"), tmp_path / "base"
    dense.save_pretrained(base)
    (base / "model.safetensors").rename(base / "own.safetensors")
    tiny_model("llama", 1).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", base)
    code = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    about = {"_name_or_path": "/home/me/base", "auto_map": code, "transformers_weights": "own.safetensors"}
    config = json.loads((base / "config.json").read_text()) | about
    (base / "config.json").write_text(json.dumps(config))
    cut_checkpoint(base, tmp_path / "cut", [1])
    assert not about.keys() & json.loads((tmp_path / "cut/config.json").read_text()).keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", **EAGER)
    lazy = load_pruned(base, [1], **EAGER)
    drop_layers(dense, [1])
    whole = load_base(base, **EAGER)
    drop_layers(whole, [1])
    for number, model in enumerate((again, lazy, whole)):
        assert_same(dict(model.state_dict()), dict(dense.state_dict()))
        model.save_pretrained(tmp_path / f"{number}")
        assert not about.keys() & json.loads((tmp_path / f"{number}/config.json").read_text()).keys()
    (base / "own.safetensors").unlink()
    for read in (plan_cut, load_pruned):
        with pytest.raises(CheckpointError, match=r"has no 'own\.safetensors', which its config names as its weights"):
            read(base, [1])


def test_a_folder_of_links_as_the_hub_cache_has_is_read_and_never_written_to(tmp_path):
    real, base = sharded(tmp_path / "real"), tmp_path / "snapshots/abc"
    (tmp_path / "blobs").mkdir()
    base.mkdir(parents=True)
    for number, path in enumerate(sorted(real.iterdir())):
        shutil.move(path, tmp_path / f"blobs/{number}")
        (base / path.name).symlink_to(f"../../blobs/{number}")
    before = {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()}
    cut_checkpoint(base, tmp_path / "cut", [2])
    assert not any(path.is_symlink() for path in (tmp_path / "cut").iterdir())
    assert len(tensors(tmp_path / "cut")) == 2 + 3 * len(layer(0))
    assert {path.name: path.read_bytes() for path in (tmp_path / "blobs").iterdir()} == before
    # Linking takes the file, not the link.
    cut_checkpoint(base, tmp_path / "linked", [2], link=True)
    assert not any(path.is_symlink() for path in (tmp_path / "linked").iterdir())
    assert_same(tensors(tmp_path / "linked"), tensors(tmp_path / "cut"))


def test_whole_shards_are_linked_on_demand_only(tmp_path):
    base = sharded(tmp_path / "base")
    for name, link in (("copied", False), ("linked", True)):
        cut_checkpoint(base, tmp_path / name, [2], link=link)
        shared = [
            (base / f"model-0000{old}-of-00004.safetensors").samefile(
                tmp_path / name / f"model-0000{new}-of-00003.safetensors"
            )
            for old, new in ((1, 1), (2, 2), (4, 3))
        ]
        assert shared == [link, link, False]
    assert_same(tensors(tmp_path / "linked"), tensors(tmp_path / "copied"))


def test_links_across_file_systems_are_refused(tmp_path):
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    base = sharded(tmp_path / "base")
    with tempfile.TemporaryDirectory(dir=elsewhere) as folder:
        target = Path(folder) / "cut"
        with pytest.raises(CheckpointError, match=r"could not write .*: Invalid cross-device link"):
            cut_checkpoint(base, target, [3], link=True)
        assert not target.exists()
        cut_checkpoint(base, target, [3])  # copying works
        assert len(tensors(target)) == 2 + 3 * len(layer(0))


def test_slices_of_wide_tensors_are_exact(tmp_path):
    tiny_model("gemma4_text").save_pretrained(tmp_path / "base")
    old = tensors(tmp_path / "base")["model.embed_tokens_per_layer.weight"]
    cut_checkpoint(tmp_path / "base", tmp_path / "cut", (1, 2, 6))
    wanted = old.reshape(old.shape[0], 8, -1)[:, [0, 3, 4, 5, 7]].reshape(old.shape[0], -1)
    assert torch.equal(tensors(tmp_path / "cut")["model.embed_tokens_per_layer.weight"], wanted)


def test_wide_tensors_that_do_not_fit_are_refused(tmp_path):
    tiny_model("gemma4_text").save_pretrained(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    good = load_file(path)
    name = "model.embed_tokens_per_layer.weight"
    save_file(good | {name: good[name][:, :-8].contiguous()}, path)
    with pytest.raises(CheckpointError, match=r"the config wants 8 layers of 8 along dimension 1"):
        plan_cut(tmp_path / "base", [1])
    save_file(good | {"model.per_layer_model_projection.weight_scale": torch.ones(64)}, path)
    with pytest.raises(CheckpointError, match="not known how to slice it"):
        plan_cut(tmp_path / "base", [1])


@pytest.mark.parametrize("layout", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_quantised_layouts_are_bytes_like_any_other(tmp_path, layout):
    suffixes = {
        "gptq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32},
        "awq": {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16},
        "bitsandbytes": {"weight": torch.uint8, "weight.absmax": torch.uint8, "weight.quant_map": torch.float32,
                         "weight.nested_absmax": torch.float32, "weight.quant_state.bitsandbytes__nf4": torch.uint8},
        "compressed-tensors": {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
    }[layout]  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def packed(i: int) -> dict[str, torch.Tensor]:
        return {
            f"model.layers.{i}.mlp.up_proj.{suffix}": torch.randint(0, 100, (7, i + 3), generator=generator).to(dtype)
            for suffix, dtype in suffixes.items()
        } | {f"model.layers.{i}.{norm}_layernorm.weight": torch.ones(16) for norm in ("input", "post_attention")}

    layers = [packed(i) for i in range(4)]
    settings = {"quant_method": layout, "bits": 4, "modules_to_not_convert": ["lm_head", "model.layers.3.mlp"]}
    if layout == "compressed-tensors":
        settings = {"quant_method": layout, "ignore": ["re:.*lm_head", "model.layers.3.mlp"]}
    base = make(tmp_path / "base", [EMBED | layers[0] | layers[1], layers[2] | layers[3] | NORM],
                LLAMA | {"quantization_config": settings})  # fmt: skip
    (base / "quantize_config.json").write_text(json.dumps({"modules": {"model.layers.3.mlp": {}}, "bits": 4}))
    cut_checkpoint(base, tmp_path / "cut", [1])
    wanted = EMBED | NORM | layers[0]
    for old, new in ((2, 1), (3, 2)):
        wanted |= {name.replace(f"layers.{old}.", f"layers.{new}."): t for name, t in layers[old].items()}
    assert_same(tensors(tmp_path / "cut"), wanted)
    config = json.loads((tmp_path / "cut/config.json").read_text())["quantization_config"]
    if layout == "compressed-tensors":
        assert config["ignore"] == ["re:.*lm_head", "model.layers.2.mlp"]
    else:
        assert config["modules_to_not_convert"] == ["lm_head", "model.layers.2.mlp"]
    beside = json.loads((tmp_path / "cut/quantize_config.json").read_text())
    assert beside == {"modules": {"model.layers.2.mlp": {}}, "bits": 4}


def test_what_can_not_be_cut_is_refused_before_anything_is_written(tmp_path):
    base = sharded(tmp_path / "base")
    for drop, error, match in (
        ([4], CutError, r"drop_layers has 4, but the model's layers are 0\.\.3"),
        ([], CutError, "nothing would be dropped"),
        ([1.0], CutError, "not a layer index"),
        ([True], CutError, "not a layer index"),
        ([0, 1, 2, 3], CutError, "at least one must stay"),
    ):
        with pytest.raises(error, match=match) as caught:
            cut_checkpoint(base, tmp_path / "cut", drop)
        assert "\n" not in str(caught.value)
    for change, error, match in (
        ({"model_type": "rwkv"}, UnsupportedModelError, "rwkv"),
        ({"model_type": "no_such"}, CheckpointError, "no_such"),
        ({"some_layers": [1, 2, 3, 4]}, CutError, "some_layers"),
        ({"num_hidden_layers": 5}, UnsupportedModelError, "the config describes 5 decoder layers"),
        ({"num_hidden_layers": "many"}, CheckpointError, "config"),
        ({"quantization_config": {"quant_method": "x", "ignore": [r"re:.*\.3\..*"]}}, CutError, "rewritten exactly"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, CheckpointError, "config"),
    ):
        (base / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        (base / "config.json").write_text(json.dumps(LLAMA | change))
        with pytest.raises(error, match=match) as caught:
            cut_checkpoint(base, tmp_path / "cut", [1])
        assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
