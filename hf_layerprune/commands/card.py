"""`hf-layerprune card MODEL`."""

from __future__ import annotations

from ..errors import one_line
from ..publish.requests import CardRequest as Request

HELP = "write the model card from the records"
DESCRIPTION = """Write README.md, its plots, and the notice that the licence requires, from lineage.json and
metrics.json of MODEL. Text that you write around the marked sections is kept."""


def run(request: Request) -> None:
    from ..publish.card.writing import declare, write_card

    folder = request.model.expanduser()
    declare(request)
    changed = write_card(folder, force=request.force)
    print(one_line(f"wrote {', '.join(changed)} in {folder}" if changed else f"{folder / 'README.md'} is up to date"))
