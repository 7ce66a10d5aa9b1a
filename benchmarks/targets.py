"""Targets and budgets on a real model: predictions against the result, and the quality of the choice within a budget.

    python benchmarks/targets.py predict --model MODEL
    python benchmarks/targets.py budget --model MODEL --rows 32 --length 256 --max-kl 0.3

`predict` prunes to four targets, and compares parameters, bytes, memory (of the weights and a filled cache) and decoding
speed (in CPU seconds, so run it on one thread, OMP_NUM_THREADS=1). `budget` compares the choice within a budget with all
contiguous blocks of that length, each repaired and evaluated, and with layers that are dropped one at a time without a
repair in the loop. Seconds are CPU seconds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hf_layerprune.calibration.rows import load_calibration
from hf_layerprune.cut.sizes import Sizes
from hf_layerprune.layer_ranges import format_layers
from hf_layerprune.options import CutOptions
from hf_layerprune.runtime.loading import load_base, load_config, load_tokenizer
from hf_layerprune.runtime.precision import to_fast_precision
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import decode_times
from hf_layerprune.select.runner import choose_layers
from hf_layerprune.select.search import Search
from hf_layerprune.select.sets import consecutive_blocks
from hf_layerprune.stages.prune import prune_to
from hf_layerprune.stages.requests import PruneRequest


def predict(args: argparse.Namespace) -> None:
    config = load_config(args.model)
    sizes = Sizes(config, args.model)
    dense = load_base(args.model, dtype="auto")
    decode_times.perf_counter = time.process_time  # other programs run here, too
    times = decode_times.time_decoding(dense, args.context)
    print(times)
    targets: list[dict[str, Any]] = [
        {"target_params": int(0.8 * sizes.parameters())},
        {"target_size": int(0.7 * sizes.file_bytes())},
        {"target_memory": int(0.75 * sizes.memory_bytes(context=args.context)), "context": args.context},
        {"target_speedup": args.speedup, "context": args.context},
    ]
    print("| target | dropped | parameters | bytes | memory | decoding |\n|---|---|---|---|---|---|")
    for target in targets:
        with tempfile.TemporaryDirectory() as place:
            out = Path(place) / "cut"
            prune_to(PruneRequest(args.model, str(out), **target))
            written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            cut = load_base(out, dtype="auto")
            drop = list(range(len(cut.model.layers), sizes.num_layers))
            rows = [
                (sizes.parameters(drop), cut.num_parameters()),
                (sizes.file_bytes(drop), written),
                (sizes.memory_bytes(drop, context=args.context), filled_cache_bytes(cut, args.context)),
            ]
            real = [decode_times.time_decoding(one, args.context).total for one in (dense, cut, dense)]
        name, value = next(iter(target.items()))
        cells = [f"{a:,} / {b:,}" for a, b in rows]
        speed = f"{times.speedup(drop):.3f} / {(real[0] + real[2]) / 2 / real[1]:.3f}"
        print(f"| {name}={value:,} | {len(drop)} | {' | '.join(cells)} | {speed} |", flush=True)


@torch.no_grad()
def filled_cache_bytes(model: Any, context: int) -> int:
    """Bytes of the weights and of a filled cache."""
    cache = model(input_ids=torch.ones(1, context, dtype=torch.long), use_cache=True).cache
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    weights = {id(p): p for p in model.parameters()}.values()
    return sum(t.numel() * t.element_size() for t in (*tensors, *weights))


def budget(args: argparse.Namespace) -> None:
    """Compare the choice within a budget with others of the same size."""
    model = to_fast_precision(load_base(args.model, dtype="auto"))
    tokenizer = load_tokenizer(args.model)
    text = load_calibration(args.calibration, tokenizer, samples=args.rows, length=args.length, model=model)
    walk = LayerWalk(model)
    options = CutOptions(max_kl=args.max_kl, repair=args.repair)
    choice, seconds = timed(lambda: choose_layers(walk, text, options))
    count = len(choice.drop_layers)
    print(choice.why, flush=True)
    free = range(walk.num_layers)
    search = Search(walk, text, free, options)
    print("| choice | layers | KL | seconds |\n|---|---|---|---|")

    def row(name: str, drop: tuple[int, ...], seconds: float) -> None:
        (judged,) = search.judge([(drop, name)])
        print(f"| {name} | {format_layers(drop)} | {judged.outcome.kl:.4f} | {seconds:.0f} |", flush=True)

    row("within the budget", tuple(choice.drop_layers), seconds)
    fixed = CutOptions(drop=count, criterion="auto", repair=args.repair)
    auto, seconds = timed(lambda: choose_layers(walk, text, fixed))
    row("auto, of as many layers", tuple(auto.drop_layers), seconds)
    raw, seconds = timed(lambda: Search(walk, text, free, CutOptions(criterion="auto")).nested(count))
    row("one after the other, without repair", raw, seconds)
    nested, seconds = timed(lambda: Search(walk, text, free, options).nested(count))
    row("one after the other, with repair", nested, seconds)
    blocks = [(block, "block") for block in consecutive_blocks(list(free), count) if 0 not in block]
    judged, seconds = timed(lambda: search.judge(blocks))
    row("best of all blocks, judged on the same rows", judged[0].drop, seconds)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """The result of a function, and its CPU seconds."""
    start = time.process_time()
    found = work()
    return found, time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["predict", "budget"])
    parser.add_argument("--model", required=True)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--speedup", type=float, default=1.2)
    parser.add_argument("--calibration", default="self")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repair", default="linear")
    parser.add_argument("--max-kl", type=float, default=0.3)
    args = parser.parse_args()
    {"predict": predict, "budget": budget}[args.what](args)


if __name__ == "__main__":
    main()
