"""What an adversary tries so that `verify` says yes: one test each, through the command, with and without forged records."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_layerprune.cli import main
from hf_layerprune.heal.stage import copy_companion_files
from hf_layerprune.publish.verify.fields import agrees_with_renamed
from hf_layerprune.records.fingerprints import behaviour_hashes, fingerprint, weights_hash
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.runtime.tokenizer_version import reads_another_tokenizer

from .tiny_models import randomize, tiny_model

NORM = "model.norm.weight"


def write_base(folder: Path, shards: str = "1GB") -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny_model("llama").save_pretrained(folder, max_shard_size=shards)
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="w2", pad_token="w0")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a cut of it, the same healed, and an adapter."""
    place = tmp_path_factory.mktemp("attacks")
    write_base(place / "base")
    assert main(["prune", str(place / "base"), str(place / "cut"), "--drop-layers", "2,5"]) == 0
    small = ["--drop-layers", "2,5", "--adapter", "--tune-layers", "1"]
    assert main(["prune", str(place / "base"), str(place / "adapter"), *small]) == 0
    shutil.copytree(place / "cut", place / "healed")
    train(place / "healed")
    entry = {"stage": "heal", "settings": {"method": "tail"}, "changed_tensors": [NORM]}
    Lineage.load(place / "healed").record(place / "healed", entry)
    return place


@pytest.fixture
def cut(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "cut", tmp_path / "model"))


@pytest.fixture
def adapter(place: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(place / "adapter", tmp_path / "model"))


def train(folder: Path, name: str = NORM) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})


def forge(folder: Path) -> None:
    """Make the records agree with whatever was done to the folder."""
    lineage = Lineage.load(folder)
    lineage.entries[-1] |= {"weights": weights_hash(fingerprint(folder)), "files": behaviour_hashes(folder)}
    lineage.write(folder)


def says(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    capsys.readouterr()
    code = main(["verify", str(folder), *words])
    out, err = capsys.readouterr()
    assert "internal error" not in err
    return code, out + err


def edit_json(name: str, **fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def test_what_nobody_touched(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cut", "adapter"):
        code, said = says(place / name, capsys)
        assert (code, "YES:" in said) == (0, True), said
    code, said = says(place / "healed", capsys)
    assert code == 1
    assert "IN PART: " in said
    assert "NO  " not in said
    assert says(place / "healed", capsys, "--accept-trained")[0] == 0


def name_twice(folder: Path) -> None:
    """A loader may read the type of the first of two equal names, and `verify` that of the second."""
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end].decode().rstrip()
    entry = json.dumps(json.loads(header)[NORM])
    header = f'{{"{NORM}": {entry.replace("F32", "I32")}, {header[1:]}'
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + raw[end:])


def move_weights(folder: Path, name: str) -> None:
    """Where transformers finds them by the index, and others don't."""
    tensors = load_file(folder / "model.safetensors")
    (folder / name).parent.mkdir()
    (folder / "model.safetensors").rename(folder / name)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def list_weights(folder: Path) -> None:
    """In an index that transformers can't read."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


BEHAVIOUR: dict[str, tuple[Callable[[Path], object], str]] = {
    "chat template edited": (write("chat_template.jinja", "{{ 'evil' }}"), "chat_template.jinja"),
    "chat template removed": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja"),
    "another chat template": (write("additional_chat_templates/tool_use.jinja", "{{ 1 }}"), "tool_use.jinja"),
    "template in the tokenizer's settings": (
        edit_json("tokenizer_config.json", chat_template="x"),
        "tokenizer_config",
    ),
    "tokenizer edited": (edit_json("tokenizer.json", normalizer={"type": "Lowercase"}), "tokenizer.json"),
    "tokenizer removed": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "added tokens": (write("added_tokens.json", '{"evil": 5}'), "added_tokens.json"),
    "special tokens": (write("special_tokens_map.json", '{"eos_token": "w5"}'), "special_tokens_map.json"),
    "end of text": (edit_json("tokenizer_config.json", eos_token="w5"), "tokenizer_config.json"),
    "generation settings edited": (edit_json("generation_config.json", temperature=9.0), "generation_config.json"),
    "generation settings removed": (lambda folder: (folder / "generation_config.json").unlink(), "generation_config"),
    "processor": (write("preprocessor_config.json", "{}"), "preprocessor_config.json"),
}
CONFIG: dict[str, Callable[[Path], object]] = {
    "dtype": edit_json("config.json", dtype="float16"),
    "rope_theta": edit_json("config.json", rope_parameters={"rope_type": "default", "rope_theta": 17.0}),
    "rms_norm_eps": edit_json("config.json", rms_norm_eps=0.5),
    "hidden_act": edit_json("config.json", hidden_act="relu"),
    "eos_token_id": edit_json("config.json", eos_token_id=99),
    "tie_word_embeddings": edit_json("config.json", tie_word_embeddings=True),
    "architectures": edit_json("config.json", architectures=["MistralForCausalLM"]),
    "auto_map": edit_json("config.json", auto_map={"AutoModelForCausalLM": "evil.Evil"}),
    "bias": edit_json("config.json", attention_bias=True),
    "quantization_config": edit_json("config.json", quantization_config={"quant_method": "bitsandbytes"}),
    "a field that says null": edit_json("config.json", is_causal=None),
    "attention": edit_json("config.json", _attn_implementation="paged|eager"),
    "attention from a repository": edit_json("config.json", attn_implementation="kernels-community/evil"),
    "experts": edit_json("config.json", _experts_implementation="eager"),
    "an old name for another value": lambda folder: rename_rope(folder, rope_theta=17.0),
    "an old name beside the new one": edit_json("config.json", torch_dtype="float16"),
    "generation": edit_json("config.json", temperature=7.0, do_sample=True),
    "a plan of devices": edit_json("config.json", base_model_tp_plan={"lm_head": "rowwise"}),
    "a name that chooses the tokenizer's class": edit_json(
        "config.json", _name_or_path="deepseek-ai/deepseek-coder-x"
    ),
    "a version that stops the tokenizer": edit_json("config.json", transformers_version="none"),
    "labels, whose names are numbers": edit_json("config.json", num_labels=3),
    "a mark of quantisation": edit_json("config.json", _is_quantized=True),
    "more in the mark of the cut": edit_json(
        "config.json", layer_drop={"drop_layers": [2, 5], "num_base_layers": 8, "x": 1}
    ),
    "the cut": edit_json("config.json", layer_drop={"drop_layers": [1, 5], "num_base_layers": 8}),
    "a longer base in the mark of the cut": edit_json(
        "config.json", layer_drop={"drop_layers": [2, 5], "num_base_layers": 9}
    ),
    "a longer base": lambda folder: lengthen(folder),
    "a section of what saving sets": edit_json("config.json", text_config={"_name_or_path": "x", "use_cache": True}),
}
TENSOR = {"x": torch.ones(1)}
PLANTED: dict[str, Callable[[Path], object]] = {
    "an adapter": lambda folder: [
        write("adapter_config.json", '{"peft_type": "LORA"}')(folder),
        save_file(TENSOR, folder / "adapter_model.safetensors"),
    ],
    "an adapter's config": write("adapter_config.json", '{"peft_type": "LORA"}'),
    "an adapter's weights": lambda folder: save_file(TENSOR, folder / "adapter_model.safetensors"),
    "a stray safetensors file": lambda folder: save_file(TENSOR, folder / "stray.safetensors"),
    "a copy of the weights": lambda folder: shutil.copy(folder / "model.safetensors", folder / "other.safetensors"),
    "weights named as a licence": lambda folder: save_file(TENSOR, folder / "LICENSE.safetensors"),
    "a shard": lambda folder: save_file(TENSOR, folder / "model-00002-of-00002.safetensors"),
    "an index": write("model.safetensors.index.json", '{"weight_map": {"x": "stray.safetensors"}}'),
    "a hidden template": write("additional_chat_templates/.tool_use.jinja", "{{ 'evil' }}"),
    "a GGUF file": write("model.gguf", b"GGUF"),
    "weights in a folder": lambda folder: move_weights(folder, "sub/w.safetensors"),
    "an index without metadata": list_weights,
    "a tensor named twice": name_twice,
    "a pickle": write("pytorch_model.bin", b"\x80\x04."),
    "another pickle": write("adapter_model.bin", b"\x80\x04."),
    "code": write("modeling_evil.py", "raise SystemExit"),
    "a folder": write("adapter/adapter_config.json", '{"peft_type": "LORA"}'),
    "a folder with weights": write("onnx/model.onnx", b"x"),
    "a word list": write("merges.txt", "a b"),
    "a link to a folder": lambda folder: (folder / "adapter").symlink_to(folder.parent),
    "a link to nothing": lambda folder: (folder / "extra.json").symlink_to(folder / "absent"),
    "a file without a kind": write("evil", b"x"),
}


def lengthen(folder: Path) -> None:
    """Make the config and the records say that the base had one layer more, which is left."""
    edit_json("config.json", layer_drop={"drop_layers": [2, 5], "num_base_layers": 9})(folder)
    lineage = Lineage.load(folder)
    lineage.entries[0]["layers"] |= {"base": 9, "left": 7}
    lineage.write(folder)


def rename_rope(folder: Path, **fields: Any) -> None:
    """Give a config the old names of the rotary settings, of which some loaders read one and others the other."""
    path = folder / "config.json"
    told = json.loads(path.read_text())
    path.write_text(json.dumps(told | {"rope_scaling": told.pop("rope_parameters")} | fields))


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("attack", BEHAVIOUR)
def test_files_that_decide_behaviour(cut: Path, attack: str, forged: bool, capsys: pytest.CaptureFixture[str]) -> None:
    change, named = BEHAVIOUR[attack]
    change(cut)
    if forged:
        forge(cut)
    code, said = says(cut, capsys)
    assert code == 1
    assert named in said
    assert "YES" not in said


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("name", ["cut", "healed"])
@pytest.mark.parametrize("attack", CONFIG)
def test_config_fields(
    place: Path, tmp_path: Path, attack: str, name: str, forged: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copytree(place / name, tmp_path / "model"))
    CONFIG[attack](model)
    if forged:
        forge(model)
    code, said = says(model, capsys, "--accept-trained")
    assert code == 1
    assert "YES" not in said
    assert "Traceback" not in said


def test_numbers_that_do_not_equal_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_base(tmp_path / "base")
    edit_json("config.json", limit=float("nan"), more={"limits": [float("nan")]}, flag=1)(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    assert says(tmp_path / "cut", capsys)[0] == 0
    edit_json("config.json", limit=1.5)(tmp_path / "cut")
    forge(tmp_path / "cut")
    assert "limit is 1.5 and was nan" in says(tmp_path / "cut", capsys)[1]
    edit_json("config.json", limit=float("nan"), flag=True)(tmp_path / "cut")  # which equals the number 1 in Python
    forge(tmp_path / "cut")
    assert "flag is True and was 1" in says(tmp_path / "cut", capsys)[1]


def test_the_version_by_which_a_tokenizer_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, cut, healed = (tmp_path / name for name in ("base", "cut", "healed"))
    write_base(base)
    edit_json("config.json", transformers_version="4.57.3")(base)
    edit_json("tokenizer_config.json", fix_mistral_regex=True)(base)
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    assert json.loads((cut / "config.json").read_text())["transformers_version"] == "4.57.3"
    assert says(cut, capsys)[0] == 0
    AutoModelForCausalLM.from_pretrained(cut).save_pretrained(healed)
    copy_companion_files(cut, healed)
    assert json.loads((healed / "config.json").read_text())["transformers_version"] == "4.57.3"
    edit_json("config.json", transformers_version="5.24.0")(cut)
    forge(cut)
    assert "transformers_version is 5.24.0 and was 4.57.3, which changes the tokenizer" in says(cut, capsys)[1]
    early, release = ({"transformers_version": version} for version in ("5.0.0.dev0", "5.0.0"))
    assert reads_another_tokenizer(early, release, {"fix_mistral_regex": True})


def test_a_tokenizer_that_is_read_in_another_way_without_the_base_s_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = write_base(tmp_path / "base"), tmp_path / "adapter"
    edit_json("config.json", transformers_version="4.57.3")(base)
    edit_json("tokenizer_config.json", fix_mistral_regex=True)(base)
    assert main(["prune", str(base), str(adapter), "--drop-layers", "2", "--adapter"]) == 0
    assert says(adapter, capsys)[0] == 0
    copy_tokenizer(adapter, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    forge(adapter)
    code, said = says(adapter, capsys)
    assert (code, "fix_mistral_regex, which has no effect without the base's config.json" in said) == (1, True), said


def test_a_config_in_the_words_of_an_older_transformers(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = cut / "config.json"
    fields = json.loads(path.read_text())
    old = {"torch_dtype": fields.pop("dtype"), "rope_theta": fields.pop("rope_parameters")["rope_theta"]}
    path.write_text(json.dumps(fields | old | {"transformers_version": "4.57.0"}))
    forge(cut)
    code, said = says(cut, capsys)
    assert (code, "YES:" in said) == (0, True), said


@pytest.mark.parametrize(
    ("fields", "differs"),
    [
        ({"dtype": "float32"}, None),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16' and was None"),
        ({"dtype": "float32", "rms_norm_eps": 0.5}, "rms_norm_eps is 0.5"),
    ],
)
def test_the_type_of_the_weights_in_a_config_that_had_none(
    place: Path, tmp_path: Path, fields: dict[str, Any], differs: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saving a model records it, and nothing else."""
    base, cut = shutil.copytree(place / "base", tmp_path / "base"), tmp_path / "cut"
    settings = json.loads((base / "config.json").read_text())
    del settings["dtype"]
    (base / "config.json").write_text(json.dumps(settings))
    assert main(["prune", str(base), str(cut), "--drop-layers", "2,5"]) == 0
    edit_json("config.json", **fields)(cut)
    forge(cut)
    code, said = says(cut, capsys)
    assert code == (0 if differs is None else 1), said
    assert (differs or "YES:") in said


def divide(folder: Path, metadata: dict[str, Any], *files: list[str]) -> None:
    """Store a model's tensors in several files, in the order of their first letters."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for letter, names in zip("abc", files, strict=False):
        save_file({name: tensors[name] for name in names}, folder / f"{letter}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, f"{letter}.safetensors")
    index = {"metadata": metadata, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    forge(folder)


def test_the_type_of_the_weights_where_no_config_names_it(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers takes it from the index, or from the first tensor of the first file, and converts all others."""
    base, cut = Path(shutil.copytree(place / "base", tmp_path / "base")), tmp_path / "cut"
    settings = json.loads((base / "config.json").read_text())
    del settings["dtype"]
    (base / "config.json").write_text(json.dumps(settings))
    tensors = load_file(base / "model.safetensors")
    tensors |= {name: tensor.bfloat16() for name, tensor in tensors.items() if "norm" not in name}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    names = load_file(cut / "model.safetensors").keys()
    norms, others = ([name for name in names if ("norm" in name) == norm] for norm in (True, False))
    for metadata, files, taken in (
        ({}, (others, norms), None),
        ({}, (norms, others), "float32"),
        ({"dtype": "float16"}, (others, norms), "float16"),
    ):
        folder = Path(shutil.copytree(cut, tmp_path / f"divided-{taken}"))
        divide(folder, metadata, *files)
        assert str(AutoModelForCausalLM.from_pretrained(folder).dtype) == f"torch.{taken or 'bfloat16'}"
        code, said = says(folder, capsys)
        assert (code, f"loaders would take '{taken}' and not 'bfloat16'" in said) == (
            (1, True) if taken else (0, False)
        )
    for dtype, code in (("bfloat16", 0), ("float32", 1)):
        edit_json("config.json", dtype=dtype)(cut)
        forge(cut)
        assert says(cut, capsys)[0] == code


@pytest.mark.parametrize(("told", "same"), [
    ({"type": "mrope"}, True), ({"type": "default"}, False), ({"rope_type": "default", "type": "mrope"}, True),
    ({"type": "linear"}, False), ({"rope_type": "mrope"}, False), ({"type": "mrope", "factor": 2.0}, False),
])  # fmt: skip
def test_rotary_settings_of_qwen2_vl_whose_type_has_a_new_name(told: dict[str, Any], same: bool) -> None:
    now = {"rope_parameters": {"rope_type": "default", "type": "mrope", "rope_theta": 1e6}}
    assert agrees_with_renamed("rope_scaling", told, now) == same
    assert agrees_with_renamed("rope_scaling", {"type": "linear"}, {"rope_parameters": {"rope_type": "linear"}})


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("attack", PLANTED)
def test_files_that_were_planted(cut: Path, attack: str, forged: bool, capsys: pytest.CaptureFixture[str]) -> None:
    PLANTED[attack](cut)
    if forged and "link" not in attack:
        forge(cut)
    code, said = says(cut, capsys)
    assert code == 1
    assert "YES" not in said
    assert "Traceback" not in said


ADAPTER: dict[str, Callable[[Path], object]] = {
    "another base": edit_json("adapter_config.json", base_model_name_or_path="someone/else"),
    "a file as its base": lambda folder: edit_json(
        "adapter_config.json", base_model_name_or_path=str(folder / "README.md")
    )(folder),
    "another method": edit_json("adapter_config.json", peft_type="LORA"),
    "another commit": edit_json("adapter_config.json", base_commit="0" * 40),
    "another revision": edit_json("adapter_config.json", revision="evil"),
    "another cut": edit_json("adapter_config.json", drop_layers=[1, 5]),
    "classes of its own": edit_json("adapter_config.json", auto_mapping={"parent_library": "evil"}),
    "a module that was not repaired": edit_json("adapter_config.json", repaired_modules=["model.layers.0.mlp"]),
    "more tuned layers": edit_json("adapter_config.json", tune_layers=3),
    "no tuned layers": edit_json("adapter_config.json", tune_layers=0, modules_to_save=["model.norm", "lm_head"]),
    "a tuned layer that is not there": edit_json(
        "adapter_config.json", modules_to_save=["model.layers.4", "model.layers.5", "model.norm", "lm_head"]
    ),
    "a tuned module that the model lacks": edit_json(
        "adapter_config.json", modules_to_save=["model.layers.5", "model.norm", "lm_head", "model.layers.6"]
    ),
    "no tuned head": edit_json("adapter_config.json", tune_lm_head=False, modules_to_save=["model.layers.5"]),
    "a repair": edit_json("adapter_config.json", repair="linear"),
    "a file to read": edit_json("adapter_config.json", repair="linear", calibration="/etc/hostname"),
    "another task": edit_json("adapter_config.json", task_type="SEQ_CLS"),
    "a task that does not exist": edit_json("adapter_config.json", task_type="odd"),
    "other targets": edit_json("adapter_config.json", target_modules=".*", exclude_modules=["lm_head"]),
    "as a new adapter": edit_json("adapter_config.json", inference_mode=False),
    "a field of nobody's": edit_json("adapter_config.json", runtime_config={"x": 1}),
    "a pickle beside it": write("adapter_model.bin", b"\x80\x04."),
    "stray weights beside it": lambda folder: save_file(TENSOR, folder / "model.safetensors"),
    "an index beside it": write("model.safetensors.index.json", "{}"),
    "a chat template": write("chat_template.jinja", "{{ 'evil' }}"),
    "a part of the base's tokenizer": lambda folder: copy_tokenizer(folder, "tokenizer.json"),
    "a tensor that is not there": lambda folder: drop_tensor(
        folder, "base_model.model.model.layers.5.mlp.up_proj.weight"
    ),
}


def drop_tensor(folder: Path, name: str) -> None:
    """PEFT can't load what is left."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors[name]
    save_file(tensors, path)


def copy_tokenizer(folder: Path, *names: str) -> None:
    for name in names:
        shutil.copy(Path(Lineage.load(folder).base["id"], name), folder)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("attack", ADAPTER)
def test_an_adapter(adapter: Path, attack: str, forged: bool, capsys: pytest.CaptureFixture[str]) -> None:
    ADAPTER[attack](adapter)
    if forged:
        forge(adapter)
    code, said = says(adapter, capsys)
    assert code == 1
    assert "YES" not in said


def test_an_adapter_with_its_base_s_tokenizer(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy_tokenizer(adapter, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    forge(adapter)
    code, said = says(adapter, capsys)
    assert (code, "YES:" in said) == (0, True), said


REPAIR = ["--adapter", "--repair", "linear", "--calibration-samples", "4", "--calibration-length", "16"]


def test_an_adapter_with_a_repair(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small"
    assert main(["prune", str(place / "base"), str(small), "--drop-layers", "3-4", *REPAIR]) == 0
    assert says(small, capsys, "--accept-trained")[0] == 0
    path = small / "adapter_config.json"
    told = path.read_text()
    for name, value in {"repair": None, "repaired_modules": None}.items():
        path.write_text(json.dumps(json.loads(told) | {name: value}))
        forge(small)
        code, said = says(small, capsys, "--accept-trained")
        assert (code, f"adapter_config.json has {name}=" in said) == (1, True), said


def test_an_adapter_with_repairs_before_and_after_layer_10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config lists what was repaired in the order of the layers, which is not that of their names."""
    base, small = write_base(tmp_path / "base"), tmp_path / "small"
    model = AutoModelForCausalLM.from_pretrained(base, num_hidden_layers=14)
    randomize(model)
    model.save_pretrained(base)
    assert main(["prune", str(base), str(small), "--drop-layers", "3,12", *REPAIR, "--calibration-samples", "32"]) == 0
    repaired = json.loads((small / "adapter_config.json").read_text())["repaired_modules"]
    assert [name.split(".")[2] for name in repaired] == ["2", "10"]
    code, said = says(small, capsys, "--accept-trained")
    assert code == 0, said


@pytest.mark.parametrize("recorded", [[], None])
def test_an_adapter_that_would_be_repaired_when_it_is_loaded(
    adapter: Path, recorded: list[str] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its repair changed nothing, so its weights are the base's; but its config has no list that says so."""
    lineage = Lineage.load(adapter)
    repair = {"method": "linear"} | ({} if recorded is None else {"changed_tensors": recorded})
    text = {"source": "self", "samples": 4, "length": 16, "seed": 42}
    lineage.entries[0] |= {"repair": repair, "calibration": text}
    lineage.write(adapter)
    fields = {"repair": "linear", "calibration_samples": 4, "calibration_length": 16, "seed": 42}
    edit_json("adapter_config.json", **fields, repaired_modules=[])(adapter)
    forge(adapter)
    code, said = says(adapter, capsys)
    assert (code, "YES:" in said) == (0, True), said
    edit_json("adapter_config.json", repaired_modules=None)(adapter)
    forge(adapter)
    code, said = says(adapter, capsys)
    assert (code, "has repaired_modules=None, and the cut writes []" in said) == (1, True), said


@pytest.mark.parametrize("file", ["model.safetensors", "generation_config.json", "chat_template.jinja"])
def test_an_adapter_that_is_put_on_another_base(
    place: Path, adapter: Path, tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The records may say little of the base; what counts are its files."""
    evil = Path(shutil.copytree(place / "base", tmp_path / "evil"))
    if file == "model.safetensors":
        train(evil, "model.layers.0.mlp.up_proj.weight")
    else:
        (evil / file).write_text("{}")
    edit_json("adapter_config.json", base_model_name_or_path=str(evil))(adapter)
    for folder in (place / "base", evil):
        save_file(TENSOR, folder / "x.safetensors")
    try:
        lineage = Lineage.load(adapter)
        lineage.base["files"] = {"x.safetensors": fingerprint(evil)["x.safetensors"]}
        lineage.write(adapter)
        forge(adapter)
        code, said = says(adapter, capsys, "--base", str(place / "base"))
    finally:
        (place / "base" / "x.safetensors").unlink()
    assert (code, f"where {file} is not as in " in said) == (1, True), said


def test_an_adapter_without_what_was_trained(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, name = adapter / "adapter_model.safetensors", f"base_model.model.{NORM}"
    tensors = load_file(path)
    tensors[name] = tensors[name] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    Lineage.load(adapter).record(adapter, {"stage": "heal", "settings": {}, "changed_tensors": [NORM]})
    assert says(adapter, capsys, "--accept-trained")[0] == 0
    for change, message in (
        ({name: torch.ones(7)}, f"{NORM} is F32[7], and the base's is F32[32]"),
        ({name: torch.ones(32, dtype=torch.int32)}, f"{NORM} is I32[32], and the base's is F32[32]"),
        ({}, f"{NORM} is missing"),
    ):
        save_file({one: value for one, value in tensors.items() if one != name} | change, path)
        forge(adapter)
        code, said = says(adapter, capsys, "--accept-trained")
        assert (code, message in said) == (1, True), said


def invent(**fields: Any) -> dict[str, Any]:
    return {"stage": "heal", "settings": {}, "changed_tensors": [NORM]} | fields


@pytest.mark.parametrize("entry", [
    invent(), invent(stage="repair"), invent(stage="anything"), invent(stage="prune", settings={"drop_layers": []}),
    invent(data=[{"name": "alpaca", "rows": 10}], command="accelerate launch recipes/sft_tail.py", seconds=10.0),
], ids=["bare", "a repair", "a name of its own", "a cut of nothing", "in full"])  # fmt: skip
def test_a_stage_that_was_invented(cut: Path, entry: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Well forged, it can't be told from a true one: so it is never a yes unless the user takes the records' word."""
    train(cut)
    Lineage.load(cut).record(cut, entry)
    code, said = says(cut, capsys)
    assert code == 1
    assert "YES" not in said
    if "IN PART" in said:
        assert f"1 tensor ({entry['stage']}: 1) can't be derived again and is taken as lineage.json records" in said


def store(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors of a model, and record that a training did so."""
    path, names = folder / "model.safetensors", {name.replace("__", "."): one for name, one in tensors.items()}
    changed = {name: one for name, one in (load_file(path) | names).items() if one is not None}
    save_file(changed, path, metadata={"format": "pt"})
    Lineage.load(folder).record(folder, invent(changed_tensors=list(names)))


@pytest.mark.parametrize(("tensors", "message"), [
    ({"model__norm__weight": torch.ones(7)}, f"{NORM} is F32[7], and the base's is F32[32]"),
    ({"model__norm__weight": torch.ones(32, dtype=torch.int32)}, f"{NORM} is I32[32], and the base's is F32[32]"),
    ({"model__norm__bias": torch.ones(32)}, "model.norm.bias is not a tensor of the base"),
    ({"model__norm__weight": None}, f"{NORM} is missing"),
])  # fmt: skip
def test_what_no_training_makes(
    cut: Path, tensors: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store(cut, **tensors)
    code, said = says(cut, capsys, "--accept-trained")
    assert (code, message in said) == (1, True), said


def test_a_training_of_everything(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store(cut, **{name.replace(".", "__"): one + 1 for name, one in load_file(cut / "model.safetensors").items()})
    code, said = says(cut, capsys)
    assert code == 1
    assert "IN PART: none of the weights of " in said
    assert "57 tensors (heal: 57), all that it has, can't be derived again" in said


@pytest.mark.parametrize("claimed", [["lm_head.weight"], []])
def test_an_untied_head_that_is_not_there(
    tmp_path: Path, claimed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A loader would make one up."""
    base, cut = write_base(tmp_path / "base"), tmp_path / "cut"
    model = tiny_model("llama")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    assert says(cut, capsys)[0] == 0
    edit_json("config.json", tie_word_embeddings=False)(cut)
    Lineage.load(cut).record(cut, invent(changed_tensors=claimed))
    code, said = says(cut, capsys, "--accept-trained")
    assert (code, "lm_head.weight is missing" in said) == (1, True), said


def test_a_head_that_stays_tied_whatever_a_section_of_the_config_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a multimodal model, the head is not a part of the section for text."""
    base, cut, model = tmp_path / "base", tmp_path / "cut", tiny_model("llava")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(base)
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    text = json.loads((cut / "config.json").read_text())["text_config"] | {"tie_word_embeddings": False}
    edit_json("config.json", text_config=text)(cut)
    forge(cut)
    loaded = load_base(cut)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert says(cut, capsys)[0] == 0
    edit_json("config.json", tie_word_embeddings=False)(cut)
    forge(cut)
    code, said = says(cut, capsys)
    assert (code, "lm_head.weight is missing" in said) == (1, True), said


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("method", ["fp8", "gptq", "compressed-tensors", "of its own"])
def test_a_quantising_that_changed_nothing(
    cut: Path, method: str, trained: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if trained:
        store(cut, lm_head__weight=load_file(cut / "model.safetensors")["lm_head.weight"] + 1)
    told = {"quant_method": method}
    edit_json("config.json", quantization_config=told)(cut)
    settings = {"quantization_config": told, "dtype": "float32"}
    Lineage.load(cut).record(cut, invent(stage="quantize", settings=settings))
    code, said = says(cut, capsys, "--accept-trained")
    assert code == 1
    assert "none was changed by the quantising that lineage.json names" in said


@pytest.mark.parametrize(("settings", "message"), [
    ([{"quantization_config": {"quant_method": "gptq"}}] * 2, "the weights were quantised more than once"),
    ([{}], "lineage.json does not say how the model was quantised"),
])  # fmt: skip
def test_a_quantising_that_can_t_be_followed(
    cut: Path, settings: list[dict[str, Any]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in settings:
        Lineage.load(cut).record(cut, invent(stage="quantize", settings=one))
    code, said = says(cut, capsys, "--accept-trained")
    assert (code, message in said) == (1, True), said


def test_a_base_whose_other_files_were_changed_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, cut = write_base(tmp_path / "base"), tmp_path / "cut"
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    for folder in (base, cut):
        edit_json("tokenizer_config.json", eos_token="w5")(folder)
    forge(cut)
    code, said = says(cut, capsys)
    assert (code, "is not the base that lineage.json names: tokenizer_config.json differ" in said) == (1, True), said


def test_a_base_inside_the_model(place: Path, cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Path(shutil.copytree(place / "base", cut / ".cache" / "SmolLM2-135M"))
    train(base)
    train(cut)
    lineage = Lineage.load(cut)
    lineage.base |= {"id": str(base), "files": fingerprint(base)}
    lineage.write(cut)
    forge(cut)
    code, said = says(cut, capsys)
    assert code == 1
    assert "is part of the model; give a base with --base" in said
    assert "model.norm.weight differs from the base's" in says(cut, capsys, "--base", str(place / "base"))[1]


def test_files_that_the_base_is_said_to_have_lacked(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = ("chat_template.jinja", "generation_config.json")
    lineage = Lineage.load(cut)
    lineage.base["companions"] = [name for name in lineage.base["companions"] if name not in gone]
    lineage.write(cut)
    for name in gone:
        (cut / name).unlink()
    forge(cut)
    code, said = says(cut, capsys)
    assert code == 1
    assert "IN PART: " in said
    assert "lacked chat_template.jinja, generation_config.json" in said.splitlines()[-1]


def test_an_adapter_whose_weights_peft_does_not_find(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name.removeprefix("base_model.model."): one for name, one in load_file(path).items()}, path)
    forge(adapter)
    code, said = says(adapter, capsys)
    assert (code, "PEFT would not load it" in said) == (1, True), said


def test_a_stage_that_does_not_follow(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(cut)
    lineage = Lineage.load(cut)
    lineage.record(cut, invent())
    lineage.entries[-1]["input_weights"] = "0" * 64
    lineage.write(cut)
    code, said = says(cut, capsys, "--accept-trained")
    assert code == 1
    assert "heal did not start from the weights that prune wrote" in said


def test_a_base_of_links_into_a_cache_whose_names_lie(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The name of a cache's file is no proof of what it holds."""
    base = write_base(tmp_path / "base")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    name = fingerprint(base)["model.safetensors"]["sha256"]
    (base / "model.safetensors").rename(blobs / name)
    (base / "model.safetensors").symlink_to(blobs / name)
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    assert says(tmp_path / "cut", capsys)[0] == 0
    tensors = load_file(blobs / name)
    tensors["model.norm.weight"] += 1
    save_file(tensors, blobs / name, metadata={"format": "pt"})
    train(tmp_path / "cut")
    forge(tmp_path / "cut")
    code, said = says(tmp_path / "cut", capsys)
    assert code == 1
    assert "is not the base that lineage.json names" in said


def test_a_tensor_under_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With and without the prefix that transformers completes: which of them it takes is not in the file."""
    base, cut, name = tmp_path / "base", tmp_path / "cut", "wpe.weight"
    tiny_model("gpt2").save_pretrained(base)
    tensors = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): one for name, one in tensors.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    assert says(cut, capsys)[0] == 0
    tensors = load_file(cut / "model.safetensors")
    for other in (tensors[name] + 1, tensors[name]):
        both = tensors | {f"transformer.{name}": other, name: tensors[name] * 2 + 1 - other}
        save_file(both, cut / "model.safetensors", metadata={"format": "pt"})
        forge(cut)
        code, said = says(cut, capsys)
        assert (code, "under two names" in said) == (1, True), said


def test_an_index_that_places_a_tensor_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["prune", str(write_base(tmp_path / "base", "60KB")), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    )
    path = tmp_path / "cut" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][NORM] = next(
        name for name in index["weight_map"].values() if name != index["weight_map"][NORM]
    )
    path.write_text(json.dumps(index))
    forge(tmp_path / "cut")
    code, said = says(tmp_path / "cut", capsys)
    assert (code, f"places it in {index['weight_map'][NORM]}" in said) == (1, True), said


def test_a_second_cut_of_another_number_of_layers(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(cut), str(tmp_path / "again"), "--drop-layers", "1"]) == 0
    edit_json("config.json", layer_drop={"drop_layers": [1], "num_base_layers": 7})(tmp_path / "again")
    lineage = Lineage.load(tmp_path / "again")
    lineage.entries[-1]["layers"]["base"] = 7
    lineage.write(tmp_path / "again")
    forge(tmp_path / "again")
    code, said = says(tmp_path / "again", capsys)
    assert (code, "drops layers [1] of 7, and 6 were left" in said) == (1, True), said


@pytest.mark.parametrize("both", [False, True])
def test_a_kept_tensor_that_is_missing(tmp_path: Path, both: bool, capsys: pytest.CaptureFixture[str]) -> None:
    base = write_base(tmp_path / "base")
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "2"]) == 0
    gone = "model.layers.0.mlp.up_proj.weight"
    for folder in (tmp_path / "cut", base)[: 1 + both]:
        path = folder / "model.safetensors"
        save_file({name: t for name, t in load_file(path).items() if name != gone}, path, metadata={"format": "pt"})
    lineage = Lineage.load(tmp_path / "cut")
    lineage.base["files"] = fingerprint(base)
    lineage.write(tmp_path / "cut")
    forge(tmp_path / "cut")
    code, said = says(tmp_path / "cut", capsys)
    assert code == 1
    assert gone in said


HOSTILE: dict[str, str] = {
    "40,000 characters": json.dumps({"schema_version": 1, "base": {"id": "x" * 40_000}, "entries": []}),
    "a command of 40,000": json.dumps(
        {"schema_version": 1, "base": {}, "entries": [{"stage": "heal", "command": "x" * 40_000}]}
    ),
    "deep": '{"schema_version": 1, "base": {"id": ' + "[" * 5000 + "]" * 5000 + '}, "entries": []}',
    "deep settings": json.dumps({"schema_version": 1, "base": {}, "entries": [{"stage": "a", "settings": {"a": [[[[[[[[
        [[[[[[[[[[1]]]]]]]]]]]]]]]]]]}}]}),
    "huge number": '{"schema_version": 1, "base": {}, "entries": [{"stage": "a", "seconds": 1e308}]}',
    "huge integer": '{"schema_version": 1, "base": {}, "entries": [{"stage": "a", "layers": {"base": ' + "9" * 4000
    + "}}]}",
    "ten million layers": '{"schema_version": 1, "base": {}, "entries": [{"stage": "a", "layers": {"base": 10000000}}]}',
    "not a number": '{"schema_version": 1, "base": {}, "entries": [{"stage": "a", "seconds": NaN}]}',
    "a list": "[]",
    "no entries": '{"schema_version": 1, "base": {}}',
    "another version": '{"schema_version": 9, "base": {}, "entries": []}',
    "unknown field": '{"schema_version": 1, "base": {}, "entries": [], "evil": 1}',
    "a key twice": '{"schema_version": 1, "schema_version": 1, "base": {}, "entries": []}',
    "control characters": json.dumps({"schema_version": 1, "base": {}, "entries": [{"stage": 1, "x": "\x1b[2J\u202e"}]}),
    "stage of control characters": json.dumps({"schema_version": 1, "base": {}, "entries": [
        {"stage": "\x1b[2Jprune", "settings": {"drop_layers": [1]}, "layers": {"base": 8}}]}),
    "layers that are words": json.dumps({"schema_version": 1, "base": {}, "entries": [
        {"stage": "prune", "settings": {"drop_layers": ["1"]}, "layers": {"base": 8}}]}),
    "half a character": '{"schema_version": 1, "base": {"id": "\\ud800"}, "entries": []}',
    "empty": "",
}  # fmt: skip


@pytest.mark.parametrize("command", ["verify", "card"])
@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_lineage(cut: Path, attack: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (cut / "lineage.json").write_text(HOSTILE[attack])
    capsys.readouterr()
    assert main([command, str(cut)]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err
    assert "\u202e" not in out + err
    assert len(out + err) < 2000


@pytest.mark.parametrize("attack", [
    '{"schema_version": 1}', "[]", "{", '{"weights": ' + "[" * 5000 + "]" * 5000 + "}",
    json.dumps({"schema_version": 1, "weights": "0" * 64, "models": {}, "results": [], "comparisons": [], "x": 1}),
    json.dumps({"schema_version": 1, "weights": "0" * 64, "models": {"0" * 64: {"role": "cut", "name": "x" * 40_000,
                "layers": 1, "parameters": 1}}, "results": [], "comparisons": []}),
    json.dumps({"schema_version": 1, "weights": "\x1b[2J", "models": {}, "results": [], "comparisons": []}),
    json.dumps({"schema_version": 1, "weights": "0" * 64, "models": {"0" * 64: {"role": "cut", "name": "x",
                "layers": 10**7, "parameters": 1}}, "results": [], "comparisons": []}),
])  # fmt: skip
@pytest.mark.parametrize("command", ["verify", "card"])
def test_hostile_numbers(cut: Path, attack: str, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    (cut / "metrics.json").write_text(attack)
    capsys.readouterr()
    assert main([command, str(cut)]) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    assert "\x1b" not in out + err
    assert len(out + err) < 2000
