"""`hf-layerprune bench`: what is timed, what is counted, and what is written of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import sdpa_flop_count
from transformers import MixtralConfig

from hf_layerprune import LayerPruneError, drop_layers
from hf_layerprune.adapter.loading import load_model
from hf_layerprune.cli import main
from hf_layerprune.measure import cost
from hf_layerprune.measure.bench import BenchRequest, bench
from hf_layerprune.measure.cost import (
    active_parameters,
    cache_bytes,
    decode_bytes,
    empty_model,
    prefill_flops,
    theoretical_cost,
)
from hf_layerprune.measure.probe import probe
from hf_layerprune.measure.requests import Workload
from hf_layerprune.measure.speed import time_models
from hf_layerprune.records.metrics import Metrics

from .measure_models import find
from .tiny_models import tiny_model

pytestmark = pytest.mark.processes
SMALL = {"batch_sizes": (1, 2), "prompt_lengths": (8, 32), "new_tokens": 4, "repeats": 3}
TIMED = ("prefill_tokens_per_second", "time_to_first_token", "decode_tokens_per_second")


@pytest.fixture
def cut(base: Path, tmp_path: Path) -> Path:
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "4-7"]) == 0
    return tmp_path / "cut"


def test_dense_and_pruned_side_by_side(base: Path, cut: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: dict[Any, dict[str, Any]] = {}

    def once(*words: Any) -> dict[str, Any]:
        """In a process of its own, but the rounds after the first have its numbers."""
        if words not in probed:
            probed[words] = probe(*words)
        return probed[words]

    monkeypatch.setattr("hf_layerprune.measure.bench.probe", once)
    found = bench(BenchRequest(str(cut), base=str(base), load_repeats=1, **SMALL))
    assert len(probed) == 2
    for loaded in probed.values():
        assert 0 < loaded["load_seconds"] < 60
        assert 50e6 < loaded["idle_rss_bytes"] <= loaded["peak_rss_bytes"]
        assert "peak_cuda_bytes" not in loaded
    ours = found.weights
    (dense,) = set(found.models) - {ours}
    assert Metrics.load(cut) == found
    for weights, folder in ((ours, cut), (dense, base)):
        assert find(found, weights, "bytes_on_disk")["value"] == (folder / "model.safetensors").stat().st_size
        assert find(found, weights, "parameters")["value"] == load_model(folder).num_parameters()
        # Of float32 keys and values of two heads of eight each.
        layers = found.models[weights]["layers"]
        assert find(found, weights, "kv_cache_bytes_per_token")["value"] == layers * 2 * 2 * 8 * 4
        for metric in ("load_seconds", "peak_rss_bytes"):
            record = find(found, weights, metric)
            assert record["spread"][0] <= record["value"] <= record["spread"][1]
        assert 50e6 < find(found, weights, "peak_rss_bytes")["value"] < 5e9
        for batch in (1, 2):
            for length in (8, 32):
                for metric in TIMED:
                    record = find(found, weights, metric, batch=batch, prompt_tokens=length, new_tokens=4)
                    low, high = record["spread"]
                    assert 0 < low <= record["value"] <= high
                    assert record["samples"] == 3
                    assert record["settings"]["threads"] == torch.get_num_threads()
                    assert {"dtype", "device", "versions", "date", "unit"} <= record.keys()
    by_metric = {one["metric"]: one for one in found.comparisons}
    assert by_metric["parameters"]["share"] < 1
    assert by_metric["kv_cache_bytes_per_token"]["share"] == 0.5
    for metric in TIMED:
        assert {"share", "theoretical_share", "p_value", "samples"} <= by_metric[metric].keys()
    # Half of the layers gone: theory promises up to twice the speed, and half the wait.
    assert 1 < by_metric["prefill_tokens_per_second"]["theoretical_share"] < 2
    assert 1 < by_metric["decode_tokens_per_second"]["theoretical_share"] < 2
    assert 0.5 < by_metric["time_to_first_token"]["theoretical_share"] < 1


def test_the_size_of_an_adapter_is_not_that_of_a_model(base: Path, tmp_path: Path) -> None:
    assert main(["prune", str(base), str(tmp_path / "adapter"), "--drop-layers", "4-7", "--adapter"]) == 0
    small = SMALL | {"batch_sizes": (1,), "prompt_lengths": (8,), "repeats": 1}
    found = bench(BenchRequest(str(tmp_path / "adapter"), base=str(base), load_repeats=0, **small))
    assert find(found, found.weights, "bytes_on_disk") is None
    assert find(found, found.weights, "parameters")


def test_operations_are_counted() -> None:
    """Against a count by hand: two for each weight of a matrix and token, attention, and the head for one token."""
    model = tiny_model("llama")
    batch, length, width, layers = 2, 24, 32, 8
    weights = sum(p.numel() for name, p in model.model.layers.named_parameters() if p.ndim == 2)
    attention = layers * 2 * 2 * batch * length * length * width
    expected = 2 * batch * length * weights + attention + 2 * batch * model.lm_head.weight.numel()
    # With old versions of transformers, the angles of the positions are a product of matrices too, a tiny one.
    assert prefill_flops(model, batch, length) == pytest.approx(expected, rel=1e-4)
    cut = tiny_model("llama")
    drop_layers(cut, [1, 2, 5, 6])
    head = 2 * batch * model.lm_head.weight.numel()
    assert prefill_flops(cut, batch, length) - head == pytest.approx((expected - head) / 2, rel=1e-4)


def test_the_processors_own_attention_is_counted() -> None:
    eager = tiny_model("llama")
    sdpa = tiny_model("llama")
    sdpa.set_attn_implementation("sdpa")
    assert prefill_flops(sdpa, 1, 32) == prefill_flops(eager, 1, 32)


def test_experts_are_counted_whatever_runs_them() -> None:
    model = tiny_model("mixtral")
    one_by_one = prefill_flops(model, 2, 24)
    model.set_experts_implementation("grouped_mm")  # the default of `from_pretrained`
    assert prefill_flops(model, 2, 24) == one_by_one
    assert prefill_flops(tiny_model("dbrx"), 2, 24) > 0  # its experts get slices of their weights


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_operations_are_counted_without_weights(model_type: str) -> None:
    model = tiny_model(model_type)
    assert prefill_flops(empty_model(model.config, torch.float32), 2, 24) == prefill_flops(model, 2, 24)


class Unseen(torch.nn.Linear):
    """A layer whose products torch's counter doesn't see, like those of a quantiser's kernels."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return (states[..., None, :] * self.weight).sum(-1)


def test_theory_knows_a_quantised_model() -> None:
    model, work = tiny_model("llama"), Workload(2, 24, 4)
    real = prefill_flops(model, 2, 24)
    model.model.layers[0].mlp.down_proj.__class__ = Unseen
    assert prefill_flops(model, 2, 24) < real
    model.is_quantized = True
    assert theoretical_cost(model, "prefill", work) == real


@pytest.mark.parametrize("model_type", ["dbrx", "biogpt"])
def test_a_quantised_model_whose_operations_depend_on_values_is_benched_without(model_type: str) -> None:
    model = tiny_model(model_type)
    model.config._attn_implementation = "sdpa"
    model.is_quantized = True
    assert theoretical_cost(model, "prefill", Workload(2, 24, 4)) is None


def test_shared_heads_are_counted_as_if_each_query_head_had_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def strict(query: Any, key: Any, value: Any) -> int:
        """As torch's below 2.13."""
        assert query[1] == key[1] == value[1]
        return sdpa_flop_count(query, key, value)

    monkeypatch.setattr(cost, "sdpa_flop_count", strict)
    kernels = [count for count in cost._KERNELS.values() if count is cost._attention_flops]
    assert len(kernels) == 4
    for count in kernels:
        flops = count((2, 8, 16, 4), (2, 2, 24, 4), (2, 2, 24, 6), 0.0, True, out_shape=(2, 8, 16, 6))
        assert flops == 2 * 2 * 8 * 16 * 24 * (4 + 6)
    shared, alike = tiny_model("llama"), tiny_model("llama")
    shared.set_attn_implementation("sdpa")
    assert prefill_flops(shared, 1, 32) == prefill_flops(alike, 1, 32)


def test_bytes_are_counted() -> None:
    model = tiny_model("llama")
    table = model.model.embed_tokens.weight.numel() * 4
    everything = sum(p.numel() for p in model.parameters()) * 4
    assert cache_bytes(model) == 8 * 2 * 2 * 8 * 4
    assert decode_bytes(model, 3, 10) == everything - table + 3 * 10 * cache_bytes(model)
    model.lm_head.weight = model.model.embed_tokens.weight
    assert decode_bytes(model, 1, 0) == everything - table  # a tied table is read as the head
    assert cache_bytes(tiny_model("mamba2")) == 0
    sliding = tiny_model("gemma2")  # half of its layers keep no more than their window
    held = sliding(input_ids=torch.ones(3, 40, dtype=torch.long), use_cache=True).past_key_values.layers
    read = decode_bytes(sliding, 3, 40) - decode_bytes(sliding, 3, 0)
    assert read == sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    odd = tiny_model("modernbert-decoder")  # whose `get_decoder` is a part of its head
    assert decode_bytes(odd, 1, 0) == odd.get_memory_footprint(return_buffers=False)
    seeing = tiny_model("gemma3")  # whose tower reads images, not what is written behind them
    text = {id(p): p for p in [*seeing.model.language_model.parameters(), *seeing.lm_head.parameters()]}
    assert (
        decode_bytes(seeing, 1, 0)
        == sum(p.numel() * 4 for p in text.values())
        < seeing.get_memory_footprint(return_buffers=False)
    )


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_only_the_experts_in_use_count(model_type: str) -> None:
    """Each token uses two of four: half of them for one sequence, and 15 in 16 for four, by chance alone."""
    model = tiny_model(model_type)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert active_parameters(model) == model.num_parameters() - experts / 2
    assert active_parameters(empty_model(model.config, torch.float32)) == active_parameters(model)
    other = decode_bytes(model, 1, 0) - experts * 4 / 2
    assert decode_bytes(model, 4, 0) == other + experts * 4 * 15 / 16


def test_active_parameters_are_those_that_are_published() -> None:
    """Mixtral 8x7B has 46.7 billion parameters, of which a token uses 12.9 billion (arXiv:2401.04088)."""
    model = empty_model(MixtralConfig(), torch.bfloat16)
    assert round(model.num_parameters() / 1e9, 1) == 46.7
    assert round(active_parameters(model) / 1e9, 1) == 12.9


@pytest.mark.parametrize("model_type", ["llama", "recurrent_gemma", "llama4_text", "mamba"])
def test_what_every_token_uses_counts_as_a_whole(model_type: str) -> None:
    """Convolutions, gates of several heads, and Llama 4's experts, which transformers runs for every token."""
    model = tiny_model(model_type)
    assert active_parameters(model) == model.num_parameters()


def test_active_parameters_are_recorded(tmp_path: Path) -> None:
    base, cut = tmp_path / "base", tmp_path / "cut"
    tiny_model("mixtral").save_pretrained(base)
    assert main(["prune", str(base), str(cut), "--drop-layers", "4-7"]) == 0
    found = bench(BenchRequest(str(cut), base=str(base), load_repeats=0, **SMALL))
    recorded = find(found, found.weights, "active_parameters")["value"]
    assert recorded == active_parameters(load_model(cut)) < find(found, found.weights, "parameters")["value"]
    assert next(one for one in found.comparisons if one["metric"] == "active_parameters")["share"] < 1


def test_turns_and_times() -> None:
    """The models alternate, who is first alternates too, and each run reads once and writes what it should."""
    models = {"a": tiny_model("llama"), "b": tiny_model("llama", seed=1)}
    seen: list[tuple[str, tuple[int, ...]]] = []
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen.append((name, tuple(kwargs["input_ids"].shape))), with_kwargs=True
        )
    found = time_models(models, [Workload(2, 16, 5)], repeats=2)
    run = [(2, 16), (2, 16), (2, 1), (2, 1), (2, 1), (2, 1)]
    order = [name for name, _ in seen[:: len(run)]]
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert [shape for _, shape in seen] == run * 6
    (timings,) = found.values()
    assert {name: len(runs) for name, runs in timings.items()} == {"a": 2, "b": 2}
    for timing in timings["a"]:
        assert set(timing) == set(TIMED)
        assert min(timing.values()) > 0


def test_what_does_not_fit_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")

    def forget(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 1:
            torch.empty(1 << 60, dtype=torch.uint8)

    model.register_forward_pre_hook(forget, with_kwargs=True)
    found = time_models({"a": model}, [Workload(2, 8, 2), Workload(1, 8, 2)], repeats=1)
    assert list(found) == [Workload(1, 8, 2)]
    assert "out of memory with 2 x 8 tokens" in caplog.text


def test_loading_fails_in_a_process_of_its_own() -> None:
    with pytest.raises(LayerPruneError, match=r"loading ./nowhere in a separate process failed: .*does not exist"):
        probe("./nowhere", None, "auto", "cpu", Workload(1, 8, 2))


WATCHED = """
import json, sys
from hf_layerprune.measure import probe, subject
load = subject.Subject.load
def watched(self, *words):
    before = set(sys.modules)
    model = load(self, *words)
    print(*set(sys.modules) - before)
    return model
subject.Subject.load = watched
probe._probe(sys.argv[1], None, "auto", "cpu", json.loads(sys.argv[2]))
"""


def test_the_load_time_has_no_imports(tmp_path: Path) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path)  # the code of its tower is in another file
    words = [sys.executable, "-c", WATCHED, str(tmp_path), json.dumps(asdict(Workload(1, 8, 2)))]
    imported = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in imported if "modeling_" in name or "jsonschema" in name]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--prompt-lengths", "0"], 2, "--prompt-lengths 0 must be a whole number from 1"),
        (["--batch-sizes", "1,x"], 2, "'1,x' must be a whole number from 1"),
        (["--load-repeats", "-1"], 2, "--load-repeats -1 must be a whole number from 0"),
        (["--prompt-lengths", "510"], 2, "base has a context of 512 tokens, but prompts with new tokens"),
        (["--base", "SAME"], 1, "has the same weights"),
    ],
)
def test_bad_words(base: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", str(base), "--quiet", *(str(base) if word == "SAME" else word for word in words)]
    try:
        assert main(words) == code
    except SystemExit as error:  # argparse
        assert error.code == code  # noqa: PT017
    assert message in capsys.readouterr().err
    assert not (base / "metrics.json").exists()


def test_the_table(base: Path, cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(cut, cut.parent / "other")
    words = "--batch-sizes 1 --prompt-lengths 8 --new-tokens 3 --repeats 2 --load-repeats 0".split()
    assert main(["bench", str(cut), "--base", str(base), "--quiet", *words]) == 0
    out = capsys.readouterr().out
    assert "cut:      cut, 4 layers" in out
    lines = out.splitlines()
    start = lines.index("batch size 1, 8 prompt tokens, 3 new tokens:")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == [
        "prefill_tokens_per_second", "time_to_first_token", "decode_tokens_per_second"
    ]  # fmt: skip
    assert next(line for line in lines[:start] if "kv_cache_bytes_per_token" in line)  # of no run, so above them
    assert " ms to " not in out, "the unit stands once"
    assert max(map(len, lines[: lines.index("", start)])) <= 120
    assert "theory" in out.splitlines()[3]  # a column that stands only where a row has a value
