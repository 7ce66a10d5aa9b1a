"""`hf-layerprune verify MODEL`."""

from __future__ import annotations

import argparse

from ..errors import shown
from ..options import MODEL_HELP

HELP = "prove that a model is what its base and its records make it"
DESCRIPTION = (
    "Make the cut of the base that MODEL's lineage.json names again, and compare hashes: weights, config, tokenizer, chat "
    "template and every other file that decides how MODEL behaves. Tensors that a repair or training changed cannot be "
    "derived again; the verdict counts them. Exit code 0: everything is accounted for; 1: it is not."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, or a Hub id")
    parser.add_argument(
        "--base", metavar="BASE", help=f"where the base is, if not where lineage.json says: {MODEL_HELP}"
    )
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument(
        "--accept-trained",
        action="store_true",
        help="take the records' word for the tensors that a repair or training changed",
    )


def run(args: argparse.Namespace) -> int:
    """Verify."""
    from ..publish.verify.verdict import verify

    outcome = verify(args.model, base=args.base, revision=args.revision, accept_trained=args.accept_trained)
    for line in outcome.lines:
        print(shown(f"{'ok' if line.good else 'NO':<4} {line.what:<8}  {line.text}"))
    print(shown(outcome.verdict))
    return 0 if outcome.good else 1
