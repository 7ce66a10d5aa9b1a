"""Time and peak memory of scoring layers, compared with plain loops and with published implementations.

    python benchmarks/select_speed.py --model MODEL --text TEXT
    python benchmarks/select_speed.py --model MODEL --text TEXT --shortened CHECKOUT --pruneme CHECKOUT
    python benchmarks/select_speed.py --stream 3

The first two commands print a table for one model: each way runs in its own process, in turn in each round, on the
same rows of tokens. `--shortened` is a checkout of Shortened LLaMA (Nota-NetsPresso/shortened-llm), `--pruneme` one of
PruneMe (arcee-ai/PruneMe): their own functions are called in the order of their scripts. The last command makes a
Llama of the given size in GB, and compares ranking it layer by layer with loading it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from hf_layerprune.calibration.rows import CalibrationSet, load_calibration
from hf_layerprune.cut.memory import drop_layers
from hf_layerprune.options import CutOptions
from hf_layerprune.records.lineage import peak_rss
from hf_layerprune.runtime.loading import load_base, load_tokenizer
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select.runner import choose_layers, score_layers

LENGTH_OF_BLOCK = 7
_STEPS = 3


def loss_of(model: Any, rows: torch.Tensor, batch: int) -> float:
    losses = []
    for ids in rows.split(batch):
        logits = model(ids, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"))
    return torch.cat(losses).mean().item()


def naive_perplexity(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """One forward pass of the whole cut model for each layer, without copying weights."""
    scores = []
    for i in range(model.config.num_hidden_layers):
        cut = drop_layers(model, [i], keep_dropped=True)
        scores.append(float(torch.tensor(loss_of(model, rows, args.batch)).exp()))
        cut.restore()
    return scores


def shortened_perplexity(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """Shortened LLaMA's script: a new model for each layer, and one row at a time."""
    sys.path.insert(0, str(Path(args.shortened) / "src"))
    from utils import get_block_pruned_network

    scores = []
    for i in range(model.config.num_hidden_layers):
        with contextlib.redirect_stdout(io.StringIO()):
            cut = get_block_pruned_network(model, [i], 1, device="cpu", use_bfloat=model.dtype == torch.bfloat16)
        scores.append(float(torch.tensor(loss_of(cut, rows, 1)).exp()))
    return scores


def our_perplexity(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    return score_layers(model, CalibrationSet.from_ids(rows, "rows"), ["perplexity"])["perplexity"].layers


def naive_greedy(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """SLEB's procedure: each round tries every remaining layer, with a forward pass of the whole model."""
    n, dropped = model.config.num_hidden_layers, []
    for _ in range(_STEPS):
        losses = {}
        for i in range(n):
            if i not in dropped:
                cut = drop_layers(model, sorted([*dropped, i]), keep_dropped=True)
                losses[i] = loss_of(model, rows, 1)
                cut.restore()
        dropped.append(min(losses, key=losses.__getitem__))
    return sorted(dropped)


def our_greedy(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    calibration = CalibrationSet.from_ids(rows, "rows")
    return choose_layers(model, calibration, CutOptions(drop=_STEPS, criterion="perplexity", steps=_STEPS)).drop_layers


def pruneme_distance(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """PruneMe's functions on all hidden states, as its script calls them."""
    sys.path.insert(0, str(Path(args.pruneme) / "compute_block_similarity"))
    from utils import compute_block_distances, get_last_non_padded_tokens

    scores = []
    for ids in rows.split(args.batch):
        states = model(ids, output_hidden_states=True).hidden_states
        last = get_last_non_padded_tokens(states, torch.ones_like(ids))[1:]
        scores.append(compute_block_distances(last, LENGTH_OF_BLOCK))
    return [sum(values) / len(values) for values in zip(*scores, strict=True)]


def our_distance(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    scores = score_layers(model, CalibrationSet.from_ids(rows, "rows"), ["angular_distance"])
    blocks = scores["angular_distance"].blocks
    return [score for block, score in sorted(blocks.items()) if len(block) == LENGTH_OF_BLOCK]


def naive_taylor(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    """One backward pass through the whole model, all gradients at once."""
    with torch.enable_grad():
        for ids in rows.split(args.batch):
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
            (F.cross_entropy(logits, ids[:, 1:].flatten()) * len(ids) / len(rows)).backward()
    return [
        sum((p.float() * p.grad.float()).abs().sum().item() for p in layer.parameters())
        for layer in model.model.layers
    ]


def our_taylor(model: Any, rows: torch.Tensor, args: argparse.Namespace) -> list[float]:
    return score_layers(model, CalibrationSet.from_ids(rows, "rows"), ["taylor"])["taylor"].layers


WAYS: dict[str, dict[str, Callable[..., list[float]]]] = {
    "perplexity": {"ours": our_perplexity, "naive": naive_perplexity, "shortened": shortened_perplexity},
    "greedy perplexity, 3 layers": {"ours": our_greedy, "naive": naive_greedy},
    "angular distance": {"ours": our_distance, "pruneme": pruneme_distance},
    "taylor": {"ours": our_taylor, "naive": naive_taylor},
}


@torch.no_grad()
def child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    what, way = args.only.split("/")
    model = load_base(args.model, dtype="auto")
    for parameter in model.parameters():  # read from disk before the clock runs
        parameter.data = parameter.data.clone()
    rows = torch.load(args.text)
    loss_of(model, rows[:1], 1)
    start, cpu = time.perf_counter(), time.process_time()
    scores = WAYS[what][way](model, rows, args)
    spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    print(json.dumps(spent | {"peak": peak_rss(), "scores": scores}))


def compare(args: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(args.model)
    text = load_calibration(args.text, tokenizer, samples=args.rows, length=args.length)
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.save(text.input_ids, file.name)
        print(f"{args.rows} rows of {args.length} tokens, {args.threads} threads, {args.repeats} rounds\n")
        print("| criterion | way | seconds | CPU seconds | times ours | peak memory, MB | largest difference |")
        print("|---|---|---|---|---|---|---|")
        for what, ways in WAYS.items():
            if args.criteria and what not in args.criteria:
                continue
            results: dict[str, list[dict]] = {
                way: [] for way in ways if way in ("ours", "naive") or getattr(args, way)
            }
            for _ in range(args.repeats):
                for way, runs in results.items():
                    command = [sys.executable, __file__, *sys.argv[1:], "--only", f"{what}/{way}"]
                    command[command.index("--text") + 1] = file.name
                    done = subprocess.run(command, capture_output=True, text=True)
                    if done.returncode:
                        print(f"| {what} | {way} | fails: {done.stderr.strip().splitlines()[-1][:160]} |")
                        break
                    runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
            own = statistics.median(run["cpu"] for run in results["ours"])
            for way, runs in results.items():
                if runs:
                    seconds, cpu = (statistics.median(run[key] for run in runs) for key in ("seconds", "cpu"))
                    peak = max(run["peak"] for run in runs) / 1e6
                    print(
                        f"| {what} | {way} | {seconds:.1f} | {cpu:.1f} | {cpu / own:.2f} | {peak:.0f} | "
                        f"{difference(results['ours'][0]['scores'], runs[0]['scores'])} |",
                        flush=True,
                    )


def difference(ours: list[float], theirs: list[float]) -> str:
    if len(ours) == len(theirs):
        return f"{max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(ours, theirs, strict=True)):.1e}"
    # PruneMe leaves out the first block, and takes its last hidden state after the final norm.
    return f"{max(abs(a - b) / a for a, b in zip(ours[1:-1], theirs, strict=False)):.1e} (common blocks but the last)"


# --- ranking without loading the model ------------------------------------------------------------------


def stream(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from checkpoint import make_llama

    criteria = ["block_influence", "taylor", "perplexity"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        noise = (0.02 * torch.randn(8 << 20)).bfloat16().view(torch.uint8).numpy().tobytes()
        make_llama(path, args.stream, noise=noise)
        size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        outcomes = {}
        for way in ("nothing", "load", "stream"):
            command = [sys.executable, __file__, "--stream-child", f"{way}:{path}:{','.join(criteria)}"]
            command += ["--rows", str(args.rows), "--length", str(args.length), "--threads", str(args.threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            outcomes[way] = json.loads(done.stdout.strip().splitlines()[-1])
        floor = outcomes["nothing"]["peak"]
        load, streamed = outcomes["load"]["peak"] - floor, outcomes["stream"]["peak"] - floor
        bound = outcomes["stream"]["bound"]
        print(f"{floor / 1e6:.0f} MB: Python, torch and a model without weights")
        print(f"{size / 1e9:.2f} GB of weights; {', '.join(criteria)} on {args.rows} rows of {args.length} tokens")
        print("| way | peak memory above Python, torch and a model without weights, MB | seconds |\n|---|---|---|")
        print(f"| loaded whole, and only that | {load / 1e6:.0f} | {outcomes['load']['seconds']:.0f} |")
        print(f"| ranked layer by layer | {streamed / 1e6:.0f} | {outcomes['stream']['seconds']:.0f} |")
        print(f"\n{streamed / load:.2f} of loading; embeddings + head + 3 layers + states: {bound / 1e6:.0f} MB")


def stream_child(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    way, path, criteria = args.stream_child.split(":")
    start, bound = time.perf_counter(), 0
    if way != "nothing":
        model = load_base(path, dtype="auto")
        if way == "load":
            for parameter in model.parameters():
                parameter.data.view(-1)[::1024].sum()  # reads every page
        else:
            rows = torch.randint(3, 30_000, (args.rows, args.length), generator=torch.Generator().manual_seed(0))
            score_layers(LayerWalk(model), CalibrationSet.from_ids(rows, "random"), criteria.split(","))
            config = model.config
            layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
            states = rows.numel() * config.hidden_size * 2 * (config.num_hidden_layers + 2)
            bound = 2 * config.vocab_size * config.hidden_size * 2 + 3 * layer + states
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        with torch.device("meta"):  # without weights
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        F.linear(torch.ones(1, 1), torch.ones(1, 1))
    print(json.dumps({"peak": peak_rss(), "seconds": time.perf_counter() - start, "bound": bound}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--text")
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=10, help="rows per batch, for ways that leave it open")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--criteria", action="append", choices=tuple(WAYS))
    parser.add_argument("--shortened", default="")
    parser.add_argument("--pruneme", default="")
    parser.add_argument("--stream", type=float, metavar="GB")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--stream-child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        child(args)
    elif args.stream_child:
        stream_child(args)
    elif args.stream:
        stream(args)
    else:
        compare(args)


if __name__ == "__main__":
    main()
