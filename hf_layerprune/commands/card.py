"""`hf-layerprune card MODEL`."""

from __future__ import annotations

import argparse

HELP = "write the model card from the records"
DESCRIPTION = (
    "Write README.md, its pictures, and what the licence asks for, from lineage.json and metrics.json of MODEL. What "
    "you write around the marked sections stays."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help="a model folder that prune has written")
    parser.add_argument("--name", metavar="N", help="what the model is called, until it is on the Hub (BASE-23L)")
    parser.add_argument("--base-model", metavar="ID", help="Hub id of the base, where MODEL was made of a local copy")
    parser.add_argument(
        "--license", metavar="L", help="the base's licence, such as apache-2.0, where it declares none"
    )
    parser.add_argument("--license-name", metavar="N", help="with --license other: what it is called")
    parser.add_argument("--license-link", metavar="URL", help="with --license other: where its text is")
    parser.add_argument(
        "--force",
        action="store_true",
        help="replace what was changed inside the marked sections, and pictures that are not ours",
    )


def run(args: argparse.Namespace) -> None:
    """Write the card."""
    from pathlib import Path

    from ..errors import CutError
    from ..publish.card.writing import declare, write_card

    if (args.license_name or args.license_link) and not args.license:
        raise CutError("--license-name and --license-link go with --license (other, where it is not a well-known one)")
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
    print(f"wrote {', '.join(changed)} in {folder}" if changed else f"{folder / 'README.md'} is as it should be")
