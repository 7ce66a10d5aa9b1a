"""Perplexity and distance equal the textbook, whatever is split or halved on the way."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_layerprune import CutError, LayerDropConfig, LayerPruneError, compare_models, drop_layers, prune_with
from hf_layerprune.cli import main
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.measure import distance as module
from hf_layerprune.measure.distance import mean, text_metrics, window_means
from hf_layerprune.runtime.memory import in_batches, positions_per_chunk
from hf_layerprune.runtime.prefix import Prefix

from .tiny_models import tiny_input, tiny_model

ROWS = tiny_input(batch=5, length=24)


def pruned(base: Any, layers: list[int]) -> Any:
    model = copy.deepcopy(base)
    drop_layers(model, layers)
    return model


@torch.no_grad()
def log_probs(model: Any, rows: torch.Tensor) -> torch.Tensor:
    return model(input_ids=rows, use_cache=False).logits.double().log_softmax(-1)[:, :-1]


def check_same(found: dict[str, torch.Tensor]) -> None:
    assert not found["kl"].any()
    assert found["top1_agreement"].eq(1).all()


def check(model: Any, base: Any, rows: torch.Tensor) -> Any:
    """Hold a distance against its definition, computed from whole logits."""
    found = window_means(model, rows, base)
    p, q = log_probs(base, rows), log_probs(model, rows)
    kl = (p.exp() * (p - q)).sum(-1)
    nll = -q.gather(-1, rows[:, 1:, None]).squeeze(-1)
    base_nll = -p.gather(-1, rows[:, 1:, None]).squeeze(-1)
    error = kl.mean(1).std().item() / len(rows) ** 0.5
    assert mean(found["kl"]) == (pytest.approx(kl.mean().item(), rel=1e-4), pytest.approx(error, rel=1e-3))
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    assert mean(found["top1_agreement"])[0] == pytest.approx(agreement, abs=1e-9)
    for name, expected in (("nll", nll), ("base_nll", base_nll)):
        assert found[name].tolist() == pytest.approx(expected.mean(1).tolist(), rel=1e-5)
        assert text_metrics(found[name])["perplexity"][0] == pytest.approx(expected.mean().exp().item(), rel=1e-5)
    return found


# What families do around layers and head: soft-capped and scaled logits, hidden states in several streams, a norm after
# the embeddings, learned positions, states in place of attention, layers that return tuples.
@pytest.mark.parametrize(
    "model_type", ["llama", "gemma2", "cohere", "bloom", "gpt2", "mamba2", "qwen3_moe", "deepseek_v4", "xlstm"]
)
def test_distance_is_its_definition(model_type: str) -> None:
    base = tiny_model(model_type)
    check(pruned(base, [3, 4]), base, ROWS)


def same_start(base: Any, model: Any, depth: int) -> bool:
    return Prefix(base, depth).is_equivalent(Prefix(model, depth))


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_nothing_changed_is_shared(where: str) -> None:
    base = tiny_model("llama")
    model = pruned(base, [3, 4])
    with torch.no_grad():
        model.get_parameter(where).flatten()[-1].add_(0.5)
    assert same_start(base, model, 1) == ("layers.1" in where)
    assert not same_start(base, model, 2)


def test_no_layer_of_another_kind_is_shared() -> None:
    """Equal weights are not all: a window makes another layer of them."""
    base = tiny_model("gemma2")
    model = pruned(base, [5])
    assert same_start(base, model, 5)
    layer = find_decoder_layers(model).layers[2]
    layer.self_attn.sliding_window = 2
    assert same_start(base, model, 2)
    assert not same_start(base, model, 3)


def test_only_the_head_changed() -> None:
    base = tiny_model("llama")
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    check(model, base, ROWS)
    assert same_start(base, model, 8)
    check_same(window_means(base, ROWS, copy.deepcopy(base)))


@pytest.mark.parametrize("size", [1, 7, 24])
def test_chunks_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model("gemma2")
    model = pruned(base, [3, 4])
    monkeypatch.setattr(module, "positions_per_chunk", lambda *_: size)
    check(model, base, ROWS)
    expected = -log_probs(model, ROWS).gather(-1, ROWS[:, 1:, None]).mean()
    assert window_means(model, ROWS)["nll"].mean() == pytest.approx(expected)


def test_chunks_fit_the_budget() -> None:
    assert positions_per_chunk(1024, 1, 49_152, 1 << 40) == 1024
    assert positions_per_chunk(1024, 1, 256_000, 256 << 20) == 256
    assert positions_per_chunk(1000, 1, 256_000, 256 << 20) == 256  # four chunks, of multiples of 32
    assert positions_per_chunk(2048, 8, 256_000, 1) == 32
    assert positions_per_chunk(20, 1, 100, 4000) == 20


def test_a_peft_model() -> None:
    base = tiny_model("llama")
    tuned = prune_with(LayerDropConfig(drop_layers=[6, 7], tune_layers=2), copy.deepcopy(base))
    lora = get_peft_model(pruned(base, [6, 7]), LoraConfig(target_modules=["q_proj"], layers_to_transform=[5]))
    with torch.no_grad():
        for parameter in [*tuned.parameters(), *lora.parameters()]:
            if parameter.requires_grad:
                parameter.add_(0.05)
    for model, shared in ((tuned.eval(), 4), (lora.eval(), 5)):
        check(model, base, ROWS)
        assert same_start(base, model, shared)
        assert not same_start(base, model, shared + 1)


@pytest.mark.parametrize("offloaded", [("model.layers",), ("model.embed_tokens", "lm_head")])
def test_weights_that_accelerate_offloads_make_no_difference(offloaded: tuple[str, ...], tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    places = {part: "disk" if part in offloaded else "cpu" for part in parts}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "offloaded"
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(window_means(model, ROWS)["nll"], window_means(whole, ROWS)["nll"])


def test_models_are_left_as_they_were() -> None:
    base = tiny_model("llama")
    model = pruned(base, [3, 4]).train()
    model.lm_head.eval()
    modes = [part.training for part in model.modules()]
    before = log_probs(model, ROWS)
    window_means(model, ROWS, base)
    window_means(model, ROWS)
    assert [part.training for part in model.modules()] == modes
    assert torch.equal(log_probs(model, ROWS), before)
    assert not any("forward" in vars(part) for part in [*model.modules(), *base.modules()])
    assert not any(part._forward_hooks for part in [*model.modules(), *base.modules()])


def test_ruined_models_have_numbers_too() -> None:
    base = tiny_model("llama")
    model = pruned(base, [6, 7])
    with torch.no_grad():
        model.lm_head.weight.mul_(1e5)
    found = window_means(model, ROWS, base)
    assert text_metrics(found["nll"])["perplexity"][0] == math.inf
    assert 700 < found["nll"].mean() < math.inf
    assert found["kl"].mean() > 100


def test_what_the_base_excludes_adds_nothing() -> None:
    base = tiny_model("gpt2")
    model = copy.deepcopy(base)
    for one in (base, model):
        one.lm_head.register_forward_hook(lambda module, args, out: out.index_fill(-1, torch.tensor([0]), -math.inf))
    check_same(window_means(model, ROWS, base))


def test_batches_halve_where_memory_ends() -> None:
    """The allocator is asked for what no machine has, so the errors are its own."""
    tried = []

    def run(batch: torch.Tensor) -> int:
        tried.append(len(batch))
        if len(batch) > 3:
            torch.empty(1 << 60, dtype=torch.uint8)
        return len(batch)

    assert list(in_batches(torch.zeros(10, 4), 8, run)) == [2, 2, 2, 2, 2]
    assert tried == [8, 4, 2, 2, 2, 2, 2]


def test_memory_that_fits_nothing() -> None:
    def run(batch: torch.Tensor) -> None:
        raise MemoryError

    with pytest.raises(LayerPruneError, match="out of memory with a single text of 4 tokens; buy more"):
        list(in_batches(torch.zeros(10, 4), 8, run, "buy more"))
    with pytest.raises(RuntimeError, match="shape"):
        list(in_batches(torch.zeros(10, 4), 8, lambda batch: batch @ batch))


def test_models_in_memory_are_compared_as_the_command_does(base: Path, cut: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    command = ["eval", str(cut), "--base", str(base), "--text", str(text), "--length", "64", "--windows", "5"]
    assert main(command) == 0
    results = json.loads((cut / "metrics.json").read_text())["results"]
    model, dense = (AutoModelForCausalLM.from_pretrained(folder) for folder in (cut, base))
    found = compare_models(model, dense, text, length=64, windows=5)
    for name in ("kl", "top1_agreement"):
        (entry,) = (entry for entry in results if entry["metric"] == name)
        assert (found[name], found[f"{name}_stderr"]) == (entry["value"], entry["stderr"])
    perplexities = {entry["value"] for entry in results if entry["metric"] == "perplexity"}
    assert perplexities == {found["perplexity"], found["base_perplexity"]}
    assert found["perplexity_ratio"] == found["perplexity"] / found["base_perplexity"]
    assert compare_models(dense, dense, ROWS[:1])["kl"] == 0


def test_models_that_cannot_be_compared() -> None:
    one, other = tiny_model("llama"), tiny_model("gpt2")
    one.config.vocab_size += 1
    with pytest.raises(LayerPruneError, match="vocabulary"):
        compare_models(one, other, ROWS)
    other.config._name_or_path = ""
    with pytest.raises(CutError, match="pass its tokenizer"):
        compare_models(other, other, "text.txt")
    folders: Any = ("pruned", Path("base"))
    with pytest.raises(LayerPruneError, match="load them, or use hf-layerprune eval MODEL --base BASE"):
        compare_models(*folders)
    with pytest.raises(CutError, match="windows=-1 measures nothing"):
        compare_models(other, other, "text.txt", windows=-1)
    for rows in (ROWS[0], ROWS[:0], ROWS[:, :1]):
        with pytest.raises(CutError, match=r"must be \[windows, length\], with 2 or more tokens"):
            compare_models(other, other, rows)
    tokens: Any = ROWS.tolist()
    with pytest.raises(CutError, match="text is a list, and must be a path or a tensor of token IDs"):
        compare_models(other, other, tokens)
