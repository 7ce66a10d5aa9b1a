"""Which criterion chooses the best layers? All criteria on one model, evaluated on a text that none of them has seen.

    python benchmarks/select_quality.py --model MODEL --report wikitext2-valid.txt --calibration self
    python benchmarks/select_quality.py --model MODEL --report wikitext2-valid.txt --calibration alpaca.jsonl

For each criterion: the layers that it drops, then perplexity and KL from the dense model, after the cut alone and
after each fitted repair. Then the same for every contiguous block, and how well cheap scores rank the repaired blocks.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_layerprune.calibration.rows import CalibrationSet, load_calibration
from hf_layerprune.errors import CutError
from hf_layerprune.layer_ranges import format_layers
from hf_layerprune.options import CutOptions
from hf_layerprune.repair.fit import fit_repair
from hf_layerprune.repair.registry import REPAIRS
from hf_layerprune.runtime.loading import load_base, load_tokenizer
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import ALL, drop_count
from hf_layerprune.select.passes import run_pass
from hf_layerprune.select.repairability import Repairability
from hf_layerprune.select.runner import choose_layers, score_layers
from hf_layerprune.select.scores import Scores
from hf_layerprune.select.search import repair_changes
from hf_layerprune.select.sets import consecutive_blocks
from hf_layerprune.select.trials import Outcome, Trial, evaluate_trials

_FITTED = tuple(name for name, repair in REPAIRS.items() if repair.needs_layer_before)


def spearman(x: list[float], y: list[float]) -> float:
    ranks = torch.tensor([x, y]).argsort(1).argsort(1).double()
    return torch.corrcoef(ranks)[0, 1].item()


def figures(outcome: Outcome) -> dict[str, float]:
    return {"kl": outcome.kl, "perplexity": outcome.perplexity}


@dataclass
class Study:
    """A model, the rows to choose layers on, other rows to report on, and the results so far."""

    walk: LayerWalk
    text: CalibrationSet
    report: CalibrationSet
    count: int
    output: Path
    sets: dict[tuple[int, ...], list[str]] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=lambda: {"criteria": {}})

    def save(self) -> None:
        self.output.write_text(json.dumps(self.results, indent=1))

    def record_choice(self, name: str, drop: list[int], seconds: float) -> None:
        self.sets.setdefault(tuple(drop), []).append(name)
        self.results["criteria"][name] = {"layers": format_layers(drop), "seconds": round(seconds, 1)}
        print(f"{name:32} {format_layers(drop):24} {seconds:.0f} s", flush=True)
        self.save()


def choose(study: Study, few: CalibrationSet) -> Scores:
    """The choice of every criterion. Perplexity and KL use only a few rows; returns the scores by KL."""
    walk, text, count, n = study.walk, study.text, study.count, study.walk.num_layers
    free = set(range(n))
    scores: dict[str, Scores] = {}
    for variant in ("original", "paper"):
        names = [name for name in ALL if name not in ("perplexity", "kl")]
        if variant == "paper":
            # Taylor's variants differ only by a factor and by which layers are protected.
            study.record_choice("taylor (paper)", scores["taylor"].pick(count, free), 0)
            names = ["random", "magnitude_l1", "magnitude_l2", "block_influence"]
        start = time.process_time()
        scores = score_layers(walk, text, names, variant=variant, drop=count)
        seconds = time.process_time() - start
        for name in names:
            guarded = variant == "original" and name in ("taylor", "magnitude_l1", "magnitude_l2")
            drop = scores[name].pick(count, set(range(4, n - 2)) if guarded else free)
            study.record_choice(name if variant == "original" else f"{name} (paper)", drop, seconds / len(names))
            if name == "repairability":
                study.results["shares"] = {format_layers(b): s for b, s in scores[name].blocks.items()}
    start = time.process_time()
    tried = score_layers(walk, few, ["perplexity", "kl"], drop=count, lengths=[count])
    seconds = time.process_time() - start
    for name in ("perplexity", "kl"):
        study.record_choice(name, tried[name].pick(count, free), seconds / 4)
        study.record_choice(f"{name}, contiguous", tried[name].pick(count, free, contiguous=True), seconds / 4)
    study.results["raw_kl"] = {format_layers(b): s for b, s in tried["kl"].blocks.items()}
    for repair in (None, *_FITTED):
        start = time.process_time()
        choice = choose_layers(walk, text, CutOptions(drop=count, criterion="auto", repair=repair))
        study.record_choice(f"auto, repair={repair}", choice.drop_layers, time.process_time() - start)
        study.results[f"auto_{repair}"] = choice.record()
        print("  ", choice.why, flush=True)
    start = time.process_time()
    greedy = choose_layers(walk, text.first(4), CutOptions(drop=count, criterion="kl", steps=count))
    study.record_choice("kl, one after the other", greedy.drop_layers, time.process_time() - start)
    return tried["kl"]


def compare_choices(study: Study) -> None:
    """The effect of each choice on the model, on the other rows, with and without repairs."""
    cuts, repaired = [Trial(drop) for drop in study.sets], {}
    for drop in study.sets:
        for method in _FITTED:
            try:
                repaired[drop, method] = Trial(drop, repair_changes(fit_repair(study.walk, drop, study.text, method)))
            except CutError as error:
                print(f"{format_layers(drop)}: {error}", flush=True)
    outcomes = evaluate_trials(study.walk, study.report, [*cuts, *repaired.values(), Trial(())])
    dense = outcomes.pop()
    after = dict(zip(repaired, outcomes[len(cuts) :], strict=True))
    study.results["dense"] = figures(dense)
    heads = " | ".join(f"KL, {name} | perplexity, {name}" for name in ("cut", *_FITTED))
    print(f"\ndense perplexity {dense.perplexity:.2f}\n\n| criterion | layers | {heads} |")
    print("|---" * (2 * len(_FITTED) + 4) + "|")
    for cut, outcome in zip(cuts, outcomes, strict=False):
        for name in study.sets[cut.drop]:
            entry = study.results["criteria"][name]
            ways = {"cut": outcome} | {m: after[cut.drop, m] for m in _FITTED if (cut.drop, m) in after}
            entry |= {way: figures(one) for way, one in ways.items()}
            cells = [
                f"{ways[w].kl:.3f} | {ways[w].perplexity:.3g}" if w in ways else "- | -" for w in ("cut", *_FITTED)
            ]
            print(f"| {name} | {entry['layers']} | {' | '.join(cells)} |", flush=True)
    study.save()


def compare_blocks(study: Study, by_kl: Scores) -> None:
    """The effect of every contiguous block, and how well cheap scores rank the repaired blocks."""
    observer = Repairability({study.count}, keep=True)
    run_pass(study.walk, study.text, [observer])
    blocks = [
        block for block in consecutive_blocks(range(study.walk.num_layers), study.count) if block in observer.fits
    ]
    folded = [Trial(block, {observer.fits[block].before: observer.fits[block].apply}) for block in blocks]
    truth = evaluate_trials(study.walk, study.report, [*[Trial(block) for block in blocks], *folded])
    raw, fixed = truth[: len(blocks)], truth[len(blocks) :]
    shares, kls = [observer.shares[block] for block in blocks], [by_kl.blocks[block] for block in blocks]
    predictors = {
        "raw KL": kls,
        "unexplained share": shares,
        "raw KL x share": [k * s for k, s in zip(kls, shares, strict=True)],
    }
    for rows in (2, 8):
        cheap = evaluate_trials(study.walk, study.text.first(rows), folded)
        predictors[f"repaired KL, {rows} rows"] = [outcome.kl for outcome in cheap]
    wanted = [outcome.kl for outcome in fixed]
    best = min(range(len(blocks)), key=wanted.__getitem__)
    study.results["predictors"] = {}
    print(f"\nbest repaired block: {format_layers(blocks[best])}\n")
    print("| score | rank correlation with repaired KL | its choice | that choice's repaired KL | and perplexity |")
    print("|---|---|---|---|---|")
    for name, values in predictors.items():
        pick = min(range(len(blocks)), key=values.__getitem__)
        layers, correlation = format_layers(blocks[pick]), spearman(values, wanted)
        study.results["predictors"][name] = {"spearman": correlation, "pick": layers, "values": values}
        print(
            f"| {name} | {correlation:.2f} | {layers} | {wanted[pick]:.3f} | {fixed[pick].perplexity:.1f} |",
            flush=True,
        )
    print(
        "\n| block | KL, cut | perplexity, cut | share | KL, repaired | perplexity, repaired |\n|---|---|---|---|---|---|"
    )
    study.results["blocks"] = []
    for block, cut, repaired, share, kl in zip(blocks, raw, fixed, shares, kls, strict=True):
        layers = format_layers(block)
        entry = {"layers": layers, "cut": figures(cut), "repaired": figures(repaired), "share": share, "raw_kl": kl}
        study.results["blocks"].append(entry)
        before = f"{cut.kl:.2f} | {cut.perplexity:.3g}"
        print(f"| {layers} | {before} | {share:.2f} | {repaired.kl:.3f} | {repaired.perplexity:.1f} |")
    study.save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--report", required=True, help="text to report on")
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--drop", type=float, default=0.25)
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument("--fit-rows", type=int, default=64, help="rows for the maps and the cheap criteria")
    parser.add_argument("--try-rows", type=int, default=16, help="rows for perplexity and KL")
    parser.add_argument("--report-rows", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("select_quality.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load_base(args.model, dtype="auto"), load_tokenizer(args.model)
    text = load_calibration(args.calibration, tokenizer, samples=args.fit_rows, length=args.length, model=model)
    report = load_calibration(
        args.report, tokenizer, samples=args.report_rows, length=args.length, seed=7, model=model
    )
    walk = LayerWalk(model)
    study = Study(walk, text, report, drop_count(args.drop, walk.num_layers), args.output)
    study.results |= {"calibration": text.record(), "report": report.record(), "count": study.count}
    by_kl = choose(study, text.first(args.try_rows))
    compare_choices(study)
    compare_blocks(study, by_kl)


if __name__ == "__main__":
    main()
