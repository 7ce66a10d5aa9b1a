"""The models that are tried, whole and cut, and what transformers answers on them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from .environments import HOME, ROOT

MODELS = HOME / "models"
LAYERS, DROP = 8, "2-4"  # across every pattern: an odd number of layers, from the middle of a group
COUNT = 16


@dataclass(frozen=True)
class Tried:
    """A model: a tiny random one of a family, or the real one."""

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    layers: int = LAYERS
    drop: str = DROP
    pattern: str = ""  # what differs from layer to layer


def _turns(period: int, layers: int = LAYERS) -> dict[str, Any]:
    """Every `period`-th layer has full attention, as in the published models."""
    kinds = ["full_attention" if (i + 1) % period == 0 else "sliding_attention" for i in range(layers)]
    return {"layer_types": kinds}


_QWEN_MOE = {"decoder_sparse_step": 1, "norm_topk_prob": True, "use_sliding_window": False}
_FULL = {"use_sliding_window": False, "layer_types": ["full_attention"] * LAYERS}
_NO_ROPE = {"no_rope_layers": [1, 1, 1, 0] * (LAYERS // 4), "use_sliding_window": False}
_UNCAPPED = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
REAL = "SmolLM2-135M"
HEALED = "SmolLM2-135M, healed"  # the same cut, then trained, with its head untied
BOTH = {REAL: "12-18 of 30, refit", HEALED: "12-18 of 30, refit, lm_head+last2"}
FAMILIES = {
    "llama": Tried("llama"),
    "qwen2": Tried("qwen2", _FULL),
    "qwen3": Tried("qwen3", _FULL),
    "qwen3_moe": Tried("qwen3_moe", _QWEN_MOE | {"mlp_only_layers": []}),
    "qwen3_moe, dense layers": Tried(
        "qwen3_moe", _QWEN_MOE | {"mlp_only_layers": [0, 3, 6]}, pattern="layers 0, 3 and 6 are dense"
    ),
    "mistral": Tried("mistral", {"sliding_window": None}),
    "mixtral": Tried("mixtral", {"sliding_window": None}),
    "gemma2": Tried("gemma2", _turns(2), pattern="every second layer has full attention"),
    "gemma2, in step": Tried("gemma2", _turns(2), drop="2-3", pattern="the same; the cut keeps the period"),
    "gemma3": Tried("gemma3_text", _turns(6, 12) | _UNCAPPED, 12, pattern="every sixth layer has full attention"),
    "phi3": Tried("phi3", {"sliding_window": None}),
    "olmo2": Tried("olmo2"),
    "granite": Tried("granite"),
    "gpt_oss": Tried("gpt_oss", _turns(2), pattern="every second layer has full attention"),
    "gpt_oss, in step": Tried("gpt_oss", _turns(2), drop="2-3", pattern="the same; the cut keeps the period"),
    "smollm3": Tried("smollm3", _NO_ROPE, pattern="every fourth layer has no rotary embedding"),
}
# Sizes that the engines' kernels take (heads of 32, rows of 32), and the scales of published models.
_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 64, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8,
    "max_position_embeddings": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
}  # fmt: skip


@cache
def make(name: str) -> dict[str, Path]:
    """Make a model and its cut, where they are not there yet.

    Args:
        name (`str`): Of `FAMILIES`, or of `BOTH`.

    Returns:
        `dict[str, Path]`: The folders `dense` and `cut`.
    """
    if name == HEALED:
        return {"dense": make(REAL)["dense"], "cut": _make_healed(make(REAL)["cut"])}
    folder = MODELS / name.replace(", ", "-").replace(" ", "-")
    paths = {"dense": folder / "dense", "cut": folder / "cut"}
    if not paths["cut"].is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (_make_real if name == REAL else _make_tiny)(name, paths)
    return paths


def _make_real(name: str, paths: dict[str, Path]) -> None:
    from hf_layerprune.cli import main

    from ..gguf_makers import unpack_smollm2

    if not paths["dense"].is_dir():
        unpack_smollm2(paths["dense"].with_suffix(".part")).rename(paths["dense"])
    rows = ["--calibration-samples", "16", "--calibration-length", "64"]
    main(["prune", str(paths["dense"]), str(paths["cut"]), "--drop-layers", "12-18", "--repair", "refit", *rows])


def _make_healed(cut: Path) -> Path:
    """Train the head and the last two layers for a few steps; any text will do."""
    work = MODELS / "SmolLM2-135M-healed"
    if not (work / "cut").is_dir():
        work.mkdir(parents=True, exist_ok=True)
        parts = [part for part in (ROOT / "docs" / "choose.md").read_text("utf-8").split("\n\n") if len(part) > 200]
        rows = work / "rows.jsonl"
        rows.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts[:8]))
        words = ["--model_name_or_path", str(cut), "--dataset_name", str(rows), "--output_dir", str(work / "run")]
        words += ["--method", "lm_head+last2", "--max_steps", "2", "--max_length", "64"]
        words += ["--per_device_train_batch_size", "2", "--report_to", "none", "--use_cpu", "true", "--bf16", "false"]
        shutil.rmtree(work / "run", ignore_errors=True)
        subprocess.run([sys.executable, str(ROOT / "recipes" / "sft_tail.py"), *words], check=True)
        (work / "run" / "model").rename(work / "cut")
    return work / "cut"


def _make_tiny(name: str, paths: dict[str, Path]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_layerprune.layer_ranges import parse_layers

    from ..cutting import cut_checkpoint
    from ..tiny_models import EAGER, randomize

    tokenizer = AutoTokenizer.from_pretrained(make(REAL)["dense"])
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    config = tiny(name, vocab_size=len(tokenizer), **special)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **EAGER).eval()
    randomize(model)
    model.save_pretrained(paths["dense"])
    tokenizer.save_pretrained(paths["dense"])
    cut_checkpoint(paths["dense"], paths["cut"], parse_layers(FAMILIES[name].drop))


def tiny(name: str, **more: Any) -> Any:
    """The config of a tiny model.

    Args:
        name (`str`): Of `FAMILIES`.
        **more (`Any`): Fields.

    Returns:
        `PreTrainedConfig`: As the family's published models have it, but small.
    """
    from ..tiny_models import tiny_config

    tried = FAMILIES[name]
    config = tiny_config(tried.family)
    given = config.to_dict()
    sizes = _SIZES | tried.config | more | {"num_hidden_layers": tried.layers}
    made = {key: value for key, value in given.items() if key not in ("layer_types", "max_window_layers")}
    return type(config).from_dict(made | {key: value for key, value in sizes.items() if key in given})


def prompt_of(name: str) -> list[int]:
    """The token ids that every engine gets."""
    if name in BOTH:
        from transformers import AutoTokenizer

        text = "The capital of France is Paris, and the river that runs through it is called"
        return list(AutoTokenizer.from_pretrained(make(REAL)["dense"])(text)["input_ids"])
    return [100 + 37 * i for i in range(24)]


def reference(name: str, which: str) -> dict[str, Any]:
    """What transformers answers in float32: greedy tokens, their log-probabilities, and the lead over the next best.

    Args:
        name (`str`): Of `FAMILIES`, or `REAL`.
        which (`str`): `"dense"` or `"cut"`.

    Returns:
        `dict[str, Any]`: `tokens`, `logprobs` and `leads`.
    """
    folder = make(name)[which]
    cached = folder.parent / f"{which}.json"
    if not cached.is_file():
        cached.write_text(json.dumps(_answer(folder, prompt_of(name))))
    return json.loads(cached.read_text())


def _answer(folder: Path, prompt: list[int], **changed: Any) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from ..tiny_models import EAGER

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER, **changed).eval()
    ids, leads, logprobs = torch.tensor([prompt]), [], []
    with torch.inference_mode():
        for _ in range(COUNT):
            top = model(ids, use_cache=False).logits[0, -1].log_softmax(-1).topk(2)
            logprobs.append(top.values[0].item())
            leads.append((top.values[0] - top.values[1]).item())
            ids = torch.cat([ids, top.indices[:1, None]], dim=1)
    return {"tokens": ids[0, len(prompt) :].tolist(), "logprobs": logprobs, "leads": leads}


def ignores_pattern(name: str) -> float | None:
    """How far the cut's log-probabilities move if an engine goes by the layers' new numbers instead of the config.

    Args:
        name (`str`): Of `FAMILIES`.

    Returns:
        `float | None`: The largest difference; `None` where nothing can be ignored.
    """
    tried = FAMILIES.get(name)
    if tried is None or "layer_types" not in tried.config or not tried.pattern:
        return None
    cut = make(name)["cut"]
    kinds = json.loads((cut / "config.json").read_text())["layer_types"]
    wrong = tried.config["layer_types"][: len(kinds)]
    if kinds == wrong:
        return None
    wrong = _answer(cut, prompt_of(name), layer_types=wrong)
    return difference(reference(name, "cut"), wrong)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference between log-probabilities, up to the first token that differs, and with it.

    Args:
        ours (`dict[str, Any]`): What transformers answers.
        theirs (`dict[str, Any]`): What an engine answers.

    Returns:
        `float`: In nats.
    """
    largest = 0.0
    for one, other, a, b in zip(ours["tokens"], theirs["tokens"], ours["logprobs"], theirs["logprobs"], strict=True):
        largest = max(largest, abs(a - b))
        if one != other:
            break
    return largest
