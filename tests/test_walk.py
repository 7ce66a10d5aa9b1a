"""The walk: layer by layer gives what the model gives, wherever the weights are."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from hf_layerprune import UnsupportedModelError
from hf_layerprune.runtime.head import OutputHead
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select.decode_times import time_decoding

from .tiny_models import tiny_input, tiny_model

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


@pytest.mark.parametrize(
    "run", [LayerWalk, OutputHead, lambda model: time_decoding(model, 40)], ids=["walk", "head", "decoding"]
)
def test_quantised_weights_whose_kernels_fail_are_refused(run: Any) -> None:
    """As bitsandbytes' do on a CPU where a row is narrower than its blocks."""
    model: Any = tiny_model("llama")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("shape '[32, 0]' is invalid for input of size 16")

    model.model.layers[1].mlp.forward = fail
    with pytest.raises(UnsupportedModelError, match=r"(on a few tokens|on token ids alone|can't generate).*\[32, 0\]"):
        run(model)
    model.is_quantized = True
    with pytest.raises(
        UnsupportedModelError, match=r"can't be run on the device cpu .*; use another device, or use the"
    ):
        run(model)


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


RANK = """
import json, sys, threading, time, torch
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.runtime import mapping
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select.runner import score_layers
torch.set_num_threads(1)

def load():
    free, mapping.free_bytes = mapping.free_bytes, lambda device: 0  # as if the model did not fit
    model = mapping.load_mapped(sys.argv[1], dtype="auto")
    mapping.free_bytes = free
    return model

def own_memory():  # mapped pages of a file are not in it: the system takes them back when it needs to
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))

def watch():
    while not done.wait(0.005):
        peaks.append(own_memory())

ids = torch.randint(3, 250, (2, 16), generator=torch.Generator().manual_seed(0))
names, found = ["block_influence", "perplexity", "magnitude_l1", "taylor"], {}
load()
for mode in ("mapped", "copied"):
    before, peaks, done = own_memory(), [], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load()
    if mode == "copied":
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    scores = score_layers(LayerWalk(model), CalibrationSet.from_ids(ids, "random"), names)
    done.set()
    watcher.join()
    found[mode] = max(peaks) - before, [score for name in names for score in scores[name].layers]
    del model
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("experts", [{}, {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192}])
def test_a_model_larger_than_what_it_takes(tmp_path: Path, experts: dict[str, int]) -> None:
    """Ranking a model layer by layer takes a few layers' memory, and the pages of its file that there is room for.

    That holds also for a mixture whose files have each expert separately, which transformers joins.
    """
    config_class = Qwen3MoeConfig if experts else LlamaConfig
    config = config_class(
        hidden_size=384, intermediate_size=1536, num_hidden_layers=24, num_attention_heads=8, num_key_value_heads=8,
        vocab_size=259, tie_word_embeddings=True, **experts,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "big")
    gc.collect()
    size = sum(path.stat().st_size for path in (tmp_path / "big").glob("*.safetensors"))
    assert size > 200e6
    command = [sys.executable, "-c", RANK, str(tmp_path / "big")]
    env = os.environ | {"HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert not list((tmp_path / "home").iterdir()), "the files of converted layers are gone"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["mapped"][1] == pytest.approx(found["copied"][1], rel=1e-4)
    assert found["mapped"][0] < 0.35 * size
    assert found["copied"][0] > 0.9 * size, "the comparison means something"


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
