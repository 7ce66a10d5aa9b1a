"""`hf-layerprune card MODEL`."""

from __future__ import annotations

from ..publish.requests import CardRequest as Request
from . import Result, suggest

HELP = "write the model card from the records"
DESCRIPTION = """Write README.md, its plots, and the notice that the licence requires, from lineage.json and
metrics.json of MODEL. Text that you write around the marked sections is kept."""


def run(request: Request) -> Result:
    from ..publish.card.writing import record_declarations, write_card

    folder = request.model
    record_declarations(request)
    changed = write_card(folder, force=request.force)
    summary = f"wrote {', '.join(changed)} in {folder}" if changed else f"{folder / 'README.md'} is up to date"
    data = {"folder": str(folder), "changed": list(changed)}
    return Result(summary, data=data, follow_up=suggest("push", request.model, "NAMESPACE/NAME", "--dry-run"))
