"""Prune, repair and train one arm within its time, in this process."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from heal_speed import prepared  # in the folder of `heal_quality.py`

from .arms import STAND_IN, Arm
from .names import data_hash, short_hash
from .setting import Clock, Setting
from .stand_in import train_stand_in
from .texts import instructions, training_rows

_WRITING = 0.4  # of the time, in which the dense model answers instructions
_ANSWERS_AT_ONCE = 32
_ANSWER_TOKENS = 200  # of a row of instructions, on average


def heal(arm: Arm, setting: Setting, seed: int, minutes: float, tokens: int | None = None) -> tuple[Any, dict]:
    """Prune and heal one way.

    Args:
        arm: The arm.
        setting: The settings that all arms share.
        seed: Determines the rows, their order, and all random choices in training.
        minutes: The budget, in CPU minutes.
        tokens: Train on this many tokens once, however long it takes, instead of the minutes.

    Returns:
        The model, and a record of what was done.
    """
    dropped = list(setting.drop[arm.drop])
    folder, charged = prune_cached(dropped, arm.repair, setting)
    clock = Clock(minutes, charged)
    record: dict[str, Any] = {"dropped": dropped, "repair_seconds": round(charged, 1)}
    if arm.method == STAND_IN:
        rows = training_rows(
            setting.data, setting.tokenizer, arm.rows, _count(arm, setting, clock), setting.length, seed
        )
        model, done = train_stand_in(folder, dropped[0] - 1, dropped[-1], rows, setting, clock, seed)
        record |= done
    elif arm.method:
        model, done = _train(arm, folder, setting, clock, seed, tokens)
        record |= done
    else:
        from hf_layerprune.runtime.loading import load_base

        model = load_base(folder, dtype="auto")
    return model, record | {"seconds": round(clock.spent, 1)}


def prune_cached(dropped: list[int], repair: str, setting: Setting) -> tuple[Path, float]:
    """The folder of a cut, and the CPU seconds that it took."""
    from hf_layerprune.layer_ranges import format_layers
    from hf_layerprune.stages.prune import PruneRequest, prune_to

    rows = f"{setting.calibration}x{setting.length}"
    known = short_hash(str(setting.base.resolve()), data_hash(setting.data))
    folder = setting.work / "-".join(["cut", format_layers(dropped), *([repair, rows] if repair else []), known])
    took = folder.with_name(f"{folder.name}.seconds")
    if not took.exists():
        shutil.rmtree(folder, ignore_errors=True)
        start = time.process_time()
        text = setting.work / f"calibration-{setting.length}-{known}.jsonl"
        if not text.exists():
            made = training_rows(setting.data, setting.tokenizer, "broad", 1 << 20, setting.length, 0)
            text.write_text("".join(json.dumps({"text": setting.tokenizer.decode(row)}) + "\n" for row in made))
        request = PruneRequest(
            base=str(setting.base), output=str(folder), drop_layers=dropped, repair=repair or None, calibration=str(text),
            calibration_samples=setting.calibration, calibration_length=setting.length,
        )  # fmt: skip
        prune_to(request)
        took.write_text(f"{time.process_time() - start:.1f}")
    return folder, float(took.read_text())


def _count(arm: Arm, setting: Setting, clock: Clock) -> int:
    return max(8, round(arm.pace * clock.left / 60 / setting.length))


def _rows(arm: Arm, setting: Setting, clock: Clock, seed: int, tokens: int | None) -> list[dict[str, Any]]:
    """Training rows, with labels."""
    count = tokens // setting.length if tokens else _count(arm, setting, clock)
    if arm.rows == "answers":
        some = instructions(setting.data, seed)[: max(8, count * setting.length // _ANSWER_TOKENS)]
        return prepared(setting.tokenizer, some, 2 * setting.length)
    if arm.rows == "rewritten":
        rows, end, written = instructions(setting.data, seed), clock.left * (1 - _WRITING), list[dict]()
        while clock.left > end and rows:
            some, rows = rows[:_ANSWERS_AT_ONCE], rows[_ANSWERS_AT_ONCE:]
            written += _rewritten(some, setting, seed)
        return prepared(setting.tokenizer, written, 2 * setting.length)
    if arm.rows == "self":
        return _generate_rows(count, setting, seed)
    rows = "broad" if arm.rows == "broad and self" else arm.rows
    made = training_rows(setting.data, setting.tokenizer, rows, count, setting.length, seed)
    given = [{"input_ids": row, "labels": row} for row in made]
    # As many as the given rows fall short of.
    return given + (_generate_rows(count - len(given), setting, seed) if rows != arm.rows else [])


def _generate_rows(count: int, setting: Setting, seed: int) -> list[dict[str, Any]]:
    from hf_layerprune.heal.self_data import RowWriter

    if count <= 0:
        return []
    folder = setting.work / f"self-{os.getpid()}"  # of its own, so that each run pays for its rows
    shutil.rmtree(folder, ignore_errors=True)
    rows = RowWriter(setting.dense, setting.tokenizer, folder, seed).generate_rows(count, setting.length)
    shutil.rmtree(folder)
    return [dict(row) for row in rows]


def _rewritten(rows: list[dict[str, str]], setting: Setting, seed: int) -> list[dict[str, str]]:
    from datasets import Dataset

    from hf_layerprune.heal.self_data import RowWriter

    folder = setting.work / "self"
    shutil.rmtree(folder, ignore_errors=True)
    prompts = [[{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}".strip()}] for row in rows]
    asked = Dataset.from_list([{"prompt": prompt, "completion": ""} for prompt in prompts])
    answered = RowWriter(setting.dense, setting.tokenizer, folder, seed).rewrite_answers(asked, setting.length, 0.0)
    return [
        {"instruction": row["prompt"][0]["content"], "input": "", "output": row["completion"][0]["content"]}
        for row in answered
    ]


def _train(
    arm: Arm, folder: Path, setting: Setting, clock: Clock, seed: int, tokens: int | None
) -> tuple[Any, dict[str, Any]]:
    """Train until the time is up, or with `tokens`, for one epoch."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import ModelConfig

    from hf_layerprune.heal.config import HealConfig
    from hf_layerprune.heal.features import RATE
    from hf_layerprune.heal.student import Student, adapter_config, load_student
    from hf_layerprune.heal.trainer import HealTrainer

    class TimeIsOver(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = clock.left <= 0

    class Timed(HealTrainer):
        """The learning rate rises over the first 3 % of the time left for training, and falls to zero over the rest."""

        begun = 0.0

        @property
        def progress(self) -> float:
            return (time.process_time() - self.begun) / max(clock.end - self.begun, 1.0)

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.begun = time.process_time()

            def share(step: int) -> float:
                gone = self.progress
                rate = RATE if gone < self.args.features else 1.0
                return rate * max(0.0, min(1.0, gone / 0.03, (1 - gone) / 0.97))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
            return self.lr_scheduler

    student = Student.load(folder)
    method = student.method(arm.method)
    before = time.process_time()
    model = load_student(student, method, dtype="auto")
    clock.start, clock.end = (moment + time.process_time() - before for moment in (clock.start, clock.end))
    rows = Dataset.from_list(_rows(arm, setting, clock, seed, tokens))
    output = setting.work / f"run-{os.getpid()}"  # runs in one folder may go side by side
    shutil.rmtree(output, ignore_errors=True)
    settings = HealConfig(
        **{
            "output_dir": str(output), "method": method.name, "loss": arm.loss, "teacher": str(setting.base),
            "num_train_epochs": 1 if tokens else 1000, "per_device_train_batch_size": setting.batch,
            "gradient_accumulation_steps": 1, "max_length": None, "use_cpu": not torch.cuda.is_available(),
            "bf16": setting.bf16, "report_to": [], "save_strategy": "no", "logging_steps": 1, "seed": seed,
            "disable_tqdm": True, **arm.settings,
        }
    )  # fmt: skip
    trainer = (HealTrainer if tokens else Timed)(
        model,
        settings,
        teacher=setting.dense if settings.distils else None,
        train_dataset=rows,
        processing_class=setting.tokenizer,
        peft_config=adapter_config(student, method, ModelConfig(lora_dropout=0.0)),
        callbacks=[] if tokens else [TimeIsOver()],
    )
    made = clock.spent
    trainer.train()
    shutil.rmtree(output, ignore_errors=True)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    trained = trainer.accelerator.unwrap_model(trainer.model)
    count = sum(parameter.numel() for parameter in trained.parameters() if parameter.requires_grad)
    healed = trained.merge_and_unload() if hasattr(trained, "merge_and_unload") else trained
    # As it would be saved: trained weights were held in float32.
    return healed.to(setting.dense.dtype), {
        "method": method.name,
        "learning_rate": settings.learning_rate,
        "rows": len(rows),
        "row_tokens": sum(map(len, rows["input_ids"])),
        "tokens": int(max((entry.get("num_tokens", 0) for entry in history), default=0)),
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch or 0, 2),
        "trained_parameters": count,
        "losses": [round(loss, 4) for loss in (losses[0], losses[-1])] if losses else [],
        "prepared_seconds": round(made, 1),
    }
