"""`hf-layerprune card MODEL`."""

from __future__ import annotations

import argparse

HELP = "write the model card from the records"
DESCRIPTION = (
    "Write README.md, its plots, and the notice that the licence requires, from lineage.json and metrics.json of MODEL. "
    "Text that you write around the marked sections is kept."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="a model folder written by prune")
    parser.add_argument("--name", metavar="N", help="the model's name until it is on the Hub (BASE-23L)")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the base, if MODEL was made from a local copy")
    parser.add_argument("--license", metavar="L", help="the base's licence, such as apache-2.0, if it declares none")
    parser.add_argument("--license-name", metavar="N", help="with --license other: its name")
    parser.add_argument("--license-link", metavar="URL", help="with --license other: the URL of its text")
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite changes inside the marked sections, and plots drawn by other programs",
    )


def run(args: argparse.Namespace) -> None:
    """Write the card."""
    from pathlib import Path

    from ..errors import CutError, one_line
    from ..publish.card.writing import declare, write_card

    if (args.license_name or args.license_link) and not args.license:
        raise CutError("--license-name and --license-link need --license (other, unless it is a well-known one)")
    folder = Path(args.model).expanduser()
    declare(
        folder,
        license=args.license,
        license_name=args.license_name,
        license_link=args.license_link,
        base_model=args.base_model,
        name=args.name,
    )
    changed = write_card(folder, force=args.force)
    done = f"wrote {', '.join(changed)} in {folder}" if changed else f"{folder / 'README.md'} is up to date"
    print(one_line(done))
