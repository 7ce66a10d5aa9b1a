"""The evaluation compared with lm-eval's own command and with a textbook perplexity loop: results and time.

    python benchmarks/measure.py --model FOLDER --data FOLDER            (or HF_LAYERPRUNE_DATA=FOLDER)

For each task file in the data folder: accuracy and standard error from `hf-layerprune eval` and from `lm_eval run`, at
the same batch size, which must agree to the last digit; and the time of both commands, run in turn. For each text:
perplexity compared with a loop over `model(ids, labels=ids).loss`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from hf_layerprune.measure.tasks import LocalTask, read_task, task_config, task_files
from hf_layerprune.measure.texts import Text, read_text


def write_task(task: LocalTask, folder: Path) -> Path:
    """Write a local task as a task that `lm_eval run --include_path FOLDER` reads. Returns the YAML file."""
    data = folder / f"{task.name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in task.rows), encoding="utf-8")
    place = {"data_files": {"test": str(data.resolve())}, "cache_dir": str(folder.resolve() / "cache")}
    path = folder / f"{task.name}.yaml"
    config = task_config(task) | {"dataset_path": "json", "dataset_kwargs": place}
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def run(command: list[str]) -> float:
    """Run a command in its own process. Returns its seconds."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def ours(model: Path, data: Path, task: str, limit: int, batch: str, out: Path) -> tuple[float, dict[str, Any]]:
    target = out / "ours.json"
    target.unlink(missing_ok=True)
    code = "import sys; from hf_layerprune.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "eval", str(model), "--tasks-from", str(data), "--tasks", task]
    command += ["--limit", str(limit), "--batch-size", batch, "--dtype", "bfloat16", "--device", "cpu"]
    seconds = run([*command, "--text", "none", "--output", str(target)])
    results = json.loads(target.read_text())["results"]
    return seconds, {one["metric"]: (one["value"], one["stderr"]) for one in results}


def theirs(model: Path, yaml: Path, task: str, limit: int, batch: str, out: Path) -> tuple[float, dict[str, Any]]:
    folder = out / "theirs"
    for old in folder.rglob("results*.json"):
        old.unlink()
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--include_path", str(yaml), "--tasks", task]
    command += ["--model_args", f"pretrained={model},dtype=bfloat16", "--device", "cpu", "--output_path", str(folder)]
    seconds = run([*command, "--limit", str(limit), "--batch_size", batch])
    (path,) = folder.rglob("results*.json")
    results = json.loads(path.read_text())["results"][task]
    return seconds, {
        metric: (results[f"{metric},none"], results[f"{metric}_stderr,none"]) for metric in ("acc", "acc_norm")
    }


def compare_tasks(args: argparse.Namespace, tasks: list[LocalTask], folder: Path) -> None:
    """Compare results and time of both commands."""
    print(
        "| task | questions | batch | acc, ours | acc, lm-eval | acc_norm, ours | acc_norm, lm-eval | same | s, ours | s, lm-eval |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for task in tasks:
        write_task(task, folder)
        n = min(args.limit, len(task.rows))
        for batch in args.batch_sizes:
            times: dict[str, list[float]] = {"ours": [], "theirs": []}
            for _ in range(args.repeats):
                seconds, mine = ours(args.model, args.data, task.name, n, batch, folder)
                times["ours"].append(seconds)
                seconds, other = theirs(args.model, folder, task.name, n, batch if batch != "auto" else "1", folder)
                times["theirs"].append(seconds)
            same = "yes" if mine == other else "no"
            cells = [
                f"{value!r} ± {error:.4f}"
                for pair in zip(mine.values(), other.values(), strict=True)
                for value, error in pair
            ]
            spent = [f"{statistics.median(one):.1f}" for one in times.values()]
            shown = batch if batch != "auto" else "auto / 1"
            print(f"| {task.name} | {n} | {shown} | {' | '.join(cells)} | {same} | {' | '.join(spent)} |", flush=True)


def compare_text(args: argparse.Namespace, text: Text) -> None:
    """Compare perplexity with the textbook loop."""
    import torch

    from hf_layerprune.measure.distance import text_metrics, window_means
    from hf_layerprune.measure.texts import split_windows
    from hf_layerprune.runtime.loading import load_base, load_tokenizer

    model = load_base(args.model, dtype=torch.bfloat16)
    rows, _ = split_windows(text.text, load_tokenizer(args.model), args.length, args.windows)
    times: dict[str, list[float]] = {"ours": [], "textbook": []}
    for _ in range(args.repeats):
        start = time.perf_counter()
        measured, _ = text_metrics(window_means(model, rows)["nll"])["perplexity"]
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        with torch.no_grad():
            losses = [model(row[None], labels=row[None]).loss.double().item() for row in rows]
        times["textbook"].append(time.perf_counter() - start)
    expected = math.exp(sum(losses) / len(losses))
    print(f"\n{text.name}: {len(rows)} windows of {args.length} tokens")
    print(f"perplexity {measured:.9f}, textbook {expected:.9f}: {measured / expected - 1:+.1e}")
    for name, seconds in times.items():
        print(f"{name}: {statistics.median(seconds):.1f} s ({min(seconds):.1f} to {max(seconds):.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder with the model")
    parser.add_argument(
        "--data", type=Path, default=os.environ.get("HF_LAYERPRUNE_DATA"), help="folder with task files"
    )
    parser.add_argument("--limit", type=int, default=1000, help="questions of each task")
    parser.add_argument(
        "--batch-sizes", nargs="+", default=["8", "auto"], help="auto is compared with lm-eval's default, 1"
    )
    parser.add_argument("--repeats", type=int, default=1, help="runs of each")
    parser.add_argument("--length", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--windows", type=int, default=8, help="windows of each text")
    args = parser.parse_args()
    if args.data is None:
        parser.error("specify a folder with --data, or in HF_LAYERPRUNE_DATA")
    with tempfile.TemporaryDirectory() as folder:
        compare_tasks(args, [read_task(path) for path in task_files(args.data, ".jsonl").values()], Path(folder))
    for path in task_files(args.data, ".txt").values():
        compare_text(args, read_text(path))


if __name__ == "__main__":
    main()
