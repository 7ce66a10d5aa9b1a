"""`hf-layerprune eval MODEL`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import measuring

HELP = "measure accuracy, perplexity, and the distance to the dense model"
DESCRIPTION = """Measure MODEL: zero-shot accuracy by lm-evaluation-harness, perplexity, and, with --base, how far it is
from the dense model. The numbers go to metrics.json in the model's folder, each with the hash of the weights that it
was measured on. Without --tasks, --tasks-from and --text, it is the paper's eight tasks and WikiText-2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help="a Hub id, a model or adapter folder, or a .gguf file")
    parser.add_argument("--base", metavar="BASE", help="the dense model to stand the numbers beside")
    parser.add_argument(
        "--tasks",
        type=_names,
        metavar="T,T",
        help="tasks of the harness or in --tasks-from; paper: the eight of arXiv:2411.15558; none",
    )
    parser.add_argument(
        "--tasks-from",
        type=Path,
        metavar="DIR",
        help="folder with NAME.jsonl (one {query, choices, gold} a line) and NAME.txt (texts)",
    )
    parser.add_argument("--text", action="append", metavar="FILE", help="a text, or wikitext2, or none; repeatable")
    parser.add_argument("--limit", type=measuring.whole, metavar="N", help="only the first N questions of each task")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="answered questions before each (the task's own)")
    parser.add_argument("--batch-size", type=_batch_size, default="auto", metavar="N", help="answers at once (auto)")
    parser.add_argument(
        "--length", type=measuring.whole, default=1024, metavar="N", help="tokens in a window of a text (1024)"
    )
    parser.add_argument(
        "--windows", type=_windows, default=64, metavar="N", help="windows of each text, from its start; all (64)"
    )
    measuring.add_arguments(parser)
    parser.add_argument(
        "--answers", type=Path, metavar="DIR", help="keep answers by question, and don't ask twice: to go on later"
    )


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return () if names == ("none",) else names


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else measuring.whole(text)


def _windows(text: str) -> int | None:
    return None if text == "all" else measuring.whole(text)


def run(args: argparse.Namespace) -> None:
    """Measure."""
    from ..measure.evaluate import EvalRequest, evaluate
    from ..measure.report import report

    texts = None if args.text is None else tuple(name for name in args.text if name != "none")
    metrics = evaluate(
        EvalRequest(
            model=args.model,
            base=args.base,
            tasks=args.tasks,
            tasks_from=args.tasks_from,
            texts=texts,
            limit=args.limit,
            num_fewshot=args.num_fewshot,
            batch_size=args.batch_size,
            length=args.length,
            windows=args.windows,
            answers=args.answers,
            **measuring.values(args),
        )
    )
    print(report(metrics))
