"""The command line as a person meets it: what it prints, what it leaves behind, and how it fails."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_layerprune import LayerDropConfig, drop_layers
from hf_layerprune.cli import build_parser, main
from hf_layerprune.options import format_bytes

from .folders import snapshot
from .limits import largest_file
from .matrix import logits as logits_of, realign
from .measure_models import write_gguf
from .tiny_models import EAGER, tiny_config, tiny_input, tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("qwen3_moe").save_pretrained(folder)
    return folder


def read(folder: Path, loader: Any = AutoModelForCausalLM) -> Any:
    return realign(loader.from_pretrained(folder, dtype=torch.float32, **EAGER))


def logits(folder: Path) -> torch.Tensor:
    return logits_of(read(folder), tiny_input())


def expected(base: Path, layers: list[int]) -> torch.Tensor:
    model = read(base)
    drop_layers(model, layers)
    return logits_of(model, tiny_input())


@pytest.mark.parametrize(
    ("words", "layers"),
    [
        ([], [6, 7]),
        (["--drop", "0.4"], [5, 6, 7]),
        (["--drop", "3", "--protect-last", "1"], [4, 5, 6]),
        (["--drop-layers", "1-2,6"], [1, 2, 6]),
        (["--drop", "2", "--protect-first", "5", "--protect-last", "1", "--criterion", "random"], [5, 6]),
    ],
)
def test_prune(
    base: Path, tmp_path: Path, words: list[str], layers: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = snapshot(base)
    out = tmp_path / "deep" / "out"
    assert main(["prune", str(base), str(out), *words]) == 0
    assert f"{8 - len(layers)} left" in capsys.readouterr().out
    assert torch.equal(logits(out), expected(base, layers))
    assert snapshot(base) == before
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]

    lineage = json.loads((out / "lineage.json").read_text())
    assert lineage["base"]["id"] == str(base)
    assert set(lineage["base"]["files"]) == {"config.json", "generation_config.json", "model.safetensors"}
    assert all(len(entry["sha256"]) == 64 for entry in lineage["base"]["files"].values())
    (entry,) = lineage["entries"]
    assert entry["stage"] == "prune"
    assert entry["settings"]["drop_layers"] == layers
    assert entry["layers"] == {"base": 8, "left": 8 - len(layers)}
    assert entry["seconds"] > 0
    assert entry["peak_memory_bytes"] > 1e6
    assert entry["versions"]["transformers"]


def test_pruning_twice_keeps_the_history(base: Path, tmp_path: Path) -> None:
    assert main(["prune", str(base), str(tmp_path / "a"), "--drop", "2"]) == 0
    assert main(["prune", str(tmp_path / "a"), str(tmp_path / "b"), "--drop-layers", "0"]) == 0
    lineage = json.loads((tmp_path / "b" / "lineage.json").read_text())
    assert lineage["base"]["id"] == str(base)
    assert [entry["settings"]["drop_layers"] for entry in lineage["entries"]] == [[6, 7], [0]]
    assert torch.equal(logits(tmp_path / "b"), expected(base, [0, 6, 7]))


def test_the_working_folder_as_the_base(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(base)
    assert main(["prune", ".", str(tmp_path / "out"), "--drop", "2"]) == 0
    monkeypatch.chdir(tmp_path)
    assert json.loads((tmp_path / "out" / "lineage.json").read_text())["base"]["id"] == str(base)
    assert main(["verify", "out"]) == 0


def test_dtype(base: Path, tmp_path: Path) -> None:
    assert main(["prune", str(base), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert AutoConfig.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_adapter(base: Path, tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    words = ["--adapter", "--drop-layers", "2,3,5", "--tune-layers", "1", "--no-tune-lm-head"]
    assert main(["prune", str(base), str(tmp_path / "out"), *words]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "lineage.json"} <= set(os.listdir(tmp_path / "out"))
    assert not (tmp_path / "out" / "model.safetensors").exists()
    model = read(tmp_path / "out", AutoPeftModelForCausalLM)
    assert torch.equal(logits_of(model, tiny_input()), expected(base, [2, 3, 5]))
    assert model.peft_config["default"].modules_to_save == ["model.layers.4", "model.norm"]


def test_force_replaces_and_nothing_else_does(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert main(["prune", str(base), str(out)]) == 0  # an empty folder is no obstacle
    (out / "further").mkdir()
    first = snapshot(out)
    assert main(["prune", str(base), str(out), "--drop", "3"]) == 1
    error = capsys.readouterr().err
    assert "exists and is not empty; replace it with --force" in error
    assert snapshot(out) == first
    assert main(["prune", str(base), str(out), "--drop", "3", "--force"]) == 0
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 5
    assert not (out / "further").exists()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize(
    "words", [["prune"], ["prune", "--repair", "borrow"], ["rank"], ["rank", "--curve"], ["advise"]], ids=" ".join
)
def test_an_output_that_is_taken_is_told_before_torch_is_imported(
    base: Path, tmp_path: Path, words: list[str]
) -> None:
    (tmp_path / "notes").write_text("mine")
    command = [words[0], str(base), str(tmp_path), *words[1:]]
    script = (
        f"import sys; from hf_layerprune.cli import build_parser, main; print(main({command}), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "1 False\n", done.stderr
    assert str(tmp_path) in done.stderr
    assert done.stderr.count("\n") == 1


def bad_bases(tmp_path: Path) -> dict[str, Path]:
    empty, encoder, vision, broken = (tmp_path / name for name in ("empty", "encoder", "vision", "broken"))
    empty.mkdir()
    config = tiny_config("bert")
    config.is_decoder = False
    config.save_pretrained(encoder)
    from transformers import ViTConfig

    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4).save_pretrained(vision)
    broken.mkdir()
    (broken / "config.json").write_text("{")
    text = tmp_path / "model.txt"
    text.write_text("no model")
    refused = tmp_path / "refused"
    tiny_config("diffllama").save_pretrained(refused)
    weightless = tmp_path / "weightless"
    tiny_config("llama").save_pretrained(weightless)
    adapter = tmp_path / "adapter"
    LayerDropConfig(drop_layers=[1]).save_pretrained(adapter)
    return {
        "empty": empty, "encoder": encoder, "vision": vision, "broken": broken, "text": text, "refused": refused,
        "weightless": weightless, "absent": tmp_path / "absent", "adapter": adapter,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("empty", "has no config.json"),
        ("adapter", "is an adapter, not a model; merge it"),
        ("encoder", "it is an encoder"),
        ("vision", "not among the"),
        ("broken", "config.json is not JSON"),
        ("text", "is a file; specify a model folder"),
        ("refused", "its attention's lambda"),
        ("weightless", "weightless"),
        ("absent", "does not exist"),
    ],
)
def test_bad_base(tmp_path: Path, which: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = bad_bases(tmp_path)[which]
    assert main(["prune", str(path), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert len(error.strip().splitlines()[-1]) < 600
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_no_network_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "some-org/some-model", str(tmp_path / "out")]) == 1
    assert "some-org/some-model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drop", "1.5"], "--drop 1.5 must be a fraction between 0 and 1"),
        (["--drop", "0"], "--drop 0 must be"),
        (["--drop", "-3"], "--drop -3 must be"),
        (["--drop", "0.05"], "less than one layer; to drop one, use --drop 1"),
        (["--drop", "8"], "would drop all 8 layers"),
        (["--drop", "nan"], "--drop nan must be"),
        (["--drop", "9" * 5000], "must be a fraction"),
        (["--steps", "1e3"], "'1e3' must be a whole number from 1"),
        (["--protect-last", "9" * 5000], "must be a whole number"),
        (["--calibration", ""], "must be a string of 1 to"),
        (["--tune-layers", "all"], "--tune-layers all must be a number of last layers"),
        (["--drop", "many"], "'many' must be a fraction between 0 and 1, or a whole number of layers"),
        (["--drop-layers", "8"], "--drop-layers has 8, but the model's layers are 0..7"),
        (["--drop-layers", "0-7"], "all 8 layers"),
        (["--drop-layers", "1,1"], "--drop-layers has 1 more than once"),
        (["--drop-layers", "6-4"], "runs backwards"),
        (["--drop-layers", ""], "--drop-layers: '' is neither a layer nor a range"),
        (["--drop", "2", "--drop-layers", "1"], "not allowed with argument"),
        (["--criterion", "vibes"], "criterion 'vibes' is unknown"),
        (["--criterion", "\x1b[31m"], "criterion '\\x1b[31m' is unknown"),
        (["--protect-first", "7"], "only 1 may be dropped (--protect-first 7, --protect-last 0)"),
        (["--adapter", "--tune-layers", "7"], "--tune-layers 7, but the cut leaves 6 layers"),
        (["--tune-layers", "2"], "--tune-layers 2 has no effect without --adapter; leave it out"),
        (["--no-tune-lm-head"], "--no-tune-lm-head has no effect without --adapter"),
        (["--adapter", "--link"], "--link shares weight files with the base, but"),
        (["--dtype", "float16", "--link"], "--link shares weight files with the base, but"),
        (["--drop_layers", "1"], "unrecognized arguments: --drop_layers 1; did you mean --drop-layers? (see "),
        (["--bogus"], "unrecognized arguments: --bogus (see "),
        (["another"], "unrecognized arguments: another (see hf-layerprune prune --help)"),
    ],
)
def test_bad_words(
    base: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["prune", str(base), str(tmp_path / "out"), *words])
    except SystemExit as error:  # argparse
        code = error.code
    assert code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert len(error) < 600
    assert os.listdir(tmp_path) == []


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quiet"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "drop layers and write the remaining model" in err


@pytest.mark.parametrize(
    ("command", "output", "ending"),
    [
        ("prune", "out.gguf2", ".gguf"),
        ("prune", "out.GGFU", ".gguf"),
        ("prune", "out.safetensors", ".safetensors"),
        ("rank", "scores.json", ".json"),
    ],
)
def test_a_folder_with_the_name_of_a_file_is_a_slip(
    command: str, output: str, ending: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(base), str(tmp_path / output)]) == 1
    assert f"{output} would be a folder, but its name looks like that of a {ending} file" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("output", ["base-0.6B-GGUF", "base-1.7B-safetensors"])
def test_a_folder_may_be_named_after_a_size_and_a_format(output: str, base: Path, tmp_path: Path) -> None:
    assert main(["prune", str(base), str(tmp_path / output), "--drop-layers", "2"]) == 0
    assert (tmp_path / output / "config.json").is_file()


@pytest.mark.parametrize("words", [["base", "--curve", "out"], ["base", "out", "--curve"], ["--curve", "base", "out"]])
def test_arguments_stand_before_or_after_options(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    args = build_parser().parse_args(["rank", *words])
    assert (args.base, args.output, args.curve) == ("base", Path("out"), True)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["rank", *words, "more"])
    assert "unrecognized arguments: more (see" in capsys.readouterr().err


def test_a_home_of_nobody(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["~no-such-user/m", str(tmp_path / "out")], [str(base), "~no-such-user/out"]):
        assert main(["prune", *words]) == 1
        assert capsys.readouterr().err.startswith(
            "hf-layerprune: a path starts with ~ and the name of a user who does not"
        )


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_write_that_fails_leaves_nothing(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Writes fail half-way, as on a full disk."""
    for form in ([], ["--dtype", "float16"], ["--adapter"]):
        with largest_file(20_000):
            assert main(["prune", str(base), str(tmp_path / "out"), *form]) == 1
        error = capsys.readouterr().err
        assert f"could not write {tmp_path / 'out'}" in error
        assert ".partial-" not in error
        assert "Traceback" not in error
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "words", [["prune", "--repair", "linear", "--drop", "2"], ["rank"], ["rank", "--curve"]], ids=" ".join
)
def test_a_folder_that_cannot_be_written_is_refused_at_once(
    base: Path, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before layers are chosen, which may take hours."""
    monkeypatch.setattr("hf_layerprune.files.folders.os.access", lambda path, mode: path != tmp_path)
    assert main([words[0], str(base), str(tmp_path / "a" / "b"), *words[1:]]) == 1
    assert f"{tmp_path} is not a writable folder, so {tmp_path / 'a' / 'b'} can't be" in capsys.readouterr().err


def test_inspect(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    assert main(["inspect", str(base)]) == 0
    out = capsys.readouterr().out
    assert f"{model.num_parameters():,}" in out
    assert "drops 2 layers and leaves 6 of 8" in out
    assert "model.layers" in out
    assert main(["inspect", str(base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert " ".join(sorted(found)) == (
        "architecture base base_layers context dropped dropped_before embeddings engine_warning file_bytes head layers layers_path left "
        "memory_bytes model_type no_cut other parameters protected refusal refused_at repairs tied"
    )  # for scripts
    assert found["file_bytes"][0] == sum(path.stat().st_size for path in base.glob("*.safetensors"))
    assert found["memory_bytes"][0] > found["memory_bytes"][1] > found["file_bytes"][1]
    assert (
        f"{format_bytes(found['file_bytes'][1])} of weight files, {format_bytes(found['memory_bytes'][1])} in memory."
        in out
    )
    assert f"key-value cache of {found['context']:,} tokens" in out


def test_inspect_of_given_layers(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same numbers as `prune` then writes."""
    assert main(["inspect", str(base), "--drop-layers", "2,4-5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(base), "--drop-layers", "2,4-5"]) == 0
    out = capsys.readouterr().out
    assert f"A cut of layers 2,4-5 leaves 5 of 8: {found['left']:,} parameters" in out
    assert out.endswith(f"next: hf-layerprune prune {base} pruned --drop-layers 2,4-5\n")
    assert main(["prune", str(base), str(tmp_path / "a"), "--drop-layers", "2,4-5"]) == 0
    assert found["dropped"] == [2, 4, 5]
    assert found["left"] == AutoModelForCausalLM.from_pretrained(tmp_path / "a").num_parameters()
    assert found["file_bytes"][1] == sum(path.stat().st_size for path in (tmp_path / "a").glob("*.safetensors"))
    capsys.readouterr()
    assert main(["inspect", str(base), "--drop-layers", "8"]) == 2
    assert capsys.readouterr().err == "hf-layerprune: --drop-layers has 8, but the model's layers are 0..7\n"


def test_inspect_names_the_base_of_a_cut_of_a_cut(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert main(["prune", str(base), str(once), "--drop-layers", "2"]) == 0
    assert main(["prune", str(once), str(twice), "--drop-layers", "4"]) == 0
    capsys.readouterr()
    assert main(["inspect", str(twice)]) == 0
    assert f"it is a cut model, without layers 2,5 of the 8 of {base.name}\n" in capsys.readouterr().out
    (twice / "lineage.json").unlink()
    assert main(["inspect", str(twice)]) == 0
    assert "it is a cut model, without layer 4 of the 7 of its base\n" in capsys.readouterr().out


def test_inspect_of_a_gguf_file_is_about_a_cut_that_stays_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, cut = write_gguf(tmp_path / "base.gguf"), tmp_path / "pruned.gguf"
    assert main(["inspect", str(base), "--drop-layers", "2", "--json"]) == 0
    size = json.loads(capsys.readouterr().out)["file_bytes"][1]
    assert main(["inspect", str(base), "--drop-layers", "2"]) == 0
    assert capsys.readouterr().out.endswith(f"next: hf-layerprune prune {base} pruned.gguf --drop-layers 2\n")
    assert main(["prune", str(base), str(cut), "--drop-layers", "2"]) == 0
    assert cut.stat().st_size == size


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        ((), True),
        (("--drop", "1"), True),
        (("--criterion", "random"), False),
        (("--drop-layers", "6-7"), False),
    ],
)
def test_prune_says_that_the_default_suits_large_models(
    words: tuple[str, ...], is_told: bool, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hf_layerprune")
    assert main(["prune", str(base), str(tmp_path / "a"), *words]) == 0
    assert ("a block in the middle does far better (criterion auto, contiguous)" in caplog.text) == is_told


def test_prune_says_so_of_a_gguf_file_that_stays_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hf_layerprune")
    write_gguf(tmp_path / "base.gguf")
    assert main(["prune", str(tmp_path / "base.gguf"), str(tmp_path / "a.gguf"), "--drop", "1"]) == 0
    assert "a block in the middle does far better (criterion auto, contiguous)" in caplog.text
    caplog.clear()
    assert main(["prune", str(tmp_path / "base.gguf"), str(tmp_path / "b.gguf"), "--drop-layers", "3"]) == 0
    assert "does far better" not in caplog.text


def test_prune_does_not_advise_what_it_would_refuse(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hf_layerprune")
    tiny_model("xlnet").save_pretrained(tmp_path / "base")
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "a"), "--drop", "1"]) == 0
    assert "does far better" not in caplog.text
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "b"), "--criterion", "auto", "--contiguous"]) == 1


def test_prune_does_not_advise_against_the_paper_for_its_own_models(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_layerprune.select.reverse_order.PAPER_SIZE", 1)
    caplog.set_level("INFO", "hf_layerprune")
    assert main(["prune", str(base), str(tmp_path / "a")]) == 0
    assert "does far better" not in caplog.text


def test_a_reader_that_has_read_enough(base: Path) -> None:
    """`python -m hf_layerprune inspect BASE | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-m", "hf_layerprune", "inspect", str(base)]
    done = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=600)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("to", "code", "said"),
    [
        (">&-", 0, ""),
        (
            ">/dev/full",
            1,
            "hf-layerprune: the command is done, but its result can't be shown: No space left on device\n",
        ),
    ],
)
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_a_result_that_can_not_be_shown(base: Path, to: str, code: int, said: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m hf_layerprune inspect {shlex.quote(str(base))} {to}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_terminal_that_lacks_characters() -> None:
    """What took an hour to measure is shown all the same."""
    script = "from hf_layerprune import cli; cli.configure_output(); print('1 \u00b1 2')"
    env = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert (done.stdout, done.stderr) == ("1 \\xb1 2\n", "")


def test_inspect_of_what_cannot_be_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("diffllama").save_pretrained(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "It can't be pruned: model type 'diffllama'" in capsys.readouterr().out
    from transformers import ViTConfig

    ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path / "b")
    assert main(["inspect", str(tmp_path / "b")]) == 1
    assert "a vit model has no language decoder of its own" in capsys.readouterr().err


def test_inspect_tells_of_tied_heads_and_protected_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_config("gpt_neox_japanese").save_pretrained(tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 0
    assert "layer 7 must stay: it is the only layer with an output bias" in capsys.readouterr().out
    tiny_config("gemma2").save_pretrained(tmp_path / "b")
    assert main(["inspect", str(tmp_path / "b"), "--drop", "1"]) == 0
    assert "tied to the embeddings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model_type", "told"),
    [
        ("mamba", "a cut of it can be repaired by linear, refit, magnitude"),
        ("mixtral", "a cut of it can be repaired by linear, magnitude"),
        ("bert", "model type 'bert' can't be repaired: "),
        ("mllama", "an image; leave the repair out, and train the pruned model with transformers' Trainer"),
    ],
)
def test_inspect_tells_of_repairs(
    model_type: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_config(model_type).save_pretrained(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    assert told in capsys.readouterr().out


def test_what_reaches_the_screen(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the next command for people, nothing but the result with --quiet, one object with --json."""
    words = ["prune", str(base), "--drop-layers", "6,7"]
    assert main([*words, str(tmp_path / "a")]) == 0
    out = capsys.readouterr().out
    made = f"dropped layers 6-7 of 8: 6 left, in {tmp_path / 'a'}"
    assert out == f"{made}; next: hf-layerprune eval {tmp_path / 'a'} --base {base}\n"
    assert main(["--quiet", *words, str(tmp_path / "a"), "--force"]) == 0
    assert capsys.readouterr() == (f"{made}\n", "")
    assert main([*words, str(tmp_path / "b"), "--json"]) == 0
    answer = {"output": str(tmp_path / "b"), "dropped": [6, 7], "layers": 8, "form": "model"}
    assert json.loads(capsys.readouterr().out) == answer
    assert main(["inspect", str(base), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 8
    assert main(["verify", str(tmp_path / "b"), "--json"]) == 0
    verdict = json.loads(capsys.readouterr().out)
    assert (verdict["good"], {check["good"] for check in verdict["checks"]}) == (True, {True})
    assert main(["verify", str(tmp_path / "b"), "--quiet"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert not {"\x1b", "\r"} & set(said.out)


def test_a_path_that_does_not_exist_is_no_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (["inspect", "./gpt2"], ["inspect", "gpt2/"], ["rank", "./gpt2"], ["prune", "./gpt2", "out"]):
        assert main(words) == 1
        assert "does not exist; specify a model folder, a .gguf file, or a Hub id" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["hf_layerprune.cli", "argparse", "hf_layerprune.commands.verify", "torch"])
def test_an_interrupt_while_modules_are_imported_is_one_line_at_most(base: Path, module: str) -> None:
    script = f"""
import os, runpy, signal, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = ["inspect", {str(base)!r}]
runpy.run_module("hf_layerprune", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode in (130, -signal.SIGINT), done.stderr  # the same to a shell
    assert done.stdout == ""
    assert done.stderr in ("", "hf-layerprune: interrupted; nothing was left half-written\n")


def test_recipes_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    source = Path(__file__).parents[1] / "recipes"
    wanted = {path.relative_to(source) for path in source.rglob("*.*") if "__pycache__" not in path.parts}
    assert {path.relative_to("recipes") for path in Path("recipes").rglob("*.*")} == wanted
    assert "next: accelerate launch recipes/sft_tail.py --config recipes/configs/heal.yaml" in capsys.readouterr().out
    assert main(["recipes"]) == 1
    assert "recipes exists and is not empty; choose another folder" in capsys.readouterr().err  # there is no --force
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["recipes", "~/copied", "--json"]) == 0
    assert "sft_tail.py" in json.loads(capsys.readouterr().out)["files"]
