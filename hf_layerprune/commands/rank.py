"""`hf-layerprune rank BASE [OUTPUT]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import options

HELP = "score every layer, and show what each criterion would drop"
DESCRIPTION = """Score the decoder layers of BASE, by one criterion or by all of them at once, and show which layers each
would drop. With OUTPUT, write scores.json and the pictures there. Nothing is pruned."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("base", metavar="BASE", help=options.BASE_HELP)
    parser.add_argument("output", metavar="OUTPUT", nargs="?", type=Path, help="folder for scores.json and pictures")
    options.add_criterion(parser, "all", "; all (but auto); or several, such as kl,taylor")
    parser.add_argument(
        "--drop", type=options.drop, default=0.25, metavar="D", help="fraction of the layers, or a number (0.25)"
    )
    parser.add_argument(
        "--lengths", type=options.layers, metavar="L", help="score blocks of so many layers, such as 1-8 (those of D)"
    )
    parser.add_argument("--contiguous", action="store_true", help="drop layers that lie side by side")
    parser.add_argument("--repair", choices=("linear", "refit", "magnitude"), help="what auto takes into account")
    options.add_calibration(parser)
    parser.add_argument("--seed", type=int, default=42, help="for whatever is drawn: layers, rows, text (42)")
    parser.add_argument(
        "--dtype",
        choices=options.DTYPES,
        default="auto",
        help="of the weights; auto: as they are, where the processor is fast in it",
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="where layers run, one at a time: cpu, cuda, ... (a GPU if any)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of BASE on the Hub")
    parser.add_argument("--force", action="store_true", help="replace a ranking in OUTPUT")


def run(args: argparse.Namespace) -> None:
    """Rank."""
    from ..select import ALL
    from ..stages.rank import RankRequest, rank

    names = [part.strip() for part in args.criterion.split(",") if part.strip()]
    criteria = [name for part in names for name in (ALL if part == "all" else (part,))]
    ranking = rank(
        RankRequest(
            base=args.base,
            output=args.output,
            criteria=criteria,
            variant=args.variant,
            drop=args.drop,
            lengths=args.lengths,
            protect_first=args.protect_first,
            protect_last=args.protect_last,
            contiguous=args.contiguous,
            repair=args.repair,
            calibration=args.calibration,
            calibration_samples=args.calibration_samples,
            calibration_length=args.calibration_length,
            seed=args.seed,
            dtype=args.dtype,
            device=args.device,
            revision=args.revision,
            force=args.force,
        )
    )
    print(ranking)
    if args.output is not None:
        print(f"\nscores.json and pictures in {args.output}")
