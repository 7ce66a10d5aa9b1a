"""`hf-layerprune bench MODEL`."""

from __future__ import annotations

import argparse

from . import measuring

HELP = "measure speed, memory and size"
DESCRIPTION = """Time MODEL, and with --base the dense model beside it, in turns: reading and writing at several batch
sizes and lengths, the time to the first token, loading and peak memory in processes of their own. Each number is the
median of its repeats, with the lowest and the highest, and goes to metrics.json in the model's folder."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a model or adapter folder, or a .gguf file")
    parser.add_argument("--base", metavar="BASE", help="the dense model to stand the numbers beside")
    parser.add_argument("--batch-sizes", type=_numbers, default=(1, 4), metavar="N,N", help="texts at once (1,4)")
    parser.add_argument(
        "--prompt-lengths", type=_numbers, default=(64, 512), metavar="N,N", help="tokens in a prompt (64,512)"
    )
    parser.add_argument("--new-tokens", type=measuring.whole, default=32, metavar="N", help="written after each (32)")
    parser.add_argument("--repeats", type=measuring.whole, default=5, metavar="N", help="timed runs of each (5)")
    parser.add_argument(
        "--load-repeats", type=int, default=3, metavar="N", help="fresh processes that load it; 0 for none (3)"
    )
    measuring.add_arguments(parser)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(measuring.whole(part.strip()) for part in text.split(","))


def run(args: argparse.Namespace) -> None:
    """Measure."""
    from ..measure.bench import BenchRequest, bench
    from ..measure.report import report

    metrics = bench(
        BenchRequest(
            model=args.model,
            base=args.base,
            batch_sizes=args.batch_sizes,
            prompt_lengths=args.prompt_lengths,
            new_tokens=args.new_tokens,
            repeats=args.repeats,
            load_repeats=args.load_repeats,
            **measuring.values(args),
        )
    )
    print(report(metrics, ("size", "speed", "memory")))
