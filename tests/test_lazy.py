"""`load_pruned` gives what the cut in memory gives, and never touches a dropped layer's weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from hf_layerprune import CheckpointError, CutError, LayerDropConfig, UnsupportedModelError, drop_layers, prune_with
from hf_layerprune.cut import lazy
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.runtime.loading import load_base
from tests.cutting import cut_checkpoint
from tests.hub_server import HubServer, client_env
from tests.matrix import cuts, logits, realign
from tests.measure_models import write_gguf
from tests.tiny_models import EAGER, tiny_config, tiny_input, tiny_model

TYPES = (
    "llama", "gpt2", "gemma3", "gemma3n_text", "gemma4_text", "qwen3_moe", "mixtral", "deepseek_v3", "mamba2",
    "qwen2_moe", "nemotron_h", "bert", "mllama", "gpt_oss", "bloom",
)  # fmt: skip
DROP = [2, 6, 7]


def save(model_type: str, folder: Path, **kwargs):
    """A tiny model, also in the folder, in shards of 16 kB if asked for."""
    model = tiny_model(model_type)
    model.save_pretrained(folder, **kwargs)
    return model


def cut_in_memory(model, drop=DROP):
    drop_layers(model, drop)
    return model


def assert_same(model, reference) -> None:
    assert type(model) is type(reference)
    assert not model.training
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert torch.equal(logits(realign(model), tiny_input()), logits(realign(reference), tiny_input()))
    fields = [m.config.to_dict() | {"_name_or_path": None} for m in (model, reference)]
    assert fields[0] == fields[1]


@pytest.mark.parametrize("model_type", TYPES)
def test_equals_the_cut_in_memory(model_type, tmp_path):
    """In shards; the matrix proves it of single files."""
    dense = save(model_type, tmp_path, max_shard_size="16KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    drop = cuts(model_type, dense.config)["middle"]
    assert_same(load_pruned(tmp_path, drop, dtype=torch.float32, **EAGER), cut_in_memory(dense, drop))


def edit_json(path: Path, **fields) -> None:
    content = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in (content | fields).items() if v is not None}))


def edit_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = edit({name: tensor.clone() for name, tensor in tensors.items()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def shard_by_layers(folder: Path, layers) -> tuple[str, str]:
    """Split a checkpoint in two: what belongs to these layers, and the rest."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    inside = tuple(f"model.layers.{i}." for i in layers)
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    weight_map = {name: names[name.startswith(inside)] for name in tensors}
    for shard in names:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return names


# --- what is never read -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gemma3n_text"])
def test_the_shard_of_dropped_layers_may_be_absent(model_type, tmp_path):
    dense = save(model_type, tmp_path)
    drop = cuts(model_type, dense.config)["middle"]
    _, gone = shard_by_layers(tmp_path, drop)
    (tmp_path / gone).unlink()
    assert_same(load_pruned(tmp_path, drop, **EAGER), cut_in_memory(dense, drop))


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "gemma4_text"])
def test_no_dropped_tensor_is_sliced_or_read(model_type, tmp_path, monkeypatch):
    dense = save(model_type, tmp_path)
    drop = cuts(model_type, dense.config)["middle"]
    dropped = tuple(f"model.layers.{i}." for i in drop)

    def poison(tensors):
        return {n: t.fill_(float("nan")) if n.startswith(dropped) else t for n, t in tensors.items()}

    edit_tensors(tmp_path, poison)
    sliced, read = [], []

    class Slice:
        def __init__(self, name, piece):
            self.name, self.piece = name, piece

        def __getattr__(self, name):
            return getattr(self.piece, name)

        def __getitem__(self, index):
            read.append((self.name, index))
            return self.piece[index]

    class File:
        def __init__(self, *args, **kwargs):
            self.file = safe_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.__exit__(*exc)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def get_slice(self, name):
            sliced.append(name)
            return Slice(name, self.file.get_slice(name))

    monkeypatch.setattr(lazy, "safe_open", File)
    model = load_pruned(tmp_path, drop, **EAGER)
    assert len(sliced) == len(set(sliced)) == len({name for name, _ in read})
    assert not [name for name in sliced if name.startswith(dropped)]
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    width = 8  # of a layer's piece of the tensors beside the layers
    columns = [index[1] for name, index in read if name.endswith("embed_tokens_per_layer.weight")]
    wanted = [i for run in columns for i in range(run.start // width, run.stop // width)]
    assert wanted == ([i for i in range(8) if i not in drop] if "gemma" in model_type else [])


def test_nothing_is_opened_before_the_cut_is_checked(tmp_path, monkeypatch):
    save("llama", tmp_path)
    monkeypatch.setattr(lazy, "safe_open", None)
    with pytest.raises(CutError, match=r"drop_layers has 8, but the model's layers are 0\.\.7"):
        load_pruned(tmp_path, [8])
    with pytest.raises(CutError, match="more than once"):
        load_pruned(tmp_path, [1, 1])
    with pytest.raises(CutError, match="drop_layers is empty"):
        load_pruned(tmp_path, [])


def test_layers_that_draft_further_tokens_go(tmp_path):
    dense = tiny_model("deepseek_v3")
    dense.config.num_nextn_predict_layers = 1  # a field of the class from a later version of transformers on
    dense.save_pretrained(tmp_path)
    extra = {"eh_proj.weight": torch.ones(2, 2), "self_attn.o_proj.weight": torch.ones(2, 2)}
    edit_tensors(tmp_path, lambda tensors: tensors | {f"model.layers.8.{n}": t for n, t in extra.items()})
    assert_same(load_pruned(tmp_path, DROP, **EAGER), cut_in_memory(dense))


@pytest.mark.parametrize(("model_type", "stem"), [("gpt_neo", "attn.attention"), ("gpt2", "attn")])
def test_masks_that_were_saved_with_each_layer_are_ignored(model_type, stem, tmp_path):
    dense = cut_in_memory(save(model_type, tmp_path / "base"))
    masks = {f"transformer.h.{i}.{stem}.{name}": torch.ones(1) for i in range(8) for name in ("bias", "masked_bias")}
    edit_tensors(tmp_path / "base", lambda tensors: tensors | {name: mask.clone() for name, mask in masks.items()})
    cut_checkpoint(tmp_path / "base", tmp_path / "cut", DROP)
    assert_same(load_pruned(tmp_path / "base", DROP, **EAGER), dense)
    assert_same(load_base(tmp_path / "cut", **EAGER), dense)


@pytest.mark.parametrize("in_file", [True, False])
def test_tied_heads(in_file, tmp_path):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    dense = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    dense.save_pretrained(tmp_path)
    if in_file:
        edit_tensors(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    model = load_pruned(tmp_path, DROP, **EAGER)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, cut_in_memory(dense))


def test_text_part_of_a_larger_model(tmp_path):
    transformers.MllamaForConditionalGeneration(tiny_config("mllama")).save_pretrained(tmp_path)
    whole = transformers.AutoModelForMultimodalLM.from_pretrained(tmp_path, **EAGER)
    assert_same(load_pruned(tmp_path, DROP, **EAGER), cut_in_memory(whole))
    edit_json(tmp_path / "config.json", architectures=["MllamaForCausalLM"])
    dense = AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)
    assert_same(load_pruned(tmp_path, DROP, **EAGER), cut_in_memory(dense))


# --- what from_pretrained takes ---------------------------------------------------------------------------


def test_dtype(tmp_path):
    dense = tiny_model("llama").to(torch.bfloat16)
    dense.save_pretrained(tmp_path)
    assert load_pruned(tmp_path, DROP).dtype == torch.bfloat16
    assert load_pruned(tmp_path, DROP, dtype="auto").dtype == torch.bfloat16
    assert load_pruned(tmp_path, DROP, dtype="float32").dtype == torch.float32
    model = load_pruned(tmp_path, DROP, dtype=torch.bfloat16, **EAGER)
    assert_same(model, cut_in_memory(AutoModelForCausalLM.from_pretrained(tmp_path, **EAGER)))
    edit_json(tmp_path / "config.json", dtype=None)
    assert load_pruned(tmp_path, DROP).dtype == AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


def test_what_comes_with_the_weights(tmp_path):
    dense = save("qwen3_moe", tmp_path)
    dense.generation_config.update(temperature=0.25, do_sample=True)
    dense.generation_config.save_pretrained(tmp_path)
    model = load_pruned(tmp_path, DROP, attn_implementation="eager", experts_implementation="batched_mm")
    assert model.config._attn_implementation == "eager"
    assert model.config._experts_implementation == "batched_mm"
    assert model.generation_config.temperature == 0.25
    assert model.name_or_path == model.config._name_or_path == str(tmp_path)
    assert model.config._commit_hash is None
    assert load_pruned(tmp_path, DROP, use_cache=False, revision=None, token=None).config.use_cache is False
    assert load_pruned(tmp_path, lambda config: [config.num_hidden_layers - 1]).config.num_hidden_layers == 7
    assert load_pruned(tmp_path, lambda config: []).config.num_hidden_layers == 8


ON_DISK = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"} | {
    f"model.layers.{i}": "disk" if i == 4 else "cpu" for i in range(5)
}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, ON_DISK], ids=["cpu", "auto", "dict", "disk"])
def test_device_map(device_map, tmp_path):
    dense = cut_in_memory(save("llama", tmp_path / "base"))
    model = load_pruned(
        tmp_path / "base",
        DROP,
        device_map=device_map,
        offload_folder=tmp_path / "off",
        low_cpu_mem_usage=True,
        **EAGER,
    )
    assert torch.allclose(logits(model, tiny_input()), logits(dense, tiny_input()), atol=1e-6)
    assert (tmp_path / "off").exists() == ("disk" in str(device_map))


def test_a_loader_that_takes_no_slices(tmp_path, monkeypatch):
    dense = save("gemma3n_text", tmp_path)
    monkeypatch.setattr(lazy, "is_deepspeed_zero3_enabled", lambda: True)
    drop = cuts("gemma3n_text", dense.config)["middle"]
    assert_same(load_pruned(tmp_path, drop, **EAGER), cut_in_memory(dense, drop))


def test_remote_code_is_not_run(tmp_path):
    save("llama", tmp_path)
    (tmp_path / "modeling_mine.py").write_text("raise SystemExit")
    edit_json(tmp_path / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine"})
    assert not hasattr(load_pruned(tmp_path, DROP).config, "auto_map")
    with pytest.raises(CheckpointError, match="trust_remote_code can't be passed"):
        load_pruned(tmp_path, DROP, trust_remote_code=True)


# --- errors -----------------------------------------------------------------------------------------------


def test_incomplete_and_foreign_weights(tmp_path):
    save("llama", tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.3.mlp.up_proj.weight"
    edit_tensors(tmp_path, lambda tensors: {n: t for n, t in whole.items() if n != lost})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight .*incomplete"):
        load_pruned(tmp_path, DROP)
    load_pruned(tmp_path, [3])
    edit_tensors(tmp_path, lambda tensors: whole | {f"model.odd.{i}": torch.ones(1) for i in range(5)})
    with pytest.raises(CheckpointError, match=r"no place for: model\.odd\.0, model\.odd\.1, model\.odd\.2 and 2 more"):
        load_pruned(tmp_path, DROP)
    edit_tensors(tmp_path, lambda tensors: whole | {lost: torch.ones(3, 3)})
    with pytest.raises(
        CheckpointError, match=r"has weights whose shapes differ from the model's: model.layers.2.mlp.up_proj"
    ):
        load_pruned(tmp_path, DROP)
    with pytest.raises(CheckpointError, match=r"shapes differ from the model's: model\.layers\.2\.mlp"):
        load_pruned(tmp_path, DROP, ignore_mismatched_sizes=True)
    edit_tensors(tmp_path, lambda tensors: {n: t for n, t in whole.items() if ".layers.7." not in n})
    with pytest.raises(UnsupportedModelError, match="config describes 8 decoder layers"):
        load_pruned(tmp_path, [7])


def test_a_damaged_file(tmp_path):
    save("llama", tmp_path)
    kept, _ = shard_by_layers(tmp_path, DROP)
    (tmp_path / kept).write_bytes(b"\x00" * 7)
    with pytest.raises(CheckpointError, match="is not a valid safetensors file"):
        load_pruned(tmp_path, DROP)


def test_no_such_weights(tmp_path):
    dense = save("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_pruned(tmp_path, DROP)
    torch.save(dense.state_dict(), tmp_path / "pytorch_model.bin")
    for load in (
        lambda: load_pruned(tmp_path, DROP),
        lambda: prune_with(LayerDropConfig(base_model_name_or_path=str(tmp_path))),
        lambda: prune_with(LayerDropConfig(base_model_name_or_path=str(tmp_path), keep_dropped=True)),
    ):
        with pytest.raises(
            CheckpointError,
            match=r"no file named model\.safetensors|only pickled weights .*convert them to safetensors",
        ):
            load()
    write_gguf(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is a GGUF file, which is not loaded cut"):
        load_pruned(tmp_path / "model.gguf", DROP)
    for option in ({"gguf_file": "model.gguf"}, {"variant": "fp16"}):
        with pytest.raises(CheckpointError, match=f"{next(iter(option))} can't be passed"):
            load_pruned(tmp_path, DROP, **option)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_pruned(tmp_path / "nowhere", DROP)
    with pytest.raises(CheckpointError, match=r"org/nowhere.* is not in the cache, and the Hub can't be reached"):
        load_pruned("org/nowhere", DROP)


# --- the Hub ----------------------------------------------------------------------------------------------

CLIENT = """
import os, socket, torch
from hf_layerprune.cut.lazy import load_pruned
torch.set_num_threads(1)
for kwargs in ({}, {"local_files_only": True}):
    model = load_pruned("org/tiny", [2, 6, 7], attn_implementation="eager", **kwargs)
    print(model.config._commit_hash, model.name_or_path, sum(p.double().sum().item() for p in model.parameters()))
    socket.socket.connect = socket.socket.send = socket.socket.sendall = lambda *words: os._exit(3)  # no more requests
"""


def test_only_shards_that_stay_are_downloaded(tmp_path):
    dense = cut_in_memory(save("llama", tmp_path / "repo"))
    kept, gone = shard_by_layers(tmp_path / "repo", DROP)
    with HubServer({"org/tiny": tmp_path / "repo"}) as hub:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT], env=client_env(hub, tmp_path / "home"), capture_output=True, text=True,
            timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert hub.bytes_served(kept) == (tmp_path / "repo" / kept).stat().st_size
        assert hub.bytes_served(gone) == 0
    downloaded, cached = (line.split() for line in done.stdout.splitlines()[-2:])
    assert downloaded == cached
    commit, name, total = downloaded
    assert len(commit) == 40
    assert name == "org/tiny"
    assert float(total) == pytest.approx(sum(p.double().sum().item() for p in dense.parameters()))
