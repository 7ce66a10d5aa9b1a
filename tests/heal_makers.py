"""Tiny models, rows and trainers for the tests of healing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from datasets import Dataset
from packaging.version import Version
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from hf_layerprune import drop_layers
from hf_layerprune.families import Cut
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.methods import parse_method
from hf_layerprune.heal.trainer import HealTrainer

from .tiny_models import EAGER, VOCAB, tiny_model

TRL = Version(trl.__version__)
trl_computes_losses = pytest.mark.skipif(
    getattr(trl.trainer.utils, "_ChunkedLogProbFunction", True) is None,
    reason="TRL 1.11 to 1.15 compute no loss of their own without Triton",
)

DROP = [5, 6]
ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "sft_tail.py"
PATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": PATH}


def load_recipe(name: str = "sft_tail") -> Any:
    """A script of `recipes/`, as a module."""
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPE.with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def recipe_words(base: Path, output: Path, **settings: Any) -> list[str]:
    """What to say to the recipe so that it heals on `rows.jsonl`, which is beside the base."""
    named = {"model_name_or_path": base, "dataset_name": base.parent / "rows.jsonl", "output_dir": output}
    return [part for name, value in (named | settings).items() for part in (f"--{name}", str(value))]


def launch_recipe(words: list[str], *launcher: str, env: Mapping[str, str] = ENVIRONMENT) -> str:
    """Run the recipe in a process of its own; return what it printed."""
    command = [sys.executable, *launcher, str(RECIPE), *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def write_base_and_rows(folder: Path) -> Path:
    """A tiny Llama with its tokenizer, and `rows.jsonl` beside it."""
    tiny_model("llama").save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    rows(32).to_json(folder.parent / "rows.jsonl")
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of the words w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(VOCAB - 1)} | {"<unk>": VOCAB - 1}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="w0", eos_token="w2", unk_token="<unk>")


def rows(count: int = 24, seed: int = 0) -> Dataset:
    """Prompts and completions of 3 to 12 tokens each."""
    generator = torch.Generator().manual_seed(seed)

    def words() -> str:
        n = int(torch.randint(3, 13, (), generator=generator))
        return " ".join(f"w{i}" for i in torch.randint(3, VOCAB - 1, (n,), generator=generator).tolist())

    return Dataset.from_list([{"prompt": words() + " ", "completion": words()} for _ in range(count)])


def dense_and_pruned(model_type: str, folder: Path, drop: list[int]) -> tuple[Any, Path]:
    """A dense model, and the folder of the pruned one."""
    dense = tiny_model(model_type)
    dense.save_pretrained(folder / "dense")
    pruned = tiny_model(model_type)
    drop_layers(pruned, drop)
    pruned.save_pretrained(folder / "pruned")
    return dense, folder / "pruned"


class Bench:
    """Makes trainers for one pruned model."""

    def __init__(self, folder: Path, model_type: str = "llama", drop: list[int] = DROP) -> None:
        self.folder = folder
        self.cut = Cut(tuple(i for i in range(8) if i not in drop), 8)
        self.dense, self.pruned = dense_and_pruned(model_type, folder, drop)

    def trainer(
        self,
        method: str = "last2",
        trl: bool = False,
        rows_: Any = None,
        eval_rows: Any = None,
        peft_config: Any = None,
        compute_loss_func: Any = None,
        compute_metrics: Any = None,
        data_collator: Any = None,
        **settings: Any,
    ) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self.pruned, dtype=torch.float32, **EAGER)
        arguments = {
            "output_dir": str(self.folder / "out"), "max_steps": 6, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "bf16": False, "report_to": [], "save_strategy": "no", "logging_steps": 1,
            "max_length": 32, "use_cpu": True, "disable_tqdm": True, "warmup_steps": 0,
            "gradient_checkpointing": False,
        } | settings  # fmt: skip
        common = {
            "train_dataset": rows() if rows_ is None else rows_,
            "eval_dataset": eval_rows,
            "processing_class": word_tokenizer(),
            "compute_loss_func": compute_loss_func,
            "compute_metrics": compute_metrics,
            "data_collator": data_collator,
            "peft_config": peft_config or parse_method(method).tail_config(self.cut, str(self.folder / "dense")),
        }
        if trl:
            return SFTTrainer(model, SFTConfig(**arguments), **common)
        args = HealConfig(method=method, **arguments)
        return HealTrainer(model, args, teacher=self.dense if args.distils else None, **common)

    def losses(self, **settings: Any) -> list[float]:
        trainer = self.trainer(**settings)
        trainer.train()
        return losses(trainer)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tuned(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
