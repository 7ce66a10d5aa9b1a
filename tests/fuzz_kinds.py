"""Sound files of every kind that the commands and the recipe read, how they are damaged, and what then reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from hf_layerprune.cli import main

from . import fuzz
from .measure_models import byte_tokenizer, write_gguf, write_model, write_tasks

TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' }}{{ message['content'] }}{% if not loop.last %}"
    "{{ '</s>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
CARD = "---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- a\nbase_model: org/name\n---\n\n# A model\n\nWords.\n"
CHAT = [{"role": "user", "content": "Where does the river run?"}, {"role": "assistant", "content": "Down the hill."}]


def _model(folder: Path) -> Path:
    write_model(folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 8}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "README.md").write_text(CARD)
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": 2, "top_p": 0.9}))
    return folder


def _older_tokenizer(folder: Path) -> Path:
    """A model whose tokenizer is in the older files, vocab.json and merges.txt."""
    vocabulary = byte_tokenizer().get_vocab()
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"th": len(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\n")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<s>", "pad_token": {"content": "<pad>"}})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<more>": 259}))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").unlink()
    return folder


def _settings(sound: Sound) -> dict[str, Any]:
    """Settings of the recipe, as in `recipes/configs`."""
    return {
        "model_name_or_path": str(sound.base), "dtype": "float32", "drop_layers": "5,6", "repair": "linear",
        "criterion": "reverse_order", "calibration": str(sound.root / "rows.jsonl"), "calibration_samples": 2,
        "calibration_length": 16, "method": "last1", "loss": "ce", "dataset_name": str(sound.root / "rows.jsonl"),
        "max_length": 32, "completion_only_loss": False, "template": "auto", "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1, "learning_rate": 0.001, "lr_scheduler_type": "linear", "warmup_steps": 1,
        "optim": "adamw_torch", "weight_decay": 0.0, "max_grad_norm": 1.0, "seed": 42, "eval_strategy": "no",
        "save_strategy": "no", "logging_steps": 10, "pad_to_multiple_of": 8, "use_cpu": True, "bf16": False,
        "report_to": "none", "disable_tqdm": True, "attn_implementation": "eager",
    }  # fmt: skip


class Sound:
    """Sound files of every kind, and the commands that read them."""

    def __init__(self, root: Path) -> None:
        from peft import LoraConfig, get_peft_model

        from hf_layerprune.runtime.loading import load_base

        self.root = root
        self.base = _model(root / "base")
        text = root / "text.txt"
        text.write_text("The river rises in spring and people walk along the valley. " * 20)
        (root / "rows.jsonl").write_text(
            "".join(json.dumps({"text": f"{i} " + "river " * 40}) + "\n" for i in range(4))
        )
        (root / "chats.jsonl").write_text("".join(json.dumps({"text": CHAT}) + "\n" for _ in range(4)))
        (root / "messages.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(4)))
        self.text = ["--text", str(text), "--length", "32", "--windows", "1", "--quiet"]
        self.rank = ["--criterion", "block_influence", "--calibration-samples", "2", "--calibration-length", "32"]
        write_tasks(root / "tasks", questions=2)
        (root / "tasks" / "asked.yaml").write_text(
            'doc_to_text: "Q: {{query}}\\nA:"\ntarget_delimiter: " "\ndescription: "Answer."\nmetadata:\n  version: 1\n'
        )
        self.pruned = root / "pruned"
        assert main(["prune", str(self.base), str(self.pruned), "--drop", "2"]) == 0
        assert main(["eval", str(self.pruned), "--base", str(self.base), *self.text]) == 0
        assert main(["card", str(self.pruned)]) == 0
        self.lora = root / "lora"
        get_peft_model(load_base(self.base), LoraConfig(target_modules=["q_proj"])).save_pretrained(self.lora)
        byte_tokenizer().save_pretrained(self.lora)
        self.adapter = root / "adapter"
        assert main(["prune", str(self.base), str(self.adapter), "--drop", "2", "--adapter"]) == 0
        self.merges = _older_tokenizer(write_model(root / "merges", vocabulary=260))
        self.asked = ["--tasks-from", str(root / "tasks"), "--tasks", "asked", "--text", "none", "--quiet"]
        ask = ["eval", str(self.base), *self.asked, "--answers", str(root / "answers")]
        assert main([*ask, "--output", str(root / "numbers.json")]) == 0
        (root / "settings.yaml").write_text(yaml.safe_dump(_settings(self), sort_keys=False))
        # Arguments override the file, so a run stays short and inside its folder.
        self.recipe = ["recipe", "--output_dir", "{out}", "--max_steps", "1", "--config"]
        self.sharded = root / "sharded"
        load_base(self.base).save_pretrained(self.sharded, max_shard_size="60KB")
        byte_tokenizer().save_pretrained(self.sharded)
        self.gguf = root / "gguf"
        self.gguf.mkdir()
        write_gguf(self.gguf / "model.gguf")


Words = list[str]
# For each kind of file: where it is, how it is damaged, and the commands that read it, in which `{}` is a copy of its folder
# with the damaged file, and `{out}` the output.
Kind = tuple[Callable[[Sound], Path], Callable[[bytes], st.SearchStrategy[bytes]], Callable[[Sound], list[Words]]]


def _json(data: bytes) -> st.SearchStrategy[bytes]:
    return fuzz.damaged_json(data.decode())


def _gguf(data: bytes) -> st.SearchStrategy[bytes]:
    return fuzz.damaged_gguf(data, data.index(b"blk.3.ffn_norm") + 40)


KINDS: dict[str, Kind] = {
    "config.json": (
        lambda s: s.base / "config.json",
        _json,
        lambda s: [["inspect", "{}"], ["prune", "{}", "{out}"], ["eval", "{}", *s.text], ["prune", "{}", "{out}", "--adapter"]],
    ),
    "generation_config.json": (
        lambda s: s.base / "generation_config.json",
        _json,
        lambda s: [
            ["prune", "{}", "{out}"],
            ["eval", "{}", *s.text],
            ["bench", "{}", "--batch-sizes", "1", "--prompt-lengths", "4", "--new-tokens", "2", "--repeats", "1",
             "--load-repeats", "0", "--quiet"],
        ],
    ),
    "tokenizer.json": (lambda s: s.base / "tokenizer.json", _json, lambda s: [["eval", "{}", *s.text]]),
    "tokenizer_config.json": (
        lambda s: s.base / "tokenizer_config.json",
        _json,
        lambda s: [["eval", "{}", *s.text], ["prune", "{}", "{out}"]],
    ),
    "chat_template.jinja": (
        lambda s: s.base / "chat_template.jinja",
        lambda data: fuzz.damaged_template(data.decode()),
        lambda s: [["rank", "{}", *s.rank, "--calibration", str(s.root / "chats.jsonl")]],
    ),
    "model.safetensors.index.json": (
        lambda s: s.sharded / "model.safetensors.index.json",
        _json,
        lambda s: [["prune", "{}", "{out}"], ["eval", "{}", *s.text], ["prune", "{}", "{out}", "--adapter"]],
    ),
    "model.safetensors": (
        lambda s: s.base / "model.safetensors",
        fuzz.damaged_safetensors,
        lambda s: [["prune", "{}", "{out}"], ["eval", "{}", *s.text]],
    ),
    "model.gguf": (
        lambda s: s.gguf / "model.gguf",
        _gguf,
        lambda s: [["inspect", "{}/model.gguf"], ["prune", "{}/model.gguf", "{out}.gguf", "--drop", "1"]],
    ),
    "lineage.json": (
        lambda s: s.pruned / "lineage.json",
        _json,
        lambda s: [
            ["verify", "{}"],
            ["verify", "{}", "--accept-trained"],
            ["card", "{}"],
            ["eval", "{}", *s.text],
            ["push", "{}", "someone/small", "--dry-run"],
        ],
    ),
    "metrics.json": (
        lambda s: s.pruned / "metrics.json",
        _json,
        lambda s: [["card", "{}"], ["eval", "{}", *s.text], ["push", "{}", "someone/small", "--dry-run"]],
    ),
    "adapter_config.json": (
        lambda s: s.lora / "adapter_config.json",
        _json,
        lambda s: [["eval", "{}", *s.text], ["card", "{}"]],
    ),
    "adapter_config.json of ours": (
        lambda s: s.adapter / "adapter_config.json",
        _json,
        lambda s: [["eval", "{}", *s.text], ["card", "{}"], ["verify", "{}"]],
    ),
    "README.md": (
        lambda s: s.pruned / "README.md",
        lambda data: fuzz.damaged_yaml(data.decode()),
        lambda s: [["card", "{}"], ["prune", "{}", "{out}"], ["push", "{}", "someone/small", "--dry-run"]],
    ),
    "asked.yaml": (
        lambda s: s.root / "tasks" / "asked.yaml",
        lambda data: fuzz.damaged_yaml(data.decode()),
        lambda s: [["eval", str(s.base), *s.asked, "--tasks-from", "{}", "--output", "{out}.json"]],
    ),
    "asked.jsonl": (
        lambda s: s.root / "tasks" / "asked.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [["eval", str(s.base), *s.asked, "--tasks-from", "{}", "--output", "{out}.json"]],
    ),
    "calibration rows": (
        lambda s: s.root / "rows.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [["rank", str(s.base), *s.rank, "--calibration", "{}/rows.jsonl"]],
    ),
    "calibration chats": (
        lambda s: s.root / "chats.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [["rank", str(s.base), *s.rank, "--calibration", "{}/chats.jsonl"]],
    ),
    "config.json of a pruned model": (
        lambda s: s.pruned / "config.json",
        _json,
        lambda s: [["verify", "{}"], ["card", "{}"], ["eval", "{}", *s.text], ["push", "{}", "someone/small", "--dry-run"]],
    ),
    "model.safetensors of a pruned model": (
        lambda s: s.pruned / "model.safetensors",
        fuzz.damaged_safetensors,
        lambda s: [["verify", "{}"], ["push", "{}", "someone/small", "--dry-run"]],
    ),
    "adapter_model.safetensors": (
        lambda s: s.lora / "adapter_model.safetensors",
        fuzz.damaged_safetensors,
        lambda s: [["eval", "{}", *s.text]],
    ),
    "adapter_model.safetensors of ours": (
        lambda s: s.adapter / "adapter_model.safetensors",
        fuzz.damaged_safetensors,
        lambda s: [["eval", "{}", *s.text], ["verify", "{}"], ["card", "{}"]],
    ),
    "picture of the card": (
        lambda s: s.pruned / "assets" / "layers.png",
        fuzz.damaged_bytes,
        lambda s: [["card", "{}"], ["push", "{}", "someone/small", "--dry-run"]],
    ),
    "text": (
        lambda s: s.root / "text.txt",
        fuzz.damaged_bytes,
        lambda s: [
            ["eval", str(s.base), *s.text, "--text", "{}/text.txt", "--output", "{out}.json"],
            ["rank", str(s.base), *s.rank, "--calibration", "{}/text.txt"],
        ],
    ),
    "stored answers": (
        lambda s: next((s.root / "answers").iterdir()),
        _json,
        lambda s: [["eval", str(s.base), *s.asked, "--answers", "{}", "--output", "{out}.json"]],
    ),
    "vocab.json": (lambda s: s.merges / "vocab.json", _json, lambda s: [["eval", "{}", *s.text]]),
    "merges.txt": (lambda s: s.merges / "merges.txt", fuzz.damaged_bytes, lambda s: [["eval", "{}", *s.text]]),
    "special_tokens_map.json": (
        lambda s: s.merges / "special_tokens_map.json", _json, lambda s: [["eval", "{}", *s.text]]
    ),
    "added_tokens.json": (lambda s: s.merges / "added_tokens.json", _json, lambda s: [["eval", "{}", *s.text]]),
    "settings of the recipe": (
        lambda s: s.root / "settings.yaml",
        lambda data: fuzz.damaged_yaml(data.decode()),
        lambda s: [[*s.recipe, "{}/settings.yaml"]],
    ),
    "training rows": (
        lambda s: s.root / "rows.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [[*s.recipe, str(s.root / "settings.yaml"), "--dataset_name", "{}/rows.jsonl"]],
    ),
    "training chats": (
        lambda s: s.root / "messages.jsonl",
        lambda data: fuzz.damaged_lines(data.decode()),
        lambda s: [[*s.recipe, str(s.root / "settings.yaml"), "--dataset_name", "{}/messages.jsonl"]],
    ),
}  # fmt: skip
