"""Part b: training the tail of an 8B shape of random weights, by this package and by others."""

from __future__ import annotations

import random
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from .disk import base
from .steps import Setting, Step, last, limits, middle, peak_bytes, random_model, reset_peak, synchronise, tokenizer

WAYS = ("ours", "trl-default", "trl-tuned", "paper", "ours-kd")
EPOCHS = 3


def steps(rounds: int) -> list[Step]:
    return [Step(f"b-{way}", partial(run, way), 5) for way in WAYS]


def rows(setting: Setting) -> list[dict[str, list[int]]]:
    """Rows of random tokens: of 64 to 512 tokens, a third of them a question without labels."""
    count, shortest, longest = (12, 6, 24) if setting.tiny else (1024, 64, 512)
    draw, made = random.Random(0), []
    for _ in range(count):
        length = draw.randint(shortest, longest)
        ids = [draw.randint(3, 100 if setting.tiny else 128_000) for _ in range(length)]
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3 :]})
    return made


def run(way: str, setting: Setting) -> dict[str, Any]:
    """Train one way for three epochs, 64 rows a step, and measure the seconds after each."""
    import heal_speed  # in the folder of `gpu.py`
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    found: dict[str, Any] = {"limits": limits(setting)}
    made = rows(setting)
    model = random_model(setting, middle(setting) if way == "ours-kd" else last(setting))
    if way in ("trl-default", "paper"):
        model = model.float()
    batch, a_step = (4, 8) if setting.tiny else (4 if way == "paper" else 8, 64)
    ends: list[float] = []
    with tempfile.TemporaryDirectory(dir=setting.work) as folder:

        class Clock(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                synchronise(setting)
                found["before_the_first_step"] = time.perf_counter() - start
                files = (path for path in (Path(folder) / "_cache").rglob("*") if path.is_file())
                found["cache_bytes"] = sum(path.stat().st_size for path in files)

            def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
                synchronise(setting)
                ends.append(time.perf_counter() - start)

        arguments: dict[str, Any] = {
            "output_dir": folder, "num_train_epochs": EPOCHS, "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": a_step // batch, "learning_rate": 1e-5, "bf16": True,
            "use_cpu": setting.tiny, "report_to": [], "save_strategy": "no", "logging_steps": 1,
            "disable_tqdm": True, "seed": 0,
        }  # fmt: skip
        common = {"train_dataset": Dataset.from_list(made), "processing_class": tokenizer(), "callbacks": [Clock()]}
        padded = {"max_length": None, "pad_to_multiple_of": 8}
        if way == "ours":
            trainer = heal_speed.ours(model, arguments | padded, common, way)
        elif way == "ours-kd":
            trainer = distilled(setting, model, arguments | padded, common)
        else:
            heal_speed.freeze_by_hand(model)
            if way == "paper":
                trainer = heal_speed.paper_trainer(model, arguments, common)
            else:
                args = SFTConfig(**arguments, **padded, gradient_checkpointing=way == "trl-default")
                trainer = SFTTrainer(model, args, **common)
        reset_peak(setting)
        synchronise(setting)
        start = time.perf_counter()
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    tokens = sum(len(row["input_ids"]) for row in made)
    labelled = sum(label != -100 for row in made for label in row["labels"])
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    found |= {
        "seconds": ends, "tokens": tokens, "labelled": labelled, "trained_parameters": trained,
        "steps_an_epoch": trainer.state.global_step / EPOCHS, "batches_a_step": a_step // batch,
        "peak_bytes": peak_bytes(setting), "losses": [losses[0], losses[-1]],
    }  # fmt: skip
    if way.startswith("ours"):
        head = trainer.plain_model.get_output_embeddings().weight.numel()
        found |= utilisation(found, head, trained_head=way == "ours")
    return found


def distilled(setting: Setting, model: Any, arguments: dict[str, Any], common: dict[str, Any]) -> Any:
    """A trainer that distils the dense model, whose states are computed once, into the layers around the cut."""
    from hf_layerprune.heal.config import HealConfig
    from hf_layerprune.heal.methods import parse_method
    from hf_layerprune.heal.student import recorded_cut
    from hf_layerprune.heal.trainer import HealTrainer

    teacher = str(base(setting))  # the same numbers; read from the disk, as in a real run, and then let go
    settings = {"method": "behind2", "loss": "kd", "cache": "on", "gradient_checkpointing": False}
    args = HealConfig(**arguments, **settings, teacher=teacher)
    peft_config = parse_method("behind2").tail_config(recorded_cut(model.config), None)
    return HealTrainer(model, args, peft_config=peft_config, **common)


def utilisation(found: dict[str, Any], head: int, trained_head: bool) -> dict[str, float]:
    """The fraction of the card's matrix-product speed that the last epoch reached, and the highest that it can reach.

    Counted are the products of trained weights: forward, and gradients of inputs and of weights. Those of attention, below
    1 %, are not. A trained head processes the labelled tokens; in distillation, a frozen head processes all tokens, forward
    and backward, and the teacher's head, forward. The limit includes the bytes that move outside of products: AdamW in
    float32 with clipping (44 per weight and step), and for each batch the cast of the weights (6) and the accumulation of
    their gradients (18).
    """
    seconds = found["seconds"][-1] - found["seconds"][-2]
    layers = found["trained_parameters"] - (head if trained_head else 0)
    products = 6 * (layers * found["tokens"] + head * found["labelled" if trained_head else "tokens"])
    moved = found["trained_parameters"] * found["steps_an_epoch"] * (44 + 24 * found["batches_a_step"])
    at_best = products / found["limits"]["flops"]
    return {
        "fraction_of_peak": at_best / seconds,
        "limit_of_fraction": at_best / (at_best + moved / found["limits"]["bytes_per_second"]),
    }
