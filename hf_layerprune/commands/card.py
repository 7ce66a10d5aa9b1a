"""`hf-layerprune card MODEL`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from ..errors import CutError, one_line
from ..options import PATH, Options, option

from ..errors import one_line
from ..options import add, gather
from ..publish.requests import CardRequest

HELP = "write the model card from the records"
DESCRIPTION = """Write README.md, its plots, and the notice that the licence requires, from lineage.json and
metrics.json of MODEL. Text that you write around the marked sections is kept."""


<<<<<<< HEAD
@dataclass
class Request(Options):
    """What to write."""

    model: Path = option(MISSING, "A model folder written by prune", PATH)
    name: str | None = option(None, "The model's name until it is on the Hub (BASE-23L)")
    base_model: str | None = option(None, "The base's Hub id, if MODEL was made from a local copy")
    license: str | None = option(None, "The base's licence, such as apache-2.0, if it declares none")
    license_name: str | None = option(None, "With --license other: its name")
    license_link: str | None = option(None, "With --license other: the URL of its text")
    force: bool = option(False, "Overwrite changes inside the marked sections, and plots drawn by other programs")


def run(request: Request) -> None:
    from ..publish.card.writing import declare, write_card

    if (request.license_name or request.license_link) and not request.license:
        raise CutError("--license-name and --license-link need --license (other, unless it is a well-known one)")
    folder = request.model.expanduser()
    declare(
        folder,
        license=request.license,
        license_name=request.license_name,
        license_link=request.license_link,
        base_model=request.base_model,
        name=request.name,
    )
    changed = write_card(folder, force=request.force)
    done = f"wrote {', '.join(changed)} in {folder}" if changed else f"{folder / 'README.md'} is up to date"
    print(one_line(done))
=======
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, CardRequest)


def run(args: argparse.Namespace) -> None:
    """Write the card."""
    from ..publish.card.writing import declare, write_card

    request = gather(args, CardRequest)
    folder = request.model.expanduser()
    declare(request)
    changed = write_card(folder, force=request.force)
    print(one_line(f"wrote {', '.join(changed)} in {folder}" if changed else f"{folder / 'README.md'} is up to date"))
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)
