"""Models whose layers are mapped from files are those that from_pretrained loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from hf_layerprune import LayerDropConfig, prune_with
from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.files.locks import lock_folder, unlock_folder
from hf_layerprune.runtime import mapping
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.runtime.mapping import load_mapped

from .limits import largest_file
from .measure_models import byte_tokenizer
from .tiny_models import tiny_input, tiny_model

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="models are mapped on Linux only")
TYPES = ("llama", "qwen3_moe", "mixtral", "deepseek_v3", "ernie4_5_moe", "gpt2", "falcon_h1", "qwen3_vl_moe")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where converted layers are written, on a machine that has no memory to spare."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(mapping, "free_bytes", lambda device: 0)
    return tmp_path / "home"


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("model_type", TYPES)
def test_the_same_model(model_type: str, dtype: str, tmp_path: Path, home: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    mapped, plain = (load(tmp_path / "base", dtype=dtype) for load in (load_mapped, load_base))
    assert not list(home.iterdir())
    ours, theirs = mapped.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(mapped(tiny_input()).logits, plain(tiny_input()).logits)
    layers = find_decoder_layers(mapped).layers
    assert not [name for name, weight in layers.named_parameters() if not is_mapped(weight)]
    assert vars(mapped).keys() == vars(plain).keys()
    assert not [name for name, module in mapped.named_modules() if "forward" in vars(module)], "hooks are gone"


def is_mapped(weight: torch.Tensor) -> bool:
    """Whether a weight is in a mapped file, even if that is deleted."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split(maxsplit=1)[0].split("-"))
        if first <= weight.data_ptr() < last:
            return ".safetensors" in line
    return False


def test_a_mixture_is_ranked_and_repaired_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(
        "rivers-run-to-the-sea,bees-make-honey" * 40
    )  # bytes below the vocabulary's end
    words = [
        "--criterion", "block_influence", "--drop", "1", "--calibration", str(tmp_path / "text.txt"),
        "--calibration-length", "32", "--calibration-samples", "8", "--repair", "linear", "--check",
    ]  # fmt: skip
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "mapped"), *words]) == 0
    assert "more than half of the free memory: its layers stay on disk" in caplog.text
    caplog.clear()
    assert not list(home.iterdir())
    monkeypatch.undo()
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "loaded"), *words]) == 0
    assert "stay on disk" not in caplog.text
    mapped, loaded = (load_base(tmp_path / name).state_dict() for name in ("mapped", "loaded"))
    for name, tensor in loaded.items():
        torch.testing.assert_close(mapped[name], tensor, rtol=1e-5, atol=1e-6)


def test_the_pruned_model_may_be_on_disk_too(tmp_path: Path) -> None:
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "base")
    places = {"model.layers": "disk"} | dict.fromkeys(
        ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu"
    )
    model = prune_with(
        LayerDropConfig(
            base_model_name_or_path=str(tmp_path / "base"), criterion="block_influence", drop=1, calibration="self",
            calibration_samples=8, calibration_length=8, tune_lm_head=False, tune_layers=0,
        ),
        device_map=places, offload_folder=str(tmp_path / "pruned"), offload_buffers=True, max_memory={"cpu": "1GB"},
    )  # fmt: skip
    assert next(model.base_model.model.model.layers[0].parameters()).is_meta


def test_a_mixture_is_measured_as_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, home: Path
) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    byte_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("rivers-run-to-the-sea,bees-make-honey" * 40)
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "cut"), "--drop-layers", "3"]) == 0

    def measure(output: str) -> dict[str, float]:
        words = [
            "--base",
            str(tmp_path / "base"),
            "--text",
            str(tmp_path / "text.txt"),
            "--windows",
            "2",
            "--length",
            "64",
        ]
        assert main(["eval", str(tmp_path / "cut"), *words, "--output", str(tmp_path / output)]) == 0
        found = json.loads((tmp_path / output).read_text())["results"]
        return {f"{one['metric']} {one['weights']}": one["value"] for one in found}

    mapped = measure("mapped.json")
    assert caplog.text.count("its layers stay on disk") == 2, "the model and its base"
    assert not list(home.iterdir())
    caplog.clear()
    monkeypatch.undo()
    assert mapped == pytest.approx(measure("loaded.json"), rel=1e-4)
    assert "stay on disk" not in caplog.text


def test_a_quantised_model_is_loaded_as_it_is(tmp_path: Path, home: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    packed: Any = load_mapped(tmp_path / "base", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    assert packed.is_quantized
    assert not home.exists()


@pytest.mark.parametrize(
    ("model_type", "what"), [("qwen3_moe", "can't load .*"), ("llama", "can't write converted weights to .*home")]
)
def test_a_full_disk(model_type: str, what: str, tmp_path: Path, home: Path) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "base")
    with largest_file(1 << 10), pytest.raises(CheckpointError, match=rf"{what}: .*File too large.*; free some space"):
        load_mapped(tmp_path / "base", dtype="bfloat16")
    assert not list(home.iterdir())


def test_a_process_of_fsdp(tmp_path: Path) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    script = f"""
import torch.distributed
torch.distributed.init_process_group("gloo", "file://{tmp_path}/store", rank=0, world_size=1)
from hf_layerprune.runtime import mapping
mapping.free_bytes = lambda device: 0
model = mapping.load_mapped("{tmp_path}/base")
assert not [name for name, weight in model.named_parameters() if weight.is_meta]
"""
    settings = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true", "LOCAL_RANK": "0"}
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ | settings)


def test_a_home_that_cannot_be_written(tmp_path: Path, home: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny_model("qwen3_moe").save_pretrained(tmp_path / "base")
    home.write_text("a file")
    model = load_mapped(tmp_path / "base")
    assert not [name for name, weight in model.named_parameters() if weight.is_meta]
    assert f"in memory as a whole, because {home} can't be written (File exists); set HF_HOME" in caplog.text


def test_what_killed_processes_left_is_deleted(tmp_path: Path, home: Path) -> None:
    names = (".hf_layerprune.scratch-00000000", ".hf_layerprune.scratch-00000001", "hf_layerprune.scratch-00000002")
    killed, running, own = (home / name for name in names)
    for folder in (killed, running, own):
        folder.mkdir(parents=True)
        (folder / "layer.safetensors").touch()
    lock = lock_folder(running)
    tiny_model("llama").save_pretrained(tmp_path / "base")
    load_mapped(tmp_path / "base")
    unlock_folder(lock)
    assert {*home.iterdir()} == {running, own}
