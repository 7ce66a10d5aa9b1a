"""What the CPU's tests hold, on a CUDA GPU: `make gpu`, or `pytest -m gpu`. None of it needs a network.

Without a GPU every test here is skipped. With `HF_LAYERPRUNE_GPU_TESTS_ON=cpu` they run on the CPU, which proves
the tests and not the GPU; with `python -m tests.emulated_gpu`, on an emulated one.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_layerprune import LayerDropConfig, prune_with
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.measure.bench import bench
from hf_layerprune.measure.requests import BenchRequest
from hf_layerprune.repair.fit import fit_repair
from hf_layerprune.repair.registry import REPAIRS
from hf_layerprune.runtime.memory import free_memory
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import ALL, taylor
from hf_layerprune.select.runner import score_layers
from hf_layerprune.stages.curve import quality_curve
from hf_layerprune.stages.prune import prune_to
from hf_layerprune.stages.rank import rank
from hf_layerprune.stages.requests import PruneRequest, RankRequest

from .chat_models import pruned_model, tiny_chat_model
from .heal_makers import (
    ENVIRONMENT,
    RECIPE,
    ROOT,
    Bench,
    launch_recipe,
    losses,
    recipe_words,
    tuned,
    write_base_and_rows,
)
from .tiny_models import EAGER, tiny_input, tiny_model

DEVICE = os.environ.get("HF_LAYERPRUNE_GPU_TESTS_ON", "cuda")
MISSING = DEVICE == "cuda" and not torch.cuda.is_available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(MISSING, reason="torch finds no CUDA GPU here")]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="needs the GPU itself")


def near(found: Any, wanted: Any) -> None:
    """Equal to 1e-4 of the largest value."""
    pairs = [(f, w) for f, w in zip(found, wanted, strict=True) if w is not None]
    size = max(abs(w) for _, w in pairs)
    for value, expected in pairs:
        assert value == pytest.approx(expected, rel=1e-4, abs=1e-4 * size)


def close_to(found: torch.Tensor, wanted: torch.Tensor) -> None:
    found, wanted = found.detach().float().cpu(), wanted.detach().float().cpu()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    return CalibrationSet.from_ids(tiny_input(seed=1, batch=60, length=32), "random")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base_and_rows(tmp_path_factory.mktemp("gpu") / "base")


# --- choosing, repairing, cutting ------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("streamed", [False, True], ids=["on the card", "layer by layer"])
def test_ranking_is_that_of_the_cpu(model_type: str, streamed: bool, text: CalibrationSet) -> None:
    wanted = score_layers(tiny_model(model_type), text, ALL)
    model = tiny_model(model_type)
    walk = LayerWalk(model, device=DEVICE) if streamed else LayerWalk(model.to(DEVICE))
    found = score_layers(walk, text, ALL)
    assert walk.device.type == DEVICE
    for name, scores in wanted.items():
        if scores.layers is not None:
            near(found[name].layers, scores.layers)
        if scores.blocks:
            near([found[name].blocks[block] for block in scores.blocks], scores.blocks.values())


def test_states_that_the_card_has_no_room_for_are_kept_by_the_cpu(
    text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = score_layers(tiny_model("llama"), text, ["taylor"])["taylor"].layers
    monkeypatch.setattr(taylor, "free_bytes", lambda device: 1e9 if device.type == "cpu" else 0)
    model = tiny_model("llama").to(DEVICE)
    assert wanted is not None
    near(score_layers(LayerWalk(model), text, ["taylor"])["taylor"].layers, wanted)


@pytest.mark.parametrize("size", [(60, 32), (6, 16)], ids=["many tokens", "fewer tokens than neurons"])
@pytest.mark.parametrize("method", list(REPAIRS))
def test_repair_is_that_of_the_cpu(method: str, size: tuple[int, int]) -> None:
    text = CalibrationSet.from_ids(tiny_input(seed=1, batch=size[0], length=size[1]), "random")
    wanted = fit_repair(tiny_model("llama"), [3, 4], text, method)
    found = fit_repair(LayerWalk(tiny_model("llama"), device=DEVICE), [3, 4], text, method)
    assert found.tensors.keys() == wanted.tensors.keys()
    if method == "borrow":  # which of two neurons is better may be decided by rounding
        shares = [[cut["unexplained_share"] for cut in repair.cuts] for repair in (found, wanted)]
        assert shares[0] == pytest.approx(shares[1], rel=0.05)
        return
    for name, tensor in wanted.tensors.items():
        close_to(found.tensors[name], tensor)


@only_cuda
def test_a_walk_has_one_layer_on_the_card_at_a_time() -> None:
    config = LlamaConfig(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=32, num_attention_heads=8, vocab_size=259
    )
    model = LlamaForCausalLM(config).eval()
    size = sum(parameter.nbytes for parameter in model.parameters())
    free_memory()
    torch.cuda.init()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    LayerWalk(model, device=DEVICE)
    assert torch.cuda.max_memory_allocated() - before < size / 4  # cuBLAS takes some


FEW: dict[str, Any] = {"calibration_samples": 8, "calibration_length": 16}


def test_text_that_the_model_writes_itself(base: Path, tmp_path: Path) -> None:
    """The default: all of the model runs, though its layers go to the card one at a time."""
    prune_to(PruneRequest(str(base), tmp_path / "cut", drop_layers=[3, 4], repair="linear", **FEW))
    prune_to(PruneRequest(str(base), tmp_path / "chosen", drop=2, criterion="block_influence", **FEW))
    for folder in ("cut", "chosen"):
        assert load_file(tmp_path / folder / "model.safetensors")
        entry = json.loads((tmp_path / folder / "lineage.json").read_text())["entries"][-1]
        assert entry["calibration"]["source"] == "self"
    ranking = rank(RankRequest(str(base), criteria=["block_influence"], drop=2, device=DEVICE, **FEW))
    assert len(ranking.drops["block_influence"]) == 2
    curve = quality_curve(str(base), curve_up_to=1, device=DEVICE, **FEW)
    assert [point["dropped"] for point in curve.points] == [1]


@torch.no_grad()
def test_prune_with_loads_onto_the_card(base: Path, tmp_path: Path) -> None:
    config = {"base_model_name_or_path": str(base), "drop_layers": [3, 4]}
    wanted = prune_with(LayerDropConfig(**config), dtype=torch.float32, **EAGER)
    model = prune_with(LayerDropConfig(**config), dtype=torch.float32, device_map=DEVICE, **EAGER)
    assert {p.device.type for p in model.parameters()} == {DEVICE}
    ids = tiny_input()
    close_to(model(ids.to(DEVICE)).logits, wanted(ids).logits)
    model.merge_and_unload().save_pretrained(tmp_path / "pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **EAGER)
    assert torch.equal(again(ids).logits, wanted(ids).logits)


def test_bench_has_the_peak_of_the_allocator(base: Path, tmp_path: Path) -> None:
    cut = pruned_model(base, tmp_path / "cut")
    request = BenchRequest(
        str(cut), base=str(base), device=DEVICE, batch_sizes=(2,), prompt_lengths=(8,), new_tokens=4, repeats=1,
        load_repeats=1,
    )  # fmt: skip
    metrics = bench(request)
    found = {record["metric"]: record["value"] for record in metrics.results}
    assert found["prefill_tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] > 0
    if DEVICE == "cuda":
        peaks = sorted(one["value"] for one in metrics.results if one["metric"] == "peak_cuda_bytes")
        for folder, peak in zip((cut, base), peaks, strict=True):
            weights = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
            assert weights < peak < 1e9
    else:
        assert "peak_cuda_bytes" not in found


# --- healing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_cuda)])
@pytest.mark.parametrize("loss", ["ce", "kd"])
def test_healing_in_16_bits(precision: str, loss: str, tmp_path: Path) -> None:
    """Learns, and learns the same with the frozen layers computed once."""
    made = Bench(tmp_path)
    settings = {precision: True, "bf16": precision == "bf16", "use_cpu": DEVICE == "cpu", "loss": loss}
    runs = {}
    for cache in ("on", "off"):
        trainer = made.trainer(cache=cache, method="lm_head+last2", max_steps=12, **settings)
        trainer.train()
        assert all(torch.isfinite(value).all() for value in tuned(trainer).values())
        assert {value.dtype for value in tuned(trainer).values()} == {torch.float32}
        assert {value.device.type for value in tuned(trainer).values()} == {DEVICE}
        runs[cache] = losses(trainer)
    assert sum(runs["on"][-3:]) < sum(runs["on"][:3])
    assert runs["on"] == pytest.approx(runs["off"], rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_cuda)])
def test_hidden_states_first_in_16_bits(precision: str, tmp_path: Path) -> None:
    settings = {precision: True, "bf16": precision == "bf16", "use_cpu": DEVICE == "cpu"}
    runs = {}
    for cache in ("on", "off"):
        trainer = Bench(tmp_path / cache, drop=[3, 4]).trainer(
            cache=cache, method="behind1", loss="kd", features=0.5, learning_rate=1e-3, max_steps=12, **settings
        )
        trainer.train()
        assert ["features" in log for log in trainer.state.log_history[:-1]] == [True] * 6 + [False] * 6
        assert all(torch.isfinite(value).all() for value in tuned(trainer).values())
        assert {value.device.type for value in tuned(trainer).values()} == {DEVICE}
        runs[cache] = losses(trainer)
    assert runs["on"][5] < runs["on"][0]
    assert runs["on"][-1] < runs["on"][6]
    assert runs["on"] == pytest.approx(runs["off"], rel=0.02)


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_teacher_that_was_passed_can_be_used_again(cache: str, tmp_path: Path) -> None:
    made = Bench(tmp_path)
    wanted = made.dense(tiny_input()).logits
    runs = []
    for output in ("first", "second"):  # the second time, the dense model's states are computed once more
        settings = {"output_dir": str(tmp_path / output), "use_cpu": DEVICE == "cpu"}
        runs.append(made.losses(cache=cache, method="lm_head+last2", loss="kd", max_steps=2, **settings))
        assert {p.device.type for p in (*made.dense.parameters(), *made.dense.buffers())} == {"cpu"}
        assert torch.equal(made.dense(tiny_input()).logits, wanted)
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


def words(base: Path, output: Path, **settings: Any) -> list[str]:
    common = {
        "drop_layers": "3,4", "method": "last2", "loss": "ce+kd", "num_train_epochs": 2, "learning_rate": 0.01,
        "per_device_train_batch_size": 4, "max_length": 32, "logging_steps": 1, "report_to": "none",
        "disable_tqdm": "true", "use_cpu": str(DEVICE == "cpu").lower(), "bf16": "false",
    }  # fmt: skip
    return recipe_words(base, output, **common | settings)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=only_cuda)])
def test_qlora(precision: str, base: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    launch_recipe(words(base, tmp_path / "run", method="qlora", loss="ce", **{precision: "true"}))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_hidden_layers == 6
    assert not getattr(model, "is_quantized", False)
    entry = json.loads((tmp_path / "run" / "model" / "lineage.json").read_text())["entries"][-1]
    assert "model.layers.0.self_attn.q_proj.weight" in entry["changed_tensors"]


def test_killed_and_resumed(base: Path, tmp_path: Path) -> None:
    whole, half = tmp_path / "whole", tmp_path / "half"
    saving = {"save_steps": 4, "save_strategy": "steps"}
    launch_recipe(words(base, whole, **saving))
    command = [sys.executable, str(RECIPE), *words(base, half, **saving)]
    running = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (half / "checkpoint-8" / "trainer_state.json").exists():
        assert running.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert not (half / "model").exists()
    launch_recipe(words(base, half, **saving, resume_from_checkpoint="true"))
    wanted, found = (load_file(folder / "model" / "model.safetensors") for folder in (whole, half))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-4), name


# --- the chat --------------------------------------------------------------------------------------------

CHAT = """
import json, sys
import app, chat

app.prepare(*sys.argv[1:])
assert chat.models.done.wait(120)
settings = {"temperature": 0, "top_p": 1, "max_tokens": 5, "seed": 1}
states = list(chat.run(["pruned", "dense"], [5, 6, 7], settings))[-1]
places = {str(p.device.type) for side in chat.models.sides.values() for p in side.model.parameters()}
print(json.dumps({"tokens": [state["tokens"] for state in states], "places": sorted(places)}))
"""


def test_chat(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    base = tiny_chat_model(tmp_path / "base")
    pruned = pruned_model(base, tmp_path / "pruned")
    path = os.pathsep.join([str(ROOT / "spaces" / "chat"), ENVIRONMENT["PYTHONPATH"]])
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if DEVICE == "cpu" else {}
    env = ENVIRONMENT | {"PYTHONPATH": path, "GRADIO_ANALYTICS_ENABLED": "False"} | hidden
    command = [sys.executable, "-c", CHAT, str(pruned), str(base)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {"tokens": [5, 5], "places": [DEVICE]}


def test_the_numbers_of_a_step_do_not_depend_on_the_device(tmp_path: Path) -> None:
    """One step in float32, with the frozen layers computed once: the loss of the CPU."""
    made, found = Bench(tmp_path), {}
    for use_cpu in {True, DEVICE == "cpu"}:
        found[use_cpu] = made.losses(use_cpu=use_cpu, method="lm_head+last2", loss="ce+kd", max_steps=2)
    assert all(map(math.isfinite, found[True]))
    assert found[DEVICE == "cpu"] == pytest.approx(found[True], rel=1e-4)
