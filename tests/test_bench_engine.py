"""`hf-layerprune bench --engine`: in llama.cpp and vLLM, and what is said where one of them can't."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, PreTrainedConfig

from hf_layerprune.cli import main
from hf_layerprune.cut.gguf import cut_gguf
from hf_layerprune.files.gguf_header import read_header
from hf_layerprune.measure.engine_bench import _cost
from hf_layerprune.measure.engines.llama_cpp import LlamaCpp
from hf_layerprune.measure.report import report
from hf_layerprune.measure.requests import Workload
from hf_layerprune.publish.card.render import Card
from hf_layerprune.records.figures import numbers
from hf_layerprune.records.figures.results import build_results
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.metrics import Metrics

from .gguf_makers import all_of, array, make_gguf, number
from .measure_models import byte_tokenizer, write_gguf

pytestmark = pytest.mark.processes
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
FEW = ["--repeats", "3", "--prompt-lengths", "8,16", "--new-tokens", "4"]
# Answers as llama-bench does (tools/llama-bench/README.md in llama.cpp), with a time for each layer; it knows llama.
STAND_IN = """#!{python}
import json, sys
from gguf import GGUFReader
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
fields = GGUFReader(words["-m"]).fields
kind = fields["general.architecture"].contents()
if kind != "llama":
    sys.exit(f"llama_model_load: error loading model: unknown model architecture: '{{kind}}'")
if "blk.0.attn_norm.weight" not in (names := [tensor.name for tensor in GGUFReader(words["-m"]).tensors]):
    sys.exit("llama_model_load: error loading model: missing tensor 'blk.0.attn_norm.weight'")
speed = 1000 / fields["llama.block_count"].contents()
about = {{"build_number": 1, "build_commit": "abc", "gpu_info": "", "model_type": "llama 256M (guessed) all F32",
          "n_threads": int(words.get("-t", 1))}}
prompts, new = [int(n) for n in words["-p"].split(",")], int(words["-n"])
rows = [{{"n_prompt": n, "n_depth": 0, "n_gen": 0}} for n in prompts if n]
rows += [{{"n_prompt": 0, "n_depth": int(n), "n_gen": new}} for n in words.get("-d", "").split(",") if new]
print(json.dumps([about | row | {{"samples_ts": [speed]}} for row in rows]))
"""


@pytest.fixture(params=["the real one", "a stand-in"])
def llama_bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "the real one":
        if shutil.which("llama-bench") is None:
            pytest.skip("llama-bench is not on the PATH")
        return request.param
    program = tmp_path / "bin" / "llama-bench"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return request.param


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """A base, a GGUF file, and its cut: as a file, and as a folder."""
    base = write_gguf(tmp_path / "base.gguf", layers=6)
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "2-4", "--dtype", "float32"]) == 0
    cut_gguf(base, tmp_path / "cut.gguf", [2, 3, 4])
    return {"base": base, "cut": tmp_path / "cut.gguf", "folder": tmp_path / "cut"}


def bench(model: Path, base: Path, *words: str) -> int:
    return main(["bench", str(model), "--base", str(base), "--engine", "llama.cpp", *FEW, *words])


def test_both_are_timed_in_turns_beside_what_theory_allows(llama_bench, files, capsys):
    gguf = ["--gguf", str(files["cut"]), "--gguf", str(files["base"])]
    assert bench(files["folder"], files["base"], *gguf) == 0
    said = capsys.readouterr().out
    metrics = Metrics.load(files["folder"])
    rows = [one for one in metrics.results if one["kind"] == "speed"]
    assert len(rows) == 8  # two models, two lengths, reading and writing
    assert {one["settings"]["engine"] for one in rows} == {"llama.cpp"}
    assert {one["settings"]["batch"] for one in rows} == {1}
    assert {one["dtype"] for one in rows} == {"all F32"}
    assert all("llama.cpp" in one["versions"] for one in rows)
    assert {metrics.models[one]["layers"] for one in metrics.models} == {3, 6}
    # Half of the layers are left, and so is half of the work of reading; embeddings are read for writing as well.
    theory = {one["metric"]: one["theoretical_share"] for one in metrics.comparisons}
    assert theory["prefill_tokens_per_second"] == pytest.approx(2, rel=0.01)
    assert 1.3 < theory["decode_tokens_per_second"] < 2
    if llama_bench == "a stand-in":
        assert {round(one["share"], 3) for one in metrics.comparisons} == {2}
    assert "llama.cpp all F32, batch size 1, 16 prompt tokens, 4 new tokens" in said
    card = Card.from_records(Lineage.load(files["folder"]), metrics).body()
    assert "decode throughput, tokens/s, in llama.cpp all F32" in card


def test_theory_is_not_timed(llama_bench, files, tmp_path, monkeypatch):
    clock = [0.0]

    def slow_cost(path):
        clock[0] += 1000
        return _cost(path)

    monkeypatch.setattr("hf_layerprune.measure.engine_bench._cost", slow_cost)
    monkeypatch.setattr("hf_layerprune.measure.engine_bench.perf_counter", lambda: clock[0])
    assert bench(files["cut"], files["base"], "--output", str(tmp_path / "speed.json")) == 0
    assert {one["seconds"] for one in Metrics.load_file(tmp_path / "speed.json").results} == {0}


def test_files_alone_are_timed_as_well(llama_bench, files, tmp_path, capsys):
    assert bench(files["cut"], files["base"], "--output", str(tmp_path / "speed.json")) == 0
    assert len(Metrics.load_file(tmp_path / "speed.json").results) == 8


def of_kind(path: Path, kind: bytes) -> Path:
    """The same file, as one of another architecture."""
    copy = path.with_name(f"other-{path.name}")
    copy.write_bytes(path.read_bytes().replace(b"llama", kind))
    return copy


def test_an_unknown_architecture_is_told_apart_from_a_wrong_cut(llama_bench, files, tmp_path, capsys):
    output = ["--output", str(tmp_path / "speed.json")]
    unknown = {name: of_kind(files[name], b"lambs") for name in ("cut", "base")}
    assert bench(unknown["cut"], unknown["base"], *output) == 1
    said = capsys.readouterr().err.strip()
    assert "does not run" in said
    assert "either, so it does not know the architecture" in said
    assert "\n" not in said
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(files["cut"].read_bytes().replace(b"blk.0.attn_norm", b"blk.9.attn_norm"))
    output = ["--output", str(tmp_path / "other.json")]
    # Its header is read for theory only after the engine has run it.
    assert bench(broken, files["base"], *output) == 1
    said = capsys.readouterr().err.strip()
    assert "so it knows the architecture, and it is the cut or its file" in said
    words = ["bench", str(broken), "--engine", "llama.cpp", *FEW, *output]
    assert main(words) == 1
    assert "specify its base with --base to see whether" in capsys.readouterr().err


def write_folders(place: Path, config: PreTrainedConfig) -> dict[str, Path]:
    """A base and its cut, as folders."""
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(place / "base")
    byte_tokenizer().save_pretrained(place / "base")
    assert main(["prune", str(place / "base"), str(place / "cut"), "--drop-layers", "2,3"]) == 0
    return {"base": place / "base", "cut": place / "cut"}


def test_no_bytes_are_expected_of_a_quantised_folder(tmp_path):
    """The model that is counted is never quantised."""
    work, costs = Workload(1, 8, 4), []
    for name, more in (("whole", {}), ("packed", {"quantization_config": {"quant_method": "gptq", "bits": 4}})):
        LlamaConfig(**VLLM_TAKES, **more).save_pretrained(tmp_path / name)
        costs.append([_cost(tmp_path / name).estimate(kind, work) for kind in ("prefill", "decode")])
    assert costs[0][0] == costs[1][0]
    assert costs[0][1] > 0
    assert costs[1][1] is None


def test_of_a_mixture_the_experts_in_use_count(tmp_path):
    """Two of eight; only for reading weights does it matter how many sequences there are."""
    few = all_of(number("llama.expert_count", 8), number("llama.expert_used_count", 2))
    dense, mixture = (_cost(make_gguf(tmp_path / f"{n}.gguf", more=more)) for n, more in enumerate((None, few)))
    experts = [one for one in read_header(tmp_path / "0.gguf").tensors if "_exps." in one.name]
    bytes_idle = 0.75 * sum(one.size for one in experts)
    weights_idle = 0.75 * sum(prod(one.dimensions) for one in experts)
    for batch, idle in ((1, 1), (2, 0.75)):
        work = Workload(batch, 8, 4)
        assert mixture.estimate("decode", work) == dense.estimate("decode", work) - bytes_idle * idle
        assert mixture.estimate("prefill", work) == dense.estimate("prefill", work) - weights_idle
    by_layer = array("llama.expert_used_count", [8, 2, 8, 8, 2, 8], GGUFValueType.UINT32)
    own = _cost(make_gguf(tmp_path / "own.gguf", more=all_of(number("llama.expert_count", 8), by_layer)))
    assert own.estimate("prefill", work) == dense.estimate("prefill", work) - weights_idle * 2 / 6


# Heads of 32, as its kernels want.
VLLM_TAKES = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 6}


def bench_in_vllm(folders: dict[str, Path]) -> int:
    words = [str(folders["cut"]), "--base", str(folders["base"]), "--device", "cpu"]
    return main(["bench", *words, "--engine", "vllm", "--batch-sizes", "1,2", *FEW])


@needs_vllm
def test_vllm_times_folders_in_turns(tmp_path, capsys):
    folders = write_folders(tmp_path, LlamaConfig(vocab_size=259, intermediate_size=128, **VLLM_TAKES))
    assert bench_in_vllm(folders) == 0, capsys.readouterr().err
    metrics = Metrics.load(folders["cut"])
    rows = [one for one in metrics.results if one["kind"] == "speed"]
    assert {one["metric"] for one in rows} == {
        "prefill_tokens_per_second", "decode_tokens_per_second", "time_to_first_token",
    }  # fmt: skip
    assert len(rows) == 2 * 4 * 3  # models, workloads, metrics
    assert {one["settings"]["engine"] for one in rows} == {"vllm"}
    assert {one["settings"]["threads"] for one in rows} == {torch.get_num_threads()}
    assert {one["dtype"] for one in rows} == {"bfloat16"}
    assert all(one["samples"] == 3 and one["value"] > 0 for one in rows)
    assert (
        "decode throughput, tokens/s, in vllm bfloat16"
        in Card.from_records(Lineage.load(folders["cut"]), metrics).body()
    )


@needs_vllm
def test_vllm_tells_an_unknown_architecture_from_a_wrong_cut(tmp_path, capsys):
    wrong = write_folders(tmp_path / "wrong", LlamaConfig(vocab_size=259, intermediate_size=128, **VLLM_TAKES))
    tensors = load_file(wrong["cut"] / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"][:, :64].clone()
    save_file(tensors, wrong["cut"] / "model.safetensors", metadata={"format": "pt"})
    assert bench_in_vllm(wrong) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "so it knows the architecture, and it is the cut or its file that it can't take" in said
    sizes = {"vocab_size": 259, "hidden_size": 64, "num_heads": 2, "num_layers": 6, "max_position_embeddings": 128}
    config = GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 3]])
    assert bench_in_vllm(write_folders(tmp_path / "unknown", config)) == 1
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "either, so it does not know the architecture" in said


@pytest.mark.parametrize("engine", ["llama.cpp", "vllm"])
def test_a_missing_engine_is_one_line_with_its_installation(engine, files, tmp_path, monkeypatch, capsys):
    if engine == "vllm" and importlib.util.find_spec("vllm") is not None:
        pytest.skip("vLLM is installed here")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["bench", str(files["folder"]), "--engine", engine]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert {"llama.cpp": "brew install llama.cpp", "vllm": "pip install vllm"}[engine] in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gguf", "x.gguf"], "--gguf names what llama.cpp runs; add --engine llama.cpp"),
        (["--engine", "llama.cpp", "--base", "b", "--gguf", "x.gguf"], "--gguf needs two files, of MODEL and of BASE"),
        (["--engine", "llama.cpp"], "llama.cpp runs GGUF files, and"),
        (["--engine", "llama.cpp", "--gguf", "{base}"], "has 6 layers and"),
        (["--engine", "llama.cpp", "--gguf", "{cut}", "--batch-sizes", "4"], "use --batch-sizes 1"),
        (
            ["--engine", "llama.cpp", "--gguf", "{cut}", "--dtype", "float16"],
            "--dtype float16 has no effect in llama.cpp",
        ),
        (["--engine", "llama.cpp", "--gguf", "{cut}", "--device", "cuda:1"], "leave --device cuda:1 out"),
        (["--engine", "vllm", "--device", "mps"], "vLLM runs on cpu here; leave --device mps out"),
    ],
)
def test_what_can_not_be_timed_is_refused(words, says, llama_bench, files, capsys):
    words = [word.format(**files) for word in words]
    assert main(["bench", str(files["folder"]), *words]) != 0
    assert says in capsys.readouterr().err


def test_the_ratio_that_is_shown_is_that_of_runs_in_turn():
    """A machine that was busy during the dense runs that make its median is no gain."""
    own, dense = "a" * 64, "b" * 64
    metrics = Metrics(own)
    for weights, role, speed in ((own, "cut", 30.0), (dense, "dense", 10.0)):
        metrics.models[weights] = {"role": role, "name": role, "layers": 4, "parameters": 8}
        same = {"kind": "speed", "metric": "decode_tokens_per_second", "settings": {"batch": 1}, "date": "2026-11-26"}
        metrics.add(results=[same | {"weights": weights, "value": speed, "spread": [speed, speed], "versions": {}}])
    metrics.add(comparisons=[same | {"weights": own, "base": dense, "difference": 20.0, "share": 1.3}])
    results = build_results(metrics)
    (row,) = results.table(("speed",), every=True)
    assert row.cells[own].change == numbers.format_ratio(1.3)
    assert numbers.format_ratio(1.3) in report(metrics, ("speed",))
    metrics.comparisons.clear()  # as after a later `bench` of the pruned model alone
    for weights, size in ((own, 6e9), (dense, 8e9)):
        of_memory = {"kind": "memory", "metric": "peak_rss_bytes", "value": size, "spread": [size, size]}
        metrics.add(results=[same | of_memory | {"weights": weights, "versions": {}}])
    rows = build_results(metrics).table(("speed", "memory"), every=True)
    assert {row.key[0]: row.cells[own].change for row in rows} == {"speed": "", "memory": numbers.format_ratio(0.75)}


def test_an_answer_that_is_none_is_an_error(tmp_path, monkeypatch):
    program = tmp_path / "llama-bench"
    program.write_text("#!/bin/sh\necho nonsense\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    from hf_layerprune.measure.engines import EngineError
    from hf_layerprune.measure.requests import Workload

    with pytest.raises(EngineError, match="llama-bench answered 'nonsense"):
        LlamaCpp().time(["a.gguf"], [Workload(1, 8, 4)], 1, dtype="auto", device="cpu")
