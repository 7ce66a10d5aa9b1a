"""`hf-layerprune prune BASE OUTPUT`."""

from __future__ import annotations

import argparse

from . import options

HELP = "drop layers and write what is left"
DESCRIPTION = "Drop decoder layers of BASE and write the model that is left to OUTPUT."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("base", metavar="BASE", help=options.BASE_HELP)
    parser.add_argument("output", metavar="OUTPUT", help="folder to write; a .gguf file for a cut GGUF file")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--drop",
        type=options.drop,
        default=0.25,
        metavar="D",
        help="fraction of the layers, or a number of them (0.25)",
    )
    which.add_argument("--drop-layers", type=options.layers, metavar="L", help="these layers, such as 20-26,29")
    options.add_criterion(parser)
    parser.add_argument("--contiguous", action="store_true", help="choose layers that lie side by side")
    parser.add_argument(
        "--steps", type=int, default=1, metavar="N", help="choose in N rounds, scored anew each time (1)"
    )
    parser.add_argument("--seed", type=int, default=42, help="for whatever is drawn: layers, rows, text (42)")
    parser.add_argument(
        "--repair", choices=("linear", "refit", "magnitude"), help="make up for the cut in closed form"
    )
    options.add_calibration(parser)
    parser.add_argument(
        "--dtype", choices=options.DTYPES, default="auto", help="of the weights; auto keeps the base's"
    )
    parser.add_argument("--adapter", action="store_true", help="write a PEFT adapter: the plan and the tuned tail")
    parser.add_argument(
        "--tune-layers",
        type=options.tune_layers,
        default=3,
        metavar="T",
        help="with --adapter: last T layers, cut, or 20-22 (3)",
    )
    parser.add_argument(
        "--no-tune-lm-head", action="store_true", help="with --adapter: leave the head alone, and tied"
    )
    parser.add_argument("--revision", help="branch, tag or commit of BASE on the Hub")
    parser.add_argument("--link", action="store_true", help="hard-link weight files of a folder that stay as they are")
    parser.add_argument("--force", action="store_true", help="replace OUTPUT if it exists")


def run(args: argparse.Namespace) -> None:
    """Prune."""
    from ..stages.prune import PruneRequest, prune_to

    result = prune_to(
        PruneRequest(
            base=args.base,
            output=args.output,
            drop=args.drop,
            drop_layers=args.drop_layers,
            criterion=args.criterion,
            variant=args.variant,
            steps=args.steps,
            protect_first=args.protect_first,
            protect_last=args.protect_last,
            contiguous=args.contiguous,
            seed=args.seed,
            repair=args.repair,
            calibration=args.calibration,
            calibration_samples=args.calibration_samples,
            calibration_length=args.calibration_length,
            dtype=args.dtype,
            adapter=args.adapter,
            tune_layers=args.tune_layers,
            tune_lm_head=not args.no_tune_lm_head,
            revision=args.revision,
            link=args.link,
            force=args.force,
        )
    )
    print(result)
