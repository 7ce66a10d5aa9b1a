"""The main path on a real model: SmolLM2-135M-Instruct, 30 layers, tied head."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from hf_layerprune import CutError, LayerDropConfig, drop_layers, prune_with
from hf_layerprune.cli import main
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.errors import CheckpointError
from hf_layerprune.runtime.loading import load_tokenizer
from hf_layerprune.versions import GGUF_TOKENIZERS, installed_version

from .gguf_makers import misreads_gguf_tokenizers, smollm2

TEXT = (
    "The village lies at the end of a long valley, where the road stops and the footpaths begin. In winter the snow "
    "closes it for weeks at a time, and people live from what they stored in autumn. In spring the river rises, the "
    "meadows turn green within days, and the children walk to school again."
)
EMBEDDINGS, LAYER = 49_152 * 576, 3_540_096


@pytest.fixture(scope="module")
def gguf() -> Path:
    return smollm2()


@pytest.fixture(scope="module")
def base(smollm2_folder: Path) -> Path:
    return smollm2_folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def ids(base: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt").input_ids[:, :64]


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


def test_prune_save_reload_talk(base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    config = LayerDropConfig(base_model_name_or_path=str(base), drop=0.25, tune_lm_head=False)
    model = prune_with(config, dtype=torch.bfloat16).eval()
    assert config.drop_layers == list(range(23, 30))
    assert model.config.num_hidden_layers == 23
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 3 * LAYER + 576
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.01)
    tuned = logits(model, ids)

    model.save_pretrained(tmp_path / "adapter")
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 0 <= size - 2 * (3 * LAYER + 576) < 10_000
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.bfloat16).eval()
    assert torch.equal(logits(again, ids), tuned)

    merged = again.merge_and_unload()
    assert merged.num_parameters() == EMBEDDINGS + 23 * LAYER + 576
    merged.save_pretrained(tmp_path / "pruned")
    plain = load(tmp_path / "pruned")
    assert torch.equal(logits(plain, ids), tuned)
    both = [
        plain.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cache).tolist() for cache in (True, False)
    ]
    assert both[0] == both[1]


def test_three_forms_agree(base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    in_memory = load(base)
    drop_layers(in_memory, [3, 5, 12, 13, 20])
    assert main(["prune", str(base), str(tmp_path / "on-disk"), "--drop-layers", "3,5,12-13,20"]) == 0
    lazy = load_pruned(base, [3, 5, 12, 13, 20], dtype="auto")
    assert lazy.dtype == torch.bfloat16
    for other in (load(tmp_path / "on-disk"), lazy):
        assert torch.equal(logits(other, ids), logits(in_memory, ids))
    # The lineage names the files of the base by their hashes.
    files = json.loads((tmp_path / "on-disk" / "lineage.json").read_text())["base"]["files"]
    assert files["model.safetensors"]["size"] == (base / "model.safetensors").stat().st_size


def test_head_outweighs_the_saving(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        config = LayerDropConfig(base_model_name_or_path=str(base), drop=0.25, tune_lm_head=True)
        model = prune_with(config, dtype=torch.bfloat16)
    assert "adds 28,311,552 parameters, more than the 24,780,672" in caplog.text
    assert "tune_lm_head=False" in caplog.text
    assert model.merge_and_unload().num_parameters() == 2 * EMBEDDINGS + 23 * LAYER + 576


def test_rotary_buffers_stay_in_float32(base: Path) -> None:
    """A cast of the whole model would round them, and with them every position in a long context."""
    model = prune_with(LayerDropConfig(base_model_name_or_path=str(base), drop=0.25), dtype=torch.bfloat16)
    rotary = {name: buffer for name, buffer in model.named_buffers() if "inv_freq" in name}
    assert rotary
    assert {buffer.dtype for buffer in rotary.values()} == {torch.float32}
    exact = 100_000.0 ** (-torch.arange(0, 64, 2) / 64)
    for buffer in rotary.values():
        assert torch.allclose(buffer, exact, rtol=1e-6)


def test_command_line_from_gguf_to_folder(
    gguf: Path, ids: torch.Tensor, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["prune", str(gguf), str(out), "--drop-layers", "12-18"]) == 0
    expected = load(base)
    drop_layers(expected, range(12, 19))
    assert torch.equal(logits(load(out), ids), logits(expected, ids))
    lineage = json.loads((out / "lineage.json").read_text())
    assert list(lineage["base"]["files"]) == [gguf.name]
    if misreads_gguf_tokenizers():
        assert "misreads the tokenizer" in caplog.text
        assert not (out / "tokenizer.json").exists()
        return
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "Hello"}]
    assert "<|im_start|>user\nHello" in tokenizer.apply_chat_template(chat, tokenize=False)


def test_tokenizer_of_a_gguf_file_is_read_right_or_refused(gguf: Path, ids: torch.Tensor) -> None:
    if misreads_gguf_tokenizers():
        with pytest.raises(
            CheckpointError, match=r"misreads the tokenizer .* upgrade: pip install .transformers>=5.6"
        ):
            load_tokenizer(gguf)
    else:
        assert load_tokenizer(gguf)(TEXT, return_tensors="pt").input_ids[:, :64].equal(ids)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--drop-layers", "30"], 2, "--drop-layers has 30, but the model's layers are 0..29"),
        (["--drop-layers", "0-29"], 2, "at least one must stay"),
        (["--drop", "1.5"], 2, "--drop 1.5 must be"),
        (["--adapter"], 2, "since it is cut without being loaded; write a folder, or leave it out"),
        (["--dtype", "float16", "--check"], 2, "--dtype float16 and --check have no effect"),
    ],
)
def test_bad_words_for_a_gguf_file(
    gguf: Path, tmp_path: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", str(gguf), str(tmp_path / "out.gguf"), *words]) == code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_quantised_base_can_be_cut_but_not_tuned(base: Path, ids: torch.Tensor, tmp_path: Path) -> None:
    def quantised(folder: Path, **kwargs: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16, **kwargs).eval()

    model = quantised(base, quantization_config=BitsAndBytesConfig(load_in_4bit=True))
    with pytest.raises(CutError, match=r"is quantised and can't be tuned; load the base unquantised"):
        prune_with(LayerDropConfig(drop=0.25), model)
    assert model.config.num_hidden_layers == 30
    model.save_pretrained(tmp_path / "dense")
    drop_layers(model, range(12, 19))
    # With gradients on: without them, bitsandbytes repacks weights for the CPU at the first pass, and saves those.
    cut = model(ids, use_cache=False).logits
    assert torch.nn.functional.cross_entropy(cut[0, :-1].float(), ids[0, 1:]).exp() < 1000
    model.save_pretrained(tmp_path / "cut")
    assert torch.equal(quantised(tmp_path / "cut")(ids, use_cache=False).logits, cut)
    # The packed bytes are cut as they are.
    assert main(["prune", str(tmp_path / "dense"), str(tmp_path / "on-disk"), "--drop-layers", "12-18"]) == 0
    assert torch.equal(quantised(tmp_path / "on-disk")(ids, use_cache=False).logits, cut)


@pytest.mark.skipif(
    installed_version("transformers") < Version(GGUF_TOKENIZERS),
    reason="this transformers misreads the tokenizer in a GGUF file",
)
def test_the_tokenizer_is_saved_alike_with_and_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is recorded, and compared by `verify` on other machines."""
    saved = []
    for offline in (True, False):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        load_tokenizer(smollm2()).save_pretrained(folder := tmp_path / str(offline))
        saved.append((folder / "tokenizer_config.json").read_bytes())
    assert saved[0] == saved[1]
