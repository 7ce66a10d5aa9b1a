"""What libraries raise becomes one line, no code of a checkpoint runs, and a load that misses or adds weights is refused."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import runpy
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CodeLlamaTokenizer

from hf_layerprune import LayerDropConfig, prune_with
from hf_layerprune.adapter.loading import load_model
from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError, boundary
from hf_layerprune.files.json_file import read_object
from hf_layerprune.files.text_file import read_text, read_yaml
from hf_layerprune.measure.answers import answers_file, load_answers, save_answers
from hf_layerprune.measure.harness import Score, TaskRun
from hf_layerprune.records.declared import declared_fields, split_front_matter
from hf_layerprune.runtime.loading import _check_saved, as_path, load_base, load_config

from .measure_models import byte_tokenizer, write_gguf, write_model

ROOT = Path(__file__).parent.parent
PLACES = ("hf_layerprune", "recipes", "spaces")


def _calls() -> list[tuple[str, ast.Call]]:
    """Every call that could run code which a checkpoint or a data set brings along."""
    found = []
    for place in PLACES:
        for path in sorted((ROOT / place).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and _may_run_code(node.func):
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", node))
    return found


def _may_run_code(func: ast.expr) -> bool:
    if isinstance(func, ast.Name):
        return func.id == "load_dataset"
    if isinstance(func, ast.Attribute) and func.attr in ("from_pretrained", "from_config"):
        return isinstance(func.value, ast.Name) and func.value.id.startswith("Auto")
    return isinstance(func, ast.Attribute) and func.attr == "load_dataset"


@pytest.mark.parametrize("name", ["../model.safetensors", "/dev/zero", "weights.bin", 3, ""])
def test_an_index_names_files_beside_it(tmp_path: Path, name: Any) -> None:
    write_model(tmp_path)
    folder = tmp_path / "sharded"
    shutil.copytree(tmp_path, folder, ignore=shutil.ignore_patterns("model.safetensors", "sharded"))
    tensors = load_file(tmp_path / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, name)}))
    with pytest.raises(CheckpointError, match=r"index\.json.*(not a plain \.safetensors file|not a file name)"):
        load_base(folder)
    save_file(tensors, folder / "part.safetensors", {"format": "pt"})
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "part.safetensors")}))
    load_base(folder)


def test_code_of_a_checkpoint_is_refused_by_name() -> None:
    calls = _calls()
    assert len(calls) > 10
    silent = [where for where, call in calls if "trust_remote_code" not in {word.arg for word in call.keywords}]
    assert not silent, f"these calls may ask whether to run code: {silent}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


def edit(path: Path, **fields: Any) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def one_line_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-layerprune: ")]
    assert len(lines) == 1
    return lines[0]


def text_of(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text("The river rises in spring and people walk along the valley. " * 40)
    return str(path)


def commands(folder: Path, tmp_path: Path) -> dict[str, list[str]]:
    return {
        "inspect": ["inspect", str(folder)],
        "prune": ["prune", str(folder), str(tmp_path / "out")],
        "rank": ["rank", str(folder), "--criterion", "block_influence", "--calibration", text_of(tmp_path)],
        "adapter": ["prune", str(folder), str(tmp_path / "out"), "--adapter"],
        "eval": ["eval", str(folder), "--text", text_of(tmp_path), "--length", "64", "--windows", "2"],
        "bench": ["bench", str(folder), "--batch-sizes", "1", "--prompt-lengths", "8", "--load-repeats", "0"],
    }


# --- code ---------------------------------------------------------------------------------------------------------


def plant(folder: Path, proof: Path) -> None:
    code = (
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import LlamaConfig as Mine, LlamaForCausalLM as Ours\n"
    )
    code += "from transformers import PreTrainedTokenizerFast as Words\n"
    (folder / "mine.py").write_text(code)
    names = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Ours"}
    edit(folder / "config.json", auto_map=names)
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "mine.Words"]}, tokenizer_class="Words")


def test_a_tokenizer_that_saves_as_another_one() -> None:
    """As transformers 5.4 and 5.5 make them of GGUF files: the class is not the one whose rules these are."""
    tokenizer = byte_tokenizer()
    _check_saved(tokenizer, "model.gguf")
    wrong = CodeLlamaTokenizer(vocab=tokenizer.get_vocab(), merges=[], unk_token="</s>")
    wrong._tokenizer = tokenizer.backend_tokenizer
    with pytest.raises(CheckpointError, match=r"misreads the tokenizer in model\.gguf.* upgrade: pip install"):
        _check_saved(wrong, "model.gguf")


@pytest.mark.parametrize("command", ["inspect", "prune", "rank", "adapter", "eval", "bench"])
@pytest.mark.parametrize("known", [False, True])
def test_code_in_a_folder_never_runs(
    copy: Path, tmp_path: Path, command: str, known: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    plant(copy, tmp_path / "proof")
    if not known:
        edit(copy / "config.json", model_type="mine")
    code = main(commands(copy, tmp_path)[command])
    assert not (tmp_path / "proof").exists()
    if known:
        assert code in (0, 1)
    else:
        assert code == 1
        line = one_line_of(capsys)
        assert "needs code of its own (auto_map in its config.json), which is not run" in line or command == "eval"


@pytest.mark.parametrize("field", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_kernels_of_a_repository_never_run(copy: Path, field: str, capsys: pytest.CaptureFixture[str]) -> None:
    for fields in ({field: "someone/kernels"}, {"a": {"b": {field: "someone/kernels"}}}):
        edit(copy / "config.json", **fields)
        assert main(["inspect", str(copy)]) == 1
        assert f"would run code of someone/kernels ({field} in its config.json)" in one_line_of(capsys)
        edit(copy / "config.json", **dict.fromkeys(fields))


# --- weights ------------------------------------------------------------------------------------------------------


def change_weights(path: Path, *, without: str = "", extra: str = "", narrow: str = "") -> None:
    tensors = load_file(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name != without}
    if extra:
        tensors[extra] = torch.zeros(2)
    if narrow:
        tensors[narrow] = tensors[narrow][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})


DAMAGES = {
    "missing": ({"without": "model.layers.2.mlp.up_proj.weight"}, "lacks model.layers.2.mlp.up_proj.weight"),
    "missing norm": ({"without": "model.norm.weight"}, "lacks model.norm.weight"),
    "unexpected": ({"extra": "model.layers.2.mlp.gate.weight"}, "has weights that the model has no place for"),
    "mismatched": ({"narrow": "model.layers.2.mlp.up_proj.weight"}, "up_proj"),
}


@pytest.mark.parametrize("command", ["prune", "rank", "adapter", "eval", "bench"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_weights_that_do_not_fit_are_refused(
    copy: Path, tmp_path: Path, command: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    how, message = DAMAGES[damage]
    change_weights(copy / "model.safetensors", **how)
    assert main(commands(copy, tmp_path)[command]) == 1
    assert message in one_line_of(capsys)


def test_weights_that_are_tied_are_not_missed(model: Path) -> None:
    """The head of this model is its embedding matrix, and stands in no file."""
    assert "lm_head.weight" not in load_file(model / "model.safetensors")
    assert load_base(model).lm_head.weight is not None


def test_a_gguf_file_that_lacks_a_tensor_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(CheckpointError, match="lacks"):
        load_base(path)


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["layer_drop", "lora"])
def adapter(request: pytest.FixtureRequest, model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    if request.param == "layer_drop":
        config: Any = LayerDropConfig(base_model_name_or_path=str(model), drop_layers=[5, 6])
        prune_with(config).save_pretrained(folder)
    else:
        get_peft_model(load_base(model), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    assert load_model(folder).num_parameters() > 0
    return folder


def test_a_pickled_adapter_is_not_read(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.rename(adapter / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"has no adapter_model.safetensors, and pickled weights \(.bin\)"):
        load_model(adapter)


@pytest.mark.parametrize("what", ["missing", "unexpected"])
def test_adapter_weights_that_do_not_fit_are_refused(adapter: Path, what: str) -> None:
    weights = adapter / "adapter_model.safetensors"
    first = next(iter(load_file(weights)))
    lacks = rf"(lacks |KeyError: '){re.escape(first)}"  # PEFT itself looks for some of them
    message = {"missing": lacks, "unexpected": "has weights that the model has no place for: stray"}[what]
    change_weights(weights, **({"without": first} if what == "missing" else {"extra": "stray"}))
    with pytest.raises(CheckpointError, match=message):
        load_model(adapter)


# --- what is shown ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("evil", ["\x1b]0;owned\x07", "\x1b[2J", "\u202eevil", "\x00", "\x9b31m", "\ud83d"])
def test_characters_that_a_terminal_obeys_are_escaped(
    copy: Path, tmp_path: Path, evil: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(copy / "config.json", model_type=f"a{evil}b")
    for words in commands(copy, tmp_path).values():
        assert main(words) in (1, 2)
        out, err = capsys.readouterr()
        assert evil not in out + err


def test_debug_shows_where_an_error_came_from(
    copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "config.json").write_text("{")
    for words in (["inspect", str(copy), "--debug"], ["--debug", "inspect", str(copy)]):
        assert main(words) == 1
        assert "Traceback" in capsys.readouterr().err
    assert main(["inspect", str(copy)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("HF_LAYERPRUNE_DEBUG", "1")
    assert main(["inspect", str(copy)]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("run", "error"), [
    (lambda args: {}["no\x1bsuch"], "internal error: KeyError: 'no\\x1bsuch'"),
    (lambda args: Version("v"), "internal error in packaging: Invalid version: 'v'"),
])  # fmt: skip
def test_an_unexpected_error_is_one_line(
    run: Any, error: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_layerprune.commands.inspect.run", run)
    assert main(["inspect", "model"]) == 1
    assert capsys.readouterr().err == f"hf-layerprune: {error}; --debug shows where it came from\n"


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (PermissionError(13, "Permission denied", "a/b"), "Permission denied"),  # "can't read a/b" names it already
        (PermissionError(13, "Permission denied", "other"), "other: Permission denied"),
        (FileNotFoundError(2, "No such file or directory"), "No such file or directory"),
        (FileNotFoundError("No such file or directory: c"), "No such file or directory: c"),
        (FileNotFoundError(f"No such file or directory: {__file__}"), f"{__file__}: Permission denied"),
        (FileNotFoundError("No such file or directory: {tmp}/broken"), "No such file or directory: {tmp}/broken"),
        (OSError("c is not a folder"), "c is not a folder"),
        (OSError("Expecting value", "<html>", 0), "[Errno Expecting value] <html>: 0"),  # as libraries make them
        (OSError("c", ValueError("d")), "[Errno c] d"),
    ],
)
def test_what_the_system_says_of_a_file(error: OSError, cause: str, tmp_path: Path) -> None:
    (tmp_path / "broken").symlink_to("gone")
    if len(error.args) == 1:
        error.args = (error.args[0].replace("{tmp}", str(tmp_path)),)
    with pytest.raises(CheckpointError) as found, boundary("can't read a/b"):
        raise error
    assert str(found.value) == f"can't read a/b: {cause}".replace("{tmp}", str(tmp_path))


@pytest.mark.parametrize("words", [[], ["--debug"]])
@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a1" * 17,
        "https://me:secret@mirror/m",
        "https:/:secret@mirror/m",
        "https://storage/file?X-Amz-Expires=9&X-Amz-Signature=" + "a1" * 32,
        "https://cdn/file?Expires=9&Policy=a1a1&Signature=a1a1~2&Key-Pair-Id=K",
        "https://storage/file?as=(1)&sig=a1a1",
        "Max retries exceeded with url: /file?X-Amz-Security-Token=a1a1&amp;X-Amz-Signature=a1a1 (timed out)",
    ],
)
def test_secrets_are_masked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, words: list[str], secret: str
) -> None:
    monkeypatch.setattr("hf_layerprune.commands.inspect.run", lambda args: {}[secret])
    assert main(["inspect", "model", *words]) == 1
    error = capsys.readouterr().err
    assert "***" in error
    assert "secret@" not in error
    assert "a1a1" not in error
    library = logging.getLogger("library")
    library.addHandler(handler := logging.StreamHandler())  # such as the Hub client's
    library.error("Retrying %s", secret)
    library.removeHandler(handler)
    error = capsys.readouterr().err
    assert "Retrying" in error
    assert "***" in error
    assert "secret@" not in error
    assert "a1a1" not in error


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not UTF-8"),
        (b'{"a": 1, "a": 2}', "key 'a' is repeated"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": 1e999}', "larger than any float"),
        (b'{"a": ' + b"1" * 5000 + b"}", "usable JSON"),
        (b"[" * 100_000, "nested more than"),
        (b"[" * 100 + b"]" * 100, "nested more than 64 levels"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b"[1]", "where a JSON object is expected"),
        (b" " * 40_000_000, "larger than 33,554,432 bytes"),
    ],
)
def test_json_that_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "some.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_object(path)
    assert str(path) in str(caught.value)


def test_a_key_that_is_repeated_among_many_is_found_at_once(tmp_path: Path) -> None:
    path = tmp_path / "some.json"
    path.write_text("{" + "".join(f'"k{i}": 1, ' for i in range(50_000)) + '"a": 1, "a": 2}')
    began = time.process_time()
    with pytest.raises(CheckpointError, match="key 'a' is repeated"):
        read_object(path)
    assert time.process_time() - began < 10


def test_yaml_that_grows_when_it_is_read_is_refused(tmp_path: Path) -> None:
    lines = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    text = "\n".join(["a0: &a0 [x, x]", *lines, "license: [*a9, mit]"])
    path = tmp_path / "some.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="more than 1,000,000 values"):
        read_yaml(path)
    (tmp_path / "README.md").write_text(f"---\n{text}\n---\n")
    with pytest.raises(CheckpointError, match="more than 1,000,000 values"):
        split_front_matter((tmp_path / "README.md").read_text())
    assert declared_fields(tmp_path) == {}


def test_a_card_with_a_tag_that_fails_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"the YAML block of README\.md can't be read"):
        split_front_matter("---\nlicense: !!bool perhaps\n---\n")


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path / "pipe", "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "x", "exist"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_text(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 10_000_000}, "at num_hidden_layers: 10000000 is greater than the maximum of 1000"),
        ({"num_hidden_layers": 0}, "at num_hidden_layers"),
        ({"num_hidden_layers": -4}, "at num_hidden_layers"),
        ({"num_hidden_layers": "8"}, "at num_hidden_layers"),
        ({"num_hidden_layers": True}, "at num_hidden_layers"),
        ({"num_hidden_layers": 4.5}, "at num_hidden_layers"),
        ({"text_config": {"n_layer": 10**9}}, "at text_config/n_layer: 1000000000 is greater than"),
        (
            {"thinker_config": {"text_config": {"num_hidden_layers": 10**9}}},
            "at thinker_config/text_config/num_hidden",
        ),
        ({"some_tower_config": {"depth": 10**9}}, "at some_tower_config/depth"),
        ({"model_type": 5}, "at model_type"),
        ({"model_type": None}, "has no model_type"),
        ({"num_labels": 10**9}, "at num_labels"),
        ({"vocab_size": 10**12}, "at vocab_size"),
        ({"transformers_weights": "adapter_model.bin"}, "at transformers_weights"),
        ({"transformers_weights": "other.safetensors.index.json"}, "at transformers_weights"),
        ({"transformers_weights": "../model.safetensors"}, "at transformers_weights"),
        ({"layer_drop": {"drop_layers": "2", "num_base_layers": 9}}, "at layer_drop/drop_layers"),
    ],
)
def test_a_config_is_checked_before_anything_is_built(copy: Path, fields: dict[str, Any], message: str) -> None:
    edit(copy / "config.json", **fields)
    for load in (load_config, load_base, load_pruned_at_two):
        with pytest.raises(CheckpointError, match=message):
            load(copy)


def load_pruned_at_two(folder: Path) -> Any:
    return prune_with(LayerDropConfig(base_model_name_or_path=str(folder), drop_layers=[2]))


# --- where numbers go ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_numbers_overwrite_nothing_but_numbers(
    model: Path, copy: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("words")
    link = tmp_path / "link.json"
    link.symlink_to(precious)
    os.mkfifo(tmp_path / "pipe")
    before = {path: path.read_bytes() for path in (*model.iterdir(), *copy.iterdir(), precious)}
    outputs = [link, precious, tmp_path, tmp_path / "pipe", Path("/dev/null"), copy / "config.json"]
    outputs += [model / "model.safetensors", model / "new.json", copy / ".." / "copy" / "tokenizer.json"]
    for output in outputs:
        words = [*commands(copy, tmp_path)[command], "--base", str(model), "--output", str(output)]
        assert main(words) == 1
        assert re.search(
            "(choose|specify) (a|another) file|is inside .*, which is only read|the source itself", one_line_of(capsys)
        )
    assert {path: path.read_bytes() for path in before} == before


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(CheckpointError, match="names no model"):
        as_path([["org/name"]])  # type: ignore[arg-type]


def test_stored_answers_are_read_back_or_not_used(tmp_path: Path) -> None:
    path = answers_file(tmp_path, {"task": "piqa"})
    run = TaskRun({"acc": Score(0.5, 0.1, True, 0.5, {"0": 1.0})}, samples=1, shots=0, version=1.0, seconds=2.0)
    save_answers(path, run)
    assert load_answers(path) == run
    for old, new in (('"seconds": 2.0', '"seconds": "long"'), ('"scores"', '"points"')):
        path.write_text(path.read_text().replace(old, new))
        assert load_answers(path) is None
        save_answers(path, run)


def test_an_assertion_without_words_says_what_was_asserted(tmp_path: Path) -> None:
    (tmp_path / "library.py").write_text("def answer(tokens):\n    assert len(tokens) > 0\n")
    answer = runpy.run_path(str(tmp_path / "library.py"))["answer"]
    said = r"the task fails: AssertionError: assert len\(tokens\) > 0; omit it"
    with pytest.raises(CheckpointError, match=said), boundary("the task fails", "omit it"):
        answer([])


def test_where_memory_runs_out_no_setting_is_wrong() -> None:
    said = "can't resume it: out of memory; run it where more memory is free$"
    with pytest.raises(CheckpointError, match=said), boundary("can't resume it", "train the same weights"):
        raise torch.OutOfMemoryError("out of memory")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no file here is always full")
@pytest.mark.parametrize("size", [10, 1_000_000])
def test_what_torch_says_of_a_full_disk_is_understood(size: int) -> None:
    with pytest.raises(CheckpointError, match="could not be written whole; free some space"), boundary("can't train"):
        torch.save(torch.zeros(size), "/dev/full")


def test_a_report_that_is_silenced_can_be_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "some issues; look at the above report!"
    for verbosity, shown in (
        ("error", "the above report, which TRANSFORMERS_VERBOSITY=warning shows"),
        ("warning", said),
    ):
        monkeypatch.setenv("TRANSFORMERS_VERBOSITY", verbosity)
        with pytest.raises(CheckpointError, match=f"{shown}$"), boundary("can't load it"):
            raise RuntimeError(said)
