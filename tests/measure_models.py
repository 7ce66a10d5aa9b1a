"""Small models with a tokenizer, and tasks to measure them on."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hf_layerprune.measure.evaluate import EvalRequest, evaluate
from hf_layerprune.records.metrics import Metrics

from .tiny_models import randomize

LAYERS, WIDTH = 8, 32
NAMES = ("asked", "begun", "mixed")  # the tasks of `write_tasks`
SMALL = {"length": 64, "windows": 8}


def measure(model: Path | str, folder: Path | None, **more: Any) -> Metrics:
    """Measure a model as `eval` does, with the tasks of a folder."""
    return evaluate(EvalRequest(str(model), tasks_from=folder, **(SMALL if more.get("texts") != () else {}) | more))


def byte_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {letter: i + 3 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


def write_model(folder: Path, *, seed: int = 0, vocabulary: int = 259, bos: bool = False) -> Path:
    """A random Llama of eight layers with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocabulary, max_position_embeddings=512, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    byte_tokenizer(bos).save_pretrained(folder)
    return folder


def write_tasks(folder: Path, questions: int = 24) -> Path:
    """Three tasks, of two to four choices each, and a text."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    words = "the river rises in spring and people walk along the valley to school".split()

    def some(n: int) -> str:
        return " ".join(draw.choices(words, k=n))

    for name, begin, choices in (("asked", "Question: ", 4), ("begun", "", 2), ("mixed", "", 0)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for _ in range(questions):
                n = choices or draw.choice([2, 3, 4])
                row = {"query": begin + some(5), "choices": [some(draw.randint(1, 4)) for _ in range(n)]}
                file.write(json.dumps(row | {"gold": draw.randrange(n)}) + "\n")
    (folder / "words.txt").write_text("\n".join(some(12) for _ in range(60)) + "\n")
    return folder


def write_gguf(path: Path, *, layers: int = 4, seed: int = 0, packed: GGMLQuantizationType | None = None) -> Path:
    """A random Llama as a GGUF file, with a tokenizer and a licence; its matrices in float32, or quantised to `packed`."""
    random_ = np.random.default_rng(seed)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "<s>", "</s>", *alphabet, "th"]
    writer = GGUFWriter(path, "llama")
    writer.add_license("mit")
    writer.add_block_count(layers)
    writer.add_context_length(512)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)

    def add(name: str, *shape: int) -> None:
        values = random_.standard_normal(shape) / shape[-1] ** 0.5 if len(shape) > 1 else np.ones(shape)
        values = values.astype(np.float32)
        if packed is not None and len(shape) > 1:
            writer.add_tensor(name, quants.quantize(values, packed), raw_dtype=packed)
        else:
            writer.add_tensor(name, values)

    add("token_embd.weight", len(tokens), WIDTH)
    add("output_norm.weight", WIDTH)
    for i in range(layers):
        for name, rows, columns in (
            ("attn_q", WIDTH, WIDTH), ("attn_k", WIDTH // 2, WIDTH), ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH), ("ffn_gate", 64, WIDTH), ("ffn_up", 64, WIDTH), ("ffn_down", WIDTH, 64),
        ):  # fmt: skip
            add(f"blk.{i}.{name}.weight", rows, columns)
        add(f"blk.{i}.attn_norm.weight", WIDTH)
        add(f"blk.{i}.ffn_norm.weight", WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def find(
    metrics: Metrics, weights: str, metric: str, task: str | None = None, **settings: Any
) -> dict[str, Any] | None:
    """The newest number of these weights, or `None`."""
    for record in reversed(metrics.results):
        same = record["weights"] == weights and record["metric"] == metric and record.get("task") == task
        if same and settings.items() <= record.get("settings", {}).items():
            return record
    return None
