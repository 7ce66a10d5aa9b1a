"""The walk: layer by layer gives what the model gives, wherever the weights are."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_layerprune import UnsupportedModelError
from hf_layerprune.runtime.walk import LayerWalk

from .measure_models import write_model
from .tiny_models import LAYERS, tiny_input, tiny_model

TYPES = ("llama", "gpt2", "gemma2", "qwen3_moe", "mamba2", "bloom", "opt", "falcon_h1", "granitemoehybrid")


@torch.no_grad()
def walked(walk: LayerWalk, ids: torch.Tensor) -> torch.Tensor:
    batch = walk.begin(ids)
    for i in range(walk.num_layers):
        with walk.layer(i) as run:
            batch.hidden = run(batch.hidden, batch)
    return walk.logits(batch.hidden)


@pytest.mark.parametrize("model_type", TYPES)
def test_same_logits(model_type: str) -> None:
    model, ids = tiny_model(model_type), tiny_input(length=20)
    own = [layer.__dict__.get("forward") for layer in LayerWalk(model).layers]
    walk = LayerWalk(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    assert torch.allclose(walked(walk, ids), expected, rtol=1e-4, atol=1e-5)
    assert [layer.__dict__.get("forward") for layer in walk.layers] == own
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_states_need_no_head() -> None:
    model = tiny_model("llama")
    walk = LayerWalk(model)
    called: list[object] = []
    model.lm_head.register_forward_hook(lambda *args: called.append(args))
    own = model.lm_head.forward
    batch = walk.begin(tiny_input(length=20))
    # A module's hooks run whatever stands in for its forward: the product is what must not be there.
    assert [output.shape[-1] for _, _, output in called] == [model.config.hidden_size]
    assert model.lm_head.forward == own
    assert walk.logits(batch.hidden).shape[-1] == model.config.vocab_size


def test_several_batches_of_several_lengths() -> None:
    model = tiny_model("gemma2")
    walk = LayerWalk(model)
    parts = [tiny_input(seed, batch, length) for seed, (batch, length) in enumerate([(1, 5), (3, 17), (2, 9)])]
    batches = [walk.begin(part) for part in parts]
    with torch.no_grad():
        for i in range(walk.num_layers):
            with walk.layer(i) as run:
                for batch in batches:
                    batch.hidden = run(batch.hidden, batch)
        for batch, part in zip(batches, parts, strict=True):
            expected = model(part, use_cache=False).logits
            assert torch.allclose(walk.logits(batch.hidden), expected, rtol=1e-4, atol=1e-5)


def test_gradients_flow() -> None:
    model, ids = tiny_model("llama"), tiny_input()
    walk = LayerWalk(model)
    batch = walk.begin(ids)
    with walk.layer(2) as run:
        run(batch.hidden, batch).square().sum().backward()
    assert walk.layers[2].mlp.down_proj.weight.grad.abs().sum() > 0
    assert walk.layers[1].mlp.down_proj.weight.grad is None


@pytest.mark.parametrize("model_type", ["rwkv", "gemma3n_text", "xlnet"])
def test_layers_that_hand_on_more_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"can't be (run one at a time|ranked on text)"):
        LayerWalk(tiny_model(model_type))


def test_weights_from_a_file_are_released(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model")).eval()
    ids = tiny_input()
    with torch.no_grad():
        expected = model(ids).logits
    assert torch.equal(walked(LayerWalk(model, release_weights=True), ids), walked(LayerWalk(model), ids))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")
def test_embeddings_and_head_are_released_while_layers_run(tmp_path: Path) -> None:
    """In a small model they are most of it."""
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model", vocabulary=30_000)).eval()
    size = model.get_output_embeddings().weight.nbytes

    def resident() -> int:
        maps = Path("/proc/self/smaps").read_text().split("VmFlags:")
        return sum(int(part.split("Rss:")[1].split()[0]) * 1024 for part in maps if f"{tmp_path}/" in part)

    walk = LayerWalk(model, release_weights=True)
    assert resident() < 0.5 * size
    with torch.no_grad():
        batch = walk.begin(torch.arange(30_000)[None, ::50])
        assert resident() > 0.5 * size, "the comparison means something"
        walk.release_ends()
        assert resident() < 0.5 * size
        found = walk.logits(batch.hidden)
        assert resident() > 0.5 * size
        walk.release_ends()
        assert resident() < 0.5 * size
        assert torch.equal(walk.logits(batch.hidden), found)


def test_changed_weights_are_kept(tmp_path: Path) -> None:
    """Weights in ordinary memory must not be wiped with those that are mapped."""
    model = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model")).eval()
    with torch.no_grad():
        weight = model.model.layers[3].mlp.down_proj.weight
        weight.data = weight.data.clone() * 2
        expected = model(tiny_input()).logits
    walk = LayerWalk(model, release_weights=True)
    for _ in range(2):
        assert torch.allclose(walked(walk, tiny_input()), expected, rtol=1e-4, atol=1e-5)


STREAM = """
import json, sys, torch
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.select import score_layers
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.records.lineage import peak_rss
torch.set_num_threads(1)
ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
names = ["block_influence", "perplexity", "magnitude_l1", "taylor"]
load_base(sys.argv[1], dtype="auto")
before, found = peak_rss(), {}
for mode in ("stream", "memory"):  # a peak never falls, so what takes less comes first
    walk = LayerWalk(load_base(sys.argv[1], dtype="auto"), release_weights=mode == "stream")
    scores = score_layers(walk, CalibrationSet.of(ids, "random"), names)
    found[mode] = peak_rss() - before, [score for name in names for score in scores[name].layers]
    del walk
print(json.dumps(found))
"""


def test_a_model_larger_than_what_it_takes(tmp_path: Path) -> None:
    """Ranked layer by layer, a model takes a few layers' memory, and its scores stay the same."""
    import json

    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=259, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "big")
    gc.collect()
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    assert size > 200e6
    command = [sys.executable, "-c", STREAM, str(tmp_path / "big")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["stream"][1] == pytest.approx(found["memory"][1], rel=1e-4)
    assert found["stream"][0] < 0.35 * size
    assert found["memory"][0] > 0.9 * size, "the comparison means something"


def test_layers_are_counted() -> None:
    assert LayerWalk(tiny_model("llama")).num_layers == LAYERS


def test_a_dispatched_model_keeps_its_hooks(tmp_path: Path) -> None:
    """accelerate wraps the forward of each layer; it has to be there afterwards."""
    from accelerate import dispatch_model

    model: Any = tiny_model("llama")
    with torch.no_grad():
        expected = model(tiny_input()).logits
    names = {name: "cpu" for name, _ in model.named_children()}
    model = dispatch_model(model, names, main_device="cpu", force_hooks=True)
    walk = LayerWalk(model)
    assert torch.allclose(walked(walk, tiny_input()), expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(model(tiny_input()).logits, expected, rtol=1e-4, atol=1e-5)
