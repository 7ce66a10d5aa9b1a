"""`hf-layerprune verify MODEL`."""

from __future__ import annotations

import argparse

from ..options import MODEL_HELP

HELP = "prove that a model's weights come from its base"
DESCRIPTION = (
    "Compare MODEL with the base that its lineage.json names: every tensor that no stage changed must be the base's, "
    "bit for bit. Of what is on the Hub, only headers, hashes and the bytes to compare are fetched. Exit code 0 says "
    "yes, 1 no."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help="a model folder, or a Hub id")
    parser.add_argument(
        "--base", metavar="BASE", help=f"where the base is, if not where lineage.json says: {MODEL_HELP}"
    )
    parser.add_argument("--revision", help="branch, tag or commit of MODEL on the Hub")
    parser.add_argument("--quick", action="store_true", help="headers and hashes only; no tensor is read")


def run(args: argparse.Namespace) -> int:
    """Verify."""
    from ..publish.verify.verdict import verify

    found = verify(args.model, base=args.base, revision=args.revision, quick=args.quick)
    for line in found.lines:
        print(f"{'ok' if line.good else 'NO':<4} {line.what:<8}  {line.text}")
    print(found.verdict)
    return 0 if found.good else 1
