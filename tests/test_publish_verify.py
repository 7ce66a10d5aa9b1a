"""`verify` says yes to what matches its records, and of what was tampered with, which and what."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_layerprune import LayerDropConfig, prune_with
from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.heal.stage import write_healed
from hf_layerprune.heal.student import Student
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify import verdict
from hf_layerprune.publish.verify.rebuild import WeightFile, notes_in
from hf_layerprune.publish.verify.verdict import Verification
from hf_layerprune.records.fingerprints import fingerprint, sha256_of, weights_hash
from hf_layerprune.records.history import read_history
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.stages.train import record_trained

from .measure_models import write_gguf
from .multimodal_makers import write_llava
from .publish_records import measure_by_hand
from .tiny_models import tiny_model

Q3, Q4 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in (3, 4))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of 8 layers, what is left of it without 2 and 5, and the same in one file."""
    place = tmp_path_factory.mktemp("verify")
    model = tiny_model("llama")
    model.save_pretrained(place / "base", max_shard_size="100KB")
    (place / "base" / "additional_chat_templates").mkdir()
    (place / "base" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 1 }}")
    model.save_pretrained(place / "single")
    for name in ("base", "single"):
        assert main(["prune", str(place / name), str(place / f"{name}-cut"), "--drop-layers", "2,5"]) == 0
    return place


@pytest.fixture
def cut(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "single-cut", tmp_path / "cut"))


def verify(model: Path, **more: Any) -> Verification:
    return verdict.verify(VerifyRequest(str(model), **more))


def said(found: Verification, good: bool | None = None) -> str:
    return "\n".join(f"{line.what}: {line.text}" for line in found.lines if good in (None, line.good))


def edit(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], *, record: dict[str, Any] | None = None
) -> None:
    """Change tensors; with a record, as a stage that says so."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if record is not None:
        Lineage.load(folder).record(folder, {"stage": "heal", "settings": {}} | record)


def claim(folder: Path) -> None:
    """Make a folder's lineage say that its weights are those of its last stage."""
    lineage = Lineage.load(folder)
    lineage.entries[-1]["weights"] = weights_hash(fingerprint(folder))
    lineage.write(folder)


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def flip(folder: Path, name: str, element: int = 0, bit: int = 1) -> None:
    """Turn one bit of one tensor in the file."""
    from hf_layerprune.cut.header import read_header

    path = folder / "model.safetensors"
    header = read_header(path)
    (tensor,) = (tensor for tensor in header.tensors if tensor.name == name)
    data = bytearray(path.read_bytes())
    data[header.data_start + tensor.start + 4 * element] ^= bit
    path.write_bytes(data)


# Yes.


@pytest.mark.parametrize("name", ["base-cut", "single-cut"])
def test_a_plain_cut(place: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(place / name)]) == 0
    out = capsys.readouterr().out
    assert "layers 2,5 of 8 dropped, 6 left (prune)" in out
    assert "57 are the base's, to the last bit" in out
    assert "README.md" not in out  # there is none
    assert (
        out.splitlines()[-1]
        == f"YES: {place / name} matches its records and its base, {place / name.removesuffix('-cut')}"
    )


def test_with_numbers_and_after_a_second_cut(place: Path, tmp_path: Path) -> None:
    assert main(["prune", str(place / "base-cut"), str(tmp_path / "again"), "--drop-layers", "0"]) == 0
    measure_by_hand(tmp_path / "again")
    found = verify(tmp_path / "again")
    assert found.good, said(found)
    assert "layers 0,2,5 of 8 dropped, 5 left (prune, prune)" in said(found)
    assert "metrics: 2 numbers, of this model" in said(found)


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_moe", "gemma3n_text", "gpt2"])
def test_other_architectures(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "1,2"]) == 0
    found = verify(tmp_path / "cut")
    assert found.good, said(found)


def test_weights_that_were_converted(place: Path, tmp_path: Path) -> None:
    words = ["--drop-layers", "2,5", "--dtype", "bfloat16"]
    assert main(["prune", str(place / "base"), str(tmp_path / "half"), *words]) == 0
    found = verify(tmp_path / "half")
    assert found.good, said(found)
    assert "57 are the base's, to the last bit" in said(found)
    flip(tmp_path / "half", Q3)
    claim(tmp_path / "half")
    found = verify(tmp_path / "half")
    assert f"tensors: {Q3} differs from the base's" in said(found, False)


@pytest.mark.parametrize(
    ("dtypes", "words"),
    [
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("bfloat16", "auto"), "bfloat16"),
        (("bfloat16", "float16", "float32"), "bfloat16, then float16, then float32"),
    ],
)
def test_weights_that_were_converted_in_several_cuts(
    place: Path, tmp_path: Path, dtypes: tuple[str, ...], words: str
) -> None:
    """Each conversion may round, so the last one alone would give other weights."""
    folder = place / "base"
    for number, dtype in enumerate(dtypes):
        source, folder = folder, tmp_path / str(number)
        assert main(["prune", str(source), str(folder), "--drop-layers", "2", "--dtype", dtype]) == 0
    found = verify(folder)
    assert found.good, said(found)
    assert f"converted to {words})" in said(found)
    flip(folder, Q3.replace(".3.", ".1."))
    claim(folder)
    assert not verify(folder).good


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    ("model_type", "first", "second"), [("ernie4_5_moe", "1,4,7", "0,2"), ("minicpm3", "5", "0,2-6")]
)
def test_a_config_that_two_cuts_leave_as_one_cut_would_not(
    model_type: str, first: str, second: str, dtype: str, tmp_path: Path
) -> None:
    """A period is fitted in each cut, or a scale is rounded."""
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "once"), "--drop-layers", first]) == 0
    words = ["--drop-layers", second, "--dtype", dtype]
    assert main(["prune", str(tmp_path / "once"), str(tmp_path / "twice"), *words]) == 0
    found = verify(tmp_path / "twice")
    assert found.good, said(found)


def test_a_converted_model_keeps_what_comes_with_its_weights(tmp_path: Path) -> None:
    """A processor, settings of generation, and a tokenizer's file as its maker wrote it, are copied as for a plain cut."""
    base, half = write_llava(tmp_path / "base"), tmp_path / "half"
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(tokenizer, indent=1))
    assert main(["prune", str(base), str(half), "--drop-layers", "3-4", "--dtype", "bfloat16"]) == 0
    beside = {path.name for path in base.iterdir()} - {"config.json", "model.safetensors"}
    assert "processor_config.json" in beside
    assert not [name for name in beside if (half / name).read_bytes() != (base / name).read_bytes()]
    found = verify(half)
    assert found.good, said(found)
    processor = (half / "processor_config.json").read_text()
    (half / "processor_config.json").write_text(processor.replace("16", "8", 1))
    claim(half)
    assert "processor_config.json" in said(verify(half), False)


def test_what_stages_changed_is_listed(cut: Path) -> None:
    names = [Q3, "model.layers.3.mlp.down_proj.weight", "model.norm.weight"]

    def train(tensors: dict[str, torch.Tensor]) -> None:
        for name in names[1:]:
            tensors[name] += 1

    edit(cut, train, record={"changed_tensors": names})
    found = verify(cut)
    assert found.consistent, said(found)
    assert not found.good
    assert found.recorded == {"heal": 2}  # and not q_proj, which is the base's
    assert "55 are the base's" in said(found)
    assert "lineage.json says that heal changed 2 tensors" in said(found)
    assert found.verdict.startswith(f"IN PART: the rest of {cut} is proven to follow from its base, ")
    assert "2 tensors (heal: 2) can't be derived again" in found.verdict
    assert main(["verify", str(cut)]) == 1
    assert main(["verify", str(cut), "--accept-trained"]) == 0


def test_training_may_save_another_type_of_float(cut: Path) -> None:
    edit(cut, lambda tensors: tensors.update({Q3: tensors[Q3].half()}), record={"changed_tensors": [Q3]})
    assert verify(cut, accept_trained=True).good


def test_names_follow_a_later_cut(cut: Path, tmp_path: Path) -> None:
    edit(cut, lambda tensors: tensors[Q3].add_(1), record={"changed_tensors": [Q3]})
    assert main(["prune", str(cut), str(tmp_path / "later"), "--drop-layers", "1"]) == 0
    found = verify(tmp_path / "later", accept_trained=True)
    assert found.good, said(found)
    assert "heal changed model.layers.2.self_attn.q_proj.weight" in said(found)


@pytest.mark.parametrize("model_type", ["granite_speech", "idefics2", "llava"])
def test_other_parts_that_were_trained_keep_their_names_in_a_later_cut(model_type: str, tmp_path: Path) -> None:
    """Whatever the lists of their layers are called."""
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    cut = load_base(tmp_path / "cut")
    decoder = find_decoder_layers(cut).path
    for name, parameter in cut.named_parameters():
        if not name.startswith(f"{decoder}.") or name.startswith(f"{decoder}.3."):
            parameter.data += 1
    cut.save_pretrained(tmp_path / "by-hand")
    record_trained(tmp_path / "cut", tmp_path / "by-hand", tmp_path / "trained")
    assert main(["prune", str(tmp_path / "trained"), str(tmp_path / "later"), "--drop-layers", "1"]) == 0
    found = verify(tmp_path / "later", accept_trained=True)
    assert found.good, said(found)
    assert read_history(Lineage.load_required(tmp_path / "later")).layers_changed("train") == {4}


def test_a_tensor_that_no_loader_reads(place: Path, tmp_path: Path) -> None:
    """Older checkpoints have it, and saving the model again leaves it out."""
    base, cut, name = (
        Path(shutil.copytree(place / "single", tmp_path / "base")),
        tmp_path / "cut",
        "rotary_emb.inv_freq",
    )
    edit(base, lambda tensors: tensors.update({f"model.layers.0.self_attn.{name}": torch.ones(4)}))
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    edit(cut, lambda tensors: [tensors.pop(one) for one in list(tensors) if one.endswith(name)])
    claim(cut)
    found = verify(cut)
    assert found.good, said(found)


def test_a_head_that_came_apart_from_the_embeddings(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop", "2"]) == 0
    assert verify(tmp_path / "cut").good

    def untie(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    edit(tmp_path / "cut", untie)
    claim(tmp_path / "cut")
    assert "tensors: lm_head.weight is not a tensor of the base" in said(verify(tmp_path / "cut"), False)
    lineage, config = Lineage.load(tmp_path / "cut"), tmp_path / "cut" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": False}))
    names = ["lm_head.weight", "model.norm.weight"]
    lineage.record(tmp_path / "cut", {"stage": "heal", "settings": {}, "changed_tensors": names})
    found = verify(tmp_path / "cut", accept_trained=True)
    assert found.good, said(found)


@pytest.mark.parametrize("same", [True, False])
def test_a_tied_head_that_the_base_stores_twice(same: bool, tmp_path: Path) -> None:
    """If it has values of its own, transformers does not tie it, so it may not be left out."""
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    head = tensors["model.embed_tokens.weight"] + (not same)
    save_file(tensors | {"lm_head.weight": head}, path, {"format": "pt"})
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop", "2"]) == 0
    edit(tmp_path / "cut", lambda tensors: tensors.pop("lm_head.weight"))  # as transformers saves it
    claim(tmp_path / "cut")
    found = verify(tmp_path / "cut")
    assert found.good == same, said(found)
    assert same or said(found, False) == "tensors: lm_head.weight is missing"


@pytest.mark.parametrize(("model_type", "module", "stored"), [
    ("mixtral", "experts.down_proj", r"\.1\."),
    ("qwen3_moe", "experts.down_proj", r"\.1\."),
    ("hy_v3", "experts.down_proj", r"\.1\."),
    ("ernie4_5_vl_moe", "vision_moe.experts.down_proj", r"experts\.\d"),
    ("sarvam_moe", "k_proj.weight", "query_key_value"),
    ("lara_mini", "in_proj_z.weight", r"in_proj\."),
])  # fmt: skip
def test_an_adapter_with_tensors_that_checkpoints_divide_or_join(
    model_type: str, module: str, stored: str, tmp_path: Path
) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    words = ["--drop-layers", "6-7", "--adapter", "--tune-layers", "3"]
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "small"), *words]) == 0
    found = verify(tmp_path / "small")
    assert found.good, said(found)
    path = tmp_path / "small" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith(module))
    tensors[name][1] += 1
    save_file(tensors, path)
    claim(tmp_path / "small")
    found = verify(tmp_path / "small", accept_trained=True)
    assert re.search(rf"layers\.\d\.\S*{stored}\S+ differs from the base's", said(found)), said(found)


@pytest.mark.parametrize("model_type", ["llava", "qwen3_moe"])
def test_a_repaired_adapter_of_a_model_with_other_names_on_disk(model_type: str, tmp_path: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    how = ["--repair", "linear", "--calibration-samples", "4", "--calibration-length", "32"]
    changed = []
    for form in ([], ["--adapter", "--tune-layers", "2"]):
        folder = tmp_path / f"cut{len(form)}"
        assert main(["prune", str(tmp_path / "base"), str(folder), "--drop-layers", "1,3-4", *how, *form]) == 0
        found = verify(folder, accept_trained=True)
        assert found.good, said(found)
        changed.append(Lineage.load_required(folder).entries[-1]["repair"]["changed_tensors"])
    assert changed[0] == changed[1]


def test_an_adapter(place: Path, tmp_path: Path) -> None:
    words = ["--drop-layers", "2,5", "--adapter", "--tune-layers", "1"]
    assert main(["prune", str(place / "base"), str(tmp_path / "small"), *words]) == 0
    found = verify(tmp_path / "small")
    assert found.good, said(found)
    path = tmp_path / "small" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    claim(tmp_path / "small")
    found = verify(tmp_path / "small", accept_trained=True)
    assert not found.good  # nobody says that it was trained
    lineage = Lineage.load(tmp_path / "small")
    names = [name.removeprefix("base_model.model.") for name in tensors]
    lineage.record(tmp_path / "small", {"stage": "heal", "settings": {}, "changed_tensors": names})
    found = verify(tmp_path / "small", accept_trained=True)
    assert found.good, said(found)
    assert found.recorded == {"heal": len(tensors)}
    save_file(tensors | {"base_model.model.model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}, path)
    claim(tmp_path / "small")
    found = verify(tmp_path / "small", accept_trained=True)
    assert "tensors: model.layers.0.mlp.up_proj.weight differs from the base's" in said(found, False)


def test_numbers_of_an_adapter_are_those_of_its_base_too(place: Path, tmp_path: Path) -> None:
    base, small = Path(shutil.copytree(place / "single", tmp_path / "base")), tmp_path / "small"
    assert main(["prune", str(base), str(small), "--drop-layers", "2", "--adapter", "--tune-layers", "1"]) == 0
    measure_by_hand(small)
    found = verify(small)
    assert found.good, said(found)
    (base / "chat_template.jinja").write_text("{{ 1 }}")
    assert "metrics: metrics.json" in said(verify(small), False)


@pytest.mark.parametrize(
    ("model_type", "dtype", "part"),
    [("gpt_oss", torch.float16, "input_layernorm"), ("kimi_linear", torch.bfloat16, "gate.e_score_correction_bias")],
)
def test_an_adapter_with_parts_that_transformers_keeps_in_float32(
    model_type: str, dtype: torch.dtype, part: str, tmp_path: Path
) -> None:
    """In memory, and so in the adapter, they are in float32; the base on disk has them in 16 bits."""
    tiny_model(model_type).to(dtype).save_pretrained(tmp_path / "base")
    words = ["--drop-layers", "2", "--adapter", "--tune-layers", "2"]
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "small"), *words]) == 0
    path = tmp_path / "small" / "adapter_model.safetensors"
    tensors = load_file(path)
    kept = next(name for name in tensors if part in name)
    assert tensors[kept].dtype == torch.float32
    found = verify(tmp_path / "small")
    assert found.good, said(found)
    tensors[kept][3] += 1e-5  # less than 16 bits tell apart
    save_file(tensors, path)
    claim(tmp_path / "small")
    assert re.search(rf"{part}\S* is F32\S+, and the base's is B?F16", said(verify(tmp_path / "small"), False))


@pytest.mark.parametrize(("model_type", "parts"), [
    ("mamba2", r"A_log|dt_bias"),
    ("qwen3_next", r"linear_attn\.A_log|experts\.1\.down_proj"),  # with other names in memory
])  # fmt: skip
def test_an_adapter_with_parts_that_transformers_rounds(model_type: str, parts: str, tmp_path: Path) -> None:
    """The base stores them in float32, though its config says 16 bits."""
    base, small = tmp_path / "base", tmp_path / "small"
    tiny_model(model_type).to(torch.bfloat16).save_pretrained(base)

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        wide = [name for name in tensors if re.search(parts, name)]
        assert {one for name in wide for one in re.findall(parts, name)} == {*parts.replace("\\", "").split("|")}
        tensors.update({name: tensors[name].float() + 1e-4 for name in wide})

    edit(base, widen)
    words = ["--drop-layers", "2", "--adapter", "--tune-layers", "4"]
    assert main(["prune", str(base), str(small), *words]) == 0
    found = verify(small)
    assert found.good, said(found)
    path = small / "adapter_model.safetensors"
    trained = load_file(path)
    name = next(name for name in trained if "A_log" in name)
    for value in (trained[name] + 0.5, trained[name].half()):  # another one, and rounded as the config does not say
        save_file(trained | {name: value}, path)
        claim(small)
        assert "A_log differs from the base's" in said(verify(small), False)


@pytest.mark.parametrize("rounded", [False, True])
def test_an_adapter_with_a_head_of_its_own(rounded: bool, tmp_path: Path) -> None:
    """Until it is trained, it has the values of the embeddings, to which it was tied, as they are loaded."""
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    if rounded:
        edit_config(tmp_path / "base", dtype="bfloat16")
    words = ["--drop-layers", "2", "--adapter", "--tune-lm-head"]
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "small"), *words]) == 0
    found = verify(tmp_path / "small")
    assert found.good, said(found)
    path = tmp_path / "small" / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.weight"][0] += 1
    save_file(tensors, path)
    claim(tmp_path / "small")
    assert "lm_head.weight is not a tensor of the base" in said(verify(tmp_path / "small"), False)


@pytest.mark.parametrize(
    ("model_type", "stored_twice"), [("llama", False), ("llama", True), ("gpt_neox", False), ("gemma3", False)]
)
def test_trained_embeddings_of_a_model_with_a_tied_head(model_type: str, stored_twice: bool, tmp_path: Path) -> None:
    """The head keeps the base's values, which the adapter need not hold, and the merged model stores."""
    base, cut, trained, healed, adapter = (tmp_path / one for one in ("base", "cut", "trained", "healed", "adapter"))
    model = tiny_model(model_type)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    (embeddings,) = (name for name, one in model.named_modules() if one is model.get_input_embeddings())
    if stored_twice:
        edit(base, lambda tensors: tensors.update({"lm_head.weight": tensors[f"{embeddings}.weight"].clone()}))
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    config = LayerDropConfig(drop_layers=[2], tune_layers=0, modules_to_save=[embeddings])
    tuned = prune_with(config, AutoModelForCausalLM.from_pretrained(base))
    for parameter in tuned.parameters():
        parameter.data += parameter.requires_grad
    tuned.save_pretrained(trained)
    write_healed(Student.load(cut), trained, healed, {"stage": "heal", "settings": {}}, adapter=adapter)
    for folder in (healed, adapter):
        found = verify(folder)
        assert found.consistent, said(found)
        assert found.recorded.total() == len(load_file(adapter / "adapter_model.safetensors"))
    edit(healed, lambda tensors: tensors.pop("lm_head.weight"))
    claim(healed)
    assert "is missing, and config.json no longer ties it to " in said(verify(healed), False)


def test_an_adapter_on_a_pruned_model(cut: Path, tmp_path: Path) -> None:
    """What it is put on is verified too."""
    edit(cut, lambda tensors: tensors[Q3].add_(1), record={"changed_tensors": [Q3]})
    words = ["--drop-layers", "1", "--adapter", "--tune-layers", "1"]
    assert main(["prune", str(cut), str(tmp_path / "small"), *words]) == 0
    found = verify(tmp_path / "small")
    assert found.verdict.startswith("IN PART"), said(found)
    assert found.recorded == {"heal": 1}
    change_lineage(cut, lambda data: data["entries"][-1].update(settings={"rate": 1}))
    assert "is not the model that lineage.json says was cut again" in said(verify(tmp_path / "small"), False)
    change_lineage(cut, lambda data: data["entries"][-1].update(settings={}))
    flip(cut, Q4)
    assert f"names the base {cut}, which is not proven" in said(verify(tmp_path / "small"), False)
    for path in cut.glob("[!l]*"):  # only its lineage is left, which agrees with the base
        path.unlink()
    assert f"names the base {cut}, which is not proven" in said(verify(tmp_path / "small"), False)


def test_an_adapter_on_a_healed_model(cut: Path, tmp_path: Path) -> None:
    """What was healed before may not change again without a record."""
    small, name = tmp_path / "small", "model.norm.weight"
    edit(cut, lambda tensors: tensors[name].add_(1), record={"changed_tensors": [name]})
    assert main(["prune", str(cut), str(small), "--drop-layers", "1", "--adapter", "--tune-layers", "1"]) == 0
    found = verify(small)
    assert found.recorded == {"heal": 1}, said(found)
    assert found.consistent, said(found)
    path = small / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {f"base_model.model.{name}": tensors[f"base_model.model.{name}"] + 1}, path)
    claim(small)
    assert f"tensors: {name} differs from the base's" in said(verify(small), False)


def test_an_adapter_on_a_pruned_model_of_another_base(place: Path, cut: Path, tmp_path: Path) -> None:
    """Its records agree with it, but not with the base that the adapter names in the end."""
    words = ["--adapter", "--tune-layers", "1"]
    assert main(["prune", str(cut), str(tmp_path / "small"), "--drop-layers", "1", *words]) == 0
    assert verify(tmp_path / "small").good
    evil = Path(shutil.copytree(place / "single", tmp_path / "evil"))
    flip(evil, Q3)
    assert main(["prune", str(evil), str(cut), "--drop-layers", "2,5", "--force"]) == 0
    first = Lineage.load(cut).entries[0]

    def follow(data: dict[str, Any]) -> None:
        data["entries"][0] = first
        data["entries"][1]["input_weights"] = first["weights"]

    assert verify(cut).good
    change_lineage(tmp_path / "small", follow)
    assert f"names the base {cut}, which is not proven" in said(verify(tmp_path / "small"), False)


def test_a_base_that_has_moved(place: Path, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lineage = Lineage.load(cut)
    lineage.base["id"] = str(tmp_path / "gone")
    lineage.write(cut)
    found = verify(cut)
    assert not found.good
    assert "base: the base, gone, is not available here; give its location with --base" in said(found, False)
    assert found.verdict.startswith(f"NOT CHECKED: the base of {cut} was not found")
    found = verify(cut, base=str(place / "single"))
    assert found.good, said(found)
    (cut / "model.safetensors").unlink()
    assert verify(cut).verdict.startswith("NO: ")  # a fault of its own is one with and without the base


def test_an_adapter_whose_base_has_moved(place: Path, tmp_path: Path) -> None:
    base, moved, small = (tmp_path / name for name in ("base", "moved", "small"))
    shutil.copytree(place / "single", base)
    assert main(["prune", str(base), str(small), "--drop-layers", "2", "--adapter", "--tune-layers", "1"]) == 0
    base.rename(moved)
    found = verify(small, base=str(moved))
    assert found.good, said(found)
    config = small / "adapter_config.json"
    config.write_text(config.read_text().replace(str(base), str(tmp_path / "elsewhere")))
    assert f"elsewhere', and lineage.json says '{base}'" in said(verify(small, base=str(moved)), False)


def test_a_base_that_was_cut_from_an_incomplete_copy(place: Path, tmp_path: Path) -> None:
    copy, complete = (Path(shutil.copytree(place / "single", tmp_path / name)) for name in ("copy", "complete"))
    for name in ("merges.txt", "special_tokens_map.json"):
        (complete / name).write_text("{}")
    assert main(["prune", str(copy), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    assert verify(tmp_path / "cut").good
    found = verify(tmp_path / "cut", base=str(complete))  # the publisher may have removed what the copy had
    assert not found.good
    assert found.consistent, said(found)
    lacked = "the copy of the base that was cut lacked merges.txt, special_tokens_map.json"
    assert found.verdict.startswith("IN PART: the rest of ")
    assert lacked in found.verdict
    assert lacked in verify(tmp_path / "cut", base=str(complete), accept_trained=True).verdict.removeprefix("YES, as")
    words = ["--drop-layers", "1", "--adapter", "--tune-layers", "1"]
    assert main(["prune", str(tmp_path / "cut"), str(tmp_path / "small"), *words]) == 0
    found = verify(tmp_path / "small", base=str(complete))  # through the model that it is put on
    assert found.verdict.startswith("IN PART: the rest of "), said(found)
    assert lacked in found.verdict
    (tmp_path / "cut" / "merges.txt").write_text("{}")
    assert "merges.txt is not a file that the cut leaves" in said(verify(tmp_path / "cut", base=str(complete)), False)
    (tmp_path / "cut" / "merges.txt").unlink()
    lineage = Lineage.load(tmp_path / "cut")
    del lineage.base["companions"]  # as recorded before
    lineage.write(tmp_path / "cut")
    assert "merges.txt is missing" in said(verify(tmp_path / "cut", base=str(complete)), False)
    (copy / "notes.bak").symlink_to(tmp_path / "nowhere")  # an adapter takes nothing but the weights
    assert main(["prune", str(copy), str(tmp_path / "adapter"), "--drop-layers", "2", "--adapter"]) == 0
    assert "companions" not in Lineage.load(tmp_path / "adapter").base


# No.


def test_one_bit(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(cut, Q3, element=33, bit=0x10)
    assert main(["verify", str(cut)]) == 1
    out = capsys.readouterr().out
    assert "NO   weights   their hash is " in out
    assert f"NO   tensors   {Q3} differs from the base's" in out
    assert out.splitlines()[-1].startswith("NO: ")
    claim(cut)  # whoever edits the lineage, too, gets no further
    assert main(["verify", str(cut)]) == 1
    assert f"{Q3} differs" in capsys.readouterr().out


def test_of_many_problems_some_are_named(cut: Path) -> None:
    edit(cut, lambda tensors: [tensor.add_(1) for tensor in tensors.values()])
    lines = [line.text for line in verify(cut).lines if line.what == "tensors"]
    assert (len(lines), lines[-1]) == (21, "and 37 more")


def test_two_layers_swapped(cut: Path) -> None:
    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            other = name.replace(".3.", ".4.", 1)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    edit(cut, swap)
    claim(cut)
    told = said(verify(cut), False).splitlines()
    assert len(told) == 18
    assert all(line.startswith(("tensors: model.layers.3.", "tensors: model.layers.4.")) for line in told)


def change_lineage(cut: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((cut / "lineage.json").read_text())
    change(data)
    (cut / "lineage.json").write_text(json.dumps(data))


def set_drop(data: dict[str, Any]) -> None:
    data["entries"][0]["settings"]["drop_layers"] = [1, 5]


@pytest.mark.parametrize(("change", "message"), [
    (set_drop, "config: config.json says that the cut dropped [2, 5] of 8, and lineage.json says [1, 5] of 8: one was edited"),
    (set_drop, "tensors: model.layers.1.mlp.down_proj.weight differs from the base's"),
    (lambda data: data["entries"][0].update(weights="0" * 64), "weights: their hash is "),
    (lambda data: data["entries"][0].pop("weights"), "does not record the weights"),
    (lambda data: data["entries"][0].pop("files"), "does not record the weights, the config and other files"),
    (lambda data: data["entries"].clear(), "lineage: lineage.json does not say how many layers the base has"),
    (lambda data: data["entries"].append(data["entries"][0]), "lineage: lineage.json drops layers [2, 5] of 8, and 6 were"),
    (lambda data: data["entries"][0]["layers"].update(left=5), "lineage: lineage.json says that 5 layers were left"),
    (lambda data: data["base"]["files"]["model.safetensors"].update(sha256="0" * 64), "is not the base that"),
    (lambda data: data["base"]["files"].pop("model.safetensors"), "has no hashes of the base's weights"),
    (lambda data: data["base"].pop("files"), "base: lineage.json has no hashes of the base's weights"),
    (lambda data: data["base"].update(id="no/such/base/at/all"), "is not available here"),
    (lambda data: data.update(schema_version=2), "schema_version: this version of hf_layerprune reads version 1; upgrade"),
    (lambda data: data["entries"][0]["layers"].update(base=9, left=7), "lineage.json"),
])  # fmt: skip
def test_an_edited_lineage(cut: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    change_lineage(cut, change)
    found = verify(cut)
    assert not found.good
    assert message in said(found, False)


@pytest.mark.parametrize(("change", "message"), [
    (lambda cut: (cut / "lineage.json").unlink(), "has no lineage.json"),
    (lambda cut: (cut / "vocab.txt").write_text(""), "files: vocab.txt was added since prune wrote the model"),
    (lambda cut: (cut / "generation_config.json").unlink(), "files: generation_config.json is missing since prune wrote the"),
    (lambda cut: (cut / "config.json").unlink(), "has no config.json, so it is not a whole model"),
    (lambda cut: (cut / "model.safetensors").write_bytes(b"12345678"), "tensors: "),
    (lambda cut: edit(cut, lambda tensors: tensors.pop(Q3)), f"tensors: {Q3} is missing"),
    (lambda cut: edit(cut, lambda tensors: tensors.update(extra=torch.ones(1))), "tensors: extra is not a tensor of"),
    (lambda cut: edit(cut, lambda tensors: tensors.update({Q3: tensors[Q3].half()})),
     f"tensors: {Q3} is F16[32, 32], and the base's is F32[32, 32]"),
    (lambda cut: edit(cut, lambda tensors: tensors.update({Q3: tensors[Q3].reshape(16, 64)})), "is F32[16, 64], and"),
])  # fmt: skip
def test_other_damage(cut: Path, change: Callable[[Path], Any], message: str) -> None:
    change(cut)
    found = verify(cut)
    assert not found.good
    assert message in said(found, False)


def test_an_edited_config(cut: Path) -> None:
    config = json.loads((cut / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (cut / "config.json").write_text(json.dumps(config))
    assert said(verify(cut), False).splitlines() == [
        "files: config.json was changed since prune wrote the model",
        "config: rms_norm_eps is 0.5 and was 1e-06",
    ]


def test_a_switch_that_was_turned_off(tmp_path: Path) -> None:
    """Of those, only that of a tied head is left to the tensors."""
    model = tiny_model("qwen3_moe")
    model.config.norm_topk_prob = True
    model.save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2,5"]) == 0
    config = tmp_path / "cut" / "config.json"
    config.write_text(config.read_text().replace('"norm_topk_prob": true', '"norm_topk_prob": false'))
    assert "config: norm_topk_prob is False and was True" in said(verify(tmp_path / "cut"), False)


def test_numbers_of_other_weights(cut: Path) -> None:
    measure_by_hand(cut)
    assert verify(cut).good
    metrics = (cut / "metrics.json").read_text()
    own = json.loads(metrics)["weights"]
    (cut / "metrics.json").write_text(metrics.replace(own, "0" * 64))
    assert "metrics: metrics.json was measured on other weights" in said(verify(cut), False)


def test_changes_that_no_stage_tells_of(cut: Path) -> None:
    edit(cut, lambda tensors: [tensors[name].add_(1) for name in (Q3, Q4)], record={"changed_tensors": [Q4]})
    found = verify(cut)
    assert not found.good
    assert f"{Q3} differs from the base's" in said(found, False)
    assert Q4 not in said(found, False)


def test_a_bias_beside_a_weight_that_was_trained(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    weight, bias = "transformer.ln_f.weight", "transformer.ln_f.bias"
    edit(tmp_path / "cut", lambda tensors: tensors[bias].add_(1), record={"changed_tensors": [weight]})
    assert f"tensors: {bias} differs from the base's" in said(verify(tmp_path / "cut"), False)
    edit(tmp_path / "cut", lambda tensors: [tensors.pop(bias), tensors[weight].add_(1)])
    claim(tmp_path / "cut")
    assert f"tensors: {bias} is missing" in said(verify(tmp_path / "cut"), False)


def test_a_card_that_was_edited(cut: Path) -> None:
    """It changes no behaviour, but whoever reads it and then a yes must know that nothing in it was checked."""
    measure_by_hand(cut)
    assert main(["card", str(cut)]) == 0
    path = cut / "README.md"
    path.write_text(path.read_text() + "\nA text of my own.\n")
    found = verify(cut)
    assert found.good
    assert "card: README.md shows what the records say" in said(found, True)
    assert "they are not measured again" in said(found, True)
    path.write_text(path.read_text().replace("0.4", "0.9"))
    found = verify(cut)
    assert found.good
    assert "README.md is not what this version of hf-layerprune makes of the records; nothing" in said(found)
    assert "card" not in said(found, True)


def test_a_base_that_was_changed_since(place: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(place / "single", tmp_path / "base"))
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "2,5"]) == 0
    flip(base, "model.layers.2.mlp.up_proj.weight")  # of a dropped layer
    found = verify(tmp_path / "cut")
    assert not found.good
    assert "is not the base that lineage.json names: model.safetensors differ" in said(found, False)
    assert "57 are the base's" in said(found)


def test_weight_files_that_contradict_each_other() -> None:
    """What they note decides how quantised weights are unpacked, and a loader may take either."""
    one, same, other = (WeightFile("", {}, {"format": text, "scheme": text[0]}) for text in ("a", "ab", "b"))
    assert notes_in([one, same]) == {"scheme": "a"}
    with pytest.raises(CheckpointError, match="contradict each other on scheme"):
        notes_in([one, other])


@pytest.mark.parametrize("name", ["absent", "file.txt"])
def test_no_model_at_all(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file.txt").write_text("")
    assert main(["verify", str(tmp_path / name)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_gguf_file_instead_of_the_base(tmp_path: Path, cut: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    found = verify(cut, base=str(tmp_path / "small.gguf"))
    assert not found.good
    assert "small.gguf is a GGUF file, and the model was cut from a folder" in said(found)


def test_what_was_unpacked_from_gguf_and_converted_later(tmp_path: Path) -> None:
    write_gguf(tmp_path / "small.gguf")
    assert main(["prune", str(tmp_path / "small.gguf"), str(tmp_path / "cut"), "--drop-layers", "1"]) == 0
    words = ["--drop-layers", "1", "--dtype", "float16"]
    assert main(["prune", str(tmp_path / "cut"), str(tmp_path / "again"), *words]) == 0
    found = verify(tmp_path / "again")
    assert found.good, said(found)
    assert "converted to bfloat16, then float16)" in said(found)


def test_what_was_unpacked_from_gguf(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Packed in 4 bits: no bytes to compare, so the cut is made again."""
    write_gguf(tmp_path / "small.gguf", packed=GGMLQuantizationType.Q4_0)
    for name in ("LICENSE", "NOTICE", "notes.txt"):
        (tmp_path / name).write_text("Of another model, perhaps.")
    assert main(["prune", str(tmp_path / "small.gguf"), str(tmp_path / "cut"), "--drop-layers", "1"]) == 0
    assert "not copied: LICENSE and NOTICE beside small.gguf, which may" in caplog.text
    assert f"copy into {tmp_path / 'cut'} what belongs to the model" in caplog.text
    assert not (tmp_path / "cut" / "LICENSE").exists()
    found = verify(tmp_path / "cut")
    assert found.good, said(found)
    assert "small.gguf: layer 1 of 4 dropped, 3 left (prune, converted to bfloat16)" in said(found)
    assert "29 are the base's, to the last bit" in said(found)
    assert "unpacks it" not in said(found)
    assert Lineage.load_required(tmp_path / "cut").base["license"] == "mit"
    records = tmp_path / "cut" / "lineage.json"
    records.write_text(re.sub(r'("transformers": )"[^"]+"', r'\1"4.0"', records.read_text()))
    assert not verify(tmp_path / "cut").good
    settings = tmp_path / "cut" / "generation_config.json"
    settings.write_text(re.sub(r'("transformers_version": )"[^"]+"', r'\1"4.0"', settings.read_text()))
    lineage = Lineage.load(tmp_path / "cut")
    lineage.entries[-1]["files"]["generation_config.json"] = sha256_of(settings)
    lineage.write(tmp_path / "cut")
    found = verify(tmp_path / "cut")
    assert found.good, said(found)
    assert "unpacks it; 4.0 did so for the cut" in said(found)
    name = "model.layers.1.mlp.up_proj.weight"
    edit(tmp_path / "cut", lambda tensors: tensors[name].view(torch.int16)[0, 0].bitwise_xor_(1))
    claim(tmp_path / "cut")
    assert f"tensors: {name} differs from the base's" in said(verify(tmp_path / "cut"), False)


def test_what_a_repair_changed(cut: Path) -> None:
    edit(cut, lambda tensors: tensors[Q3].add_(1))
    claim(cut)
    assert not verify(cut).good
    change_lineage(cut, lambda data: data["entries"][0].update(repair={"method": "linear", "changed_tensors": [Q3]}))
    found = verify(cut, accept_trained=True)
    assert found.good, said(found)
    assert found.recorded == {"repair": 1}


# Records without a model.


def test_records_without_a_model_are_only_that(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the cards' folders are: what can be derived again is, and nothing is called a model."""
    card = tmp_path / "card"
    shutil.copytree(place / "single-cut", tmp_path / "model")
    measure_by_hand(tmp_path / "model")
    card.mkdir()
    for name in ("lineage.json", "metrics.json"):
        shutil.copyfile(tmp_path / "model" / name, card / name)
    (card / "README.md").write_text("# Card\n")
    assert main(["verify", str(card)]) == 1
    out = capsys.readouterr().out
    assert "ok   cut" in out
    assert "NO " not in out
    assert out.splitlines()[-1] == (
        f"RECORDS ONLY: {card} has no weights; its records agree with the base and with one another. Verify the model "
        "itself where its weights are"
    )
    assert not verify(card, accept_trained=True).good

    (tmp_path / "notes").write_text("no model")
    for name in ("typo", "notes"):
        found = verify(card, base=str(tmp_path / name))
        assert not found.good
        assert found.verdict.startswith(f"NOT CHECKED: the base of {card} was not found")

    def broken(change: Callable[[dict[str, Any]], None]) -> str:
        lineage = Lineage.load(tmp_path / "model")
        change(lineage.entries[-1])
        lineage.write(card)
        found = verify(card)
        assert "do NOT agree" in found.verdict
        return said(found, good=False)

    assert "cut: repeated from the base" in broken(lambda entry: entry["settings"].update(drop_layers=[2, 6]))
    text = broken(lambda entry: entry.update(weights="0" * 64))
    assert "metrics.json was measured on other weights" in text
    assert "lineage.json says 000000000000" in text
    assert "another generation_config.json" in broken(
        lambda entry: entry["files"].update({"generation_config.json": "0" * 64})
    )
    assert "does not record the weights" in broken(lambda entry: entry.pop("files"))
    shutil.copyfile(place / "single-cut" / "config.json", card / "config.json")  # a model, but not all of it
    assert verify(card).verdict.startswith("NO: ")


def test_records_of_an_adapter(place: Path, tmp_path: Path) -> None:
    """They need not tell of the base's tokenizer or config, as those of a model do."""
    small, card = tmp_path / "small", tmp_path / "card"
    assert main(["prune", str(place / "single"), str(small), "--drop-layers", "2", "--adapter"]) == 0
    card.mkdir()
    shutil.copyfile(small / "lineage.json", card / "lineage.json")
    found = verify(card)
    assert found.consistent, said(found)
    assert found.verdict.startswith("RECORDS ONLY: ")


def test_records_of_a_repair_and_of_several_cuts(cut: Path, tmp_path: Path) -> None:
    card = tmp_path / "card"
    card.mkdir()
    assert main(["prune", str(cut), str(tmp_path / "again"), "--drop-layers", "1"]) == 0
    shutil.copyfile(tmp_path / "again" / "lineage.json", card / "lineage.json")
    assert verify(card).consistent
    lineage = Lineage.load(cut)
    (entry,) = lineage.entries
    repair = {"method": "linear", "changed_tensors": [Q3], "input_weights": entry["weights"]}
    entry |= {"repair": repair, "weights": "1" * 64}  # of the repaired model
    lineage.write(card)
    assert verify(card).consistent
    repair["input_weights"] = "1" * 64
    lineage.write(card)
    assert "cut: repeated from the base" in said(verify(card), False)
