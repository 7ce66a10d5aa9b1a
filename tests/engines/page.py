"""docs/engines.md: the hand-written text stays, the table at its end is made from results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from . import models
from .environments import ENGINES, ROOT

RESULTS = Path(__file__).parent / "results.json"
PAGE = ROOT / "docs" / "engines.md"
MARK = "<!-- What follows is written by `make engines`. -->\n"


# These count, whatever the config says; `prune` warns, and the page says so.
_KNOWN = {("llama.cpp", "converted", name) for name in ("gemma2", "gemma3", "gpt_oss", "smollm3")}
_KNOWN |= {("vllm", "folder", "gpt_oss"), ("onnxruntime", "folder", "gpt_oss")}


def is_known(row: dict[str, Any]) -> bool:
    """Whether docs/engines.md says why the model is wrong in this engine."""
    return (row["engine"], row["route"], row["model"]) in _KNOWN


def record(rows: list[dict[str, Any]]) -> None:
    """Replace the rows of the models that were tried.

    Args:
        rows (`list[dict[str, Any]]`): What came out.
    """
    known = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    keys = {(row["engine"], row["route"], row["model"]) for row in rows}
    stay = [row for row in known if (row["engine"], row["route"], row["model"]) not in keys]
    order = [*models.BOTH, *models.FAMILIES]
    everything = sorted(stay + rows, key=lambda row: (row["engine"], row["route"], order.index(row["model"])))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(row) for row in everything) + "\n]\n")


def rendered() -> str:
    """The table, and a list of what is not the same."""
    rows = json.loads(RESULTS.read_text())
    columns = list(dict.fromkeys((row["engine"], row["route"]) for row in rows))
    cells = {(row["model"], row["engine"], row["route"]): row for row in rows}
    heads = [f"{engine}, {route}" for engine, route in columns]
    lines = ["", f"| model | cut | {' | '.join(heads)} |", "|---|---|" + "---|" * len(columns)]
    notes: list[str] = []
    for name in (*models.BOTH, *models.FAMILIES):
        tried = models.FAMILIES.get(name)
        about = f"{name} ({tried.pattern})" if tried and tried.pattern else name
        drop = f"{tried.drop} of {tried.layers}" if tried else models.BOTH[name]
        shown = [_cell(cells.get((name, *column)), notes) for column in columns]
        lines.append(f"| {about} | {drop} | {' | '.join(shown)} |")
    lines += ["", *(f"{i}. {note}" for i, note in enumerate(notes, 1)), ""]
    lines += ["Installed: " + "; ".join(f"{name}: `{engine.install}`" for name, engine in ENGINES.items()) + "."]
    return "\n".join(lines) + "\n"


def _cell(row: dict[str, Any] | None, notes: list[str]) -> str:
    if row is None:
        return ""
    if row["outcome"] == "same":
        return f"{row['nats']:.0e}"
    note = " ".join(row["note"].replace("|", "\\|").replace("<", "&lt;").split())
    if note not in notes:
        notes.append(note)
    return f"{row['outcome']} ({notes.index(note) + 1})"


def write() -> None:
    """Write the page's second part."""
    head = PAGE.read_text(encoding="utf-8").split(MARK)[0] if PAGE.is_file() else "# Engines\n\n"
    PAGE.write_text(head + MARK + rendered(), encoding="utf-8")
