"""A ranking as text: what each criterion would drop, and every layer's scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..layer_ranges import format_layers
from .registry import CRITERIA
from .scores import Scores

_BEST_BLOCKS = 3


def report(
    scores: Mapping[str, Scores], drops: Mapping[str, Sequence[int]], why: Mapping[str, str] | None = None
) -> str:
    """Tables for a terminal.

    Args:
        scores (`Mapping[str, Scores]`): By criterion.
        drops (`Mapping[str, Sequence[int]]`): What each would drop, by criterion; also of some that have no scores.
        why (`Mapping[str, str]`, *optional*): A sentence for those that explain themselves.

    Returns:
        `str`: Lines.
    """
    lines = _columns(
        [["criterion", "would drop", "by"]]
        + [[name, format_layers(gone), CRITERIA[name].what] for name, gone in drops.items()]
    )
    for name, reason in (why or {}).items():
        lines += ["", f"{name}: {reason}"]
    of_layers = [
        found for found in scores.values() if found.layers is not None and CRITERIA[found.criterion].needs != "count"
    ]
    if of_layers:
        table = [["layer", *(found.criterion for found in of_layers)]]
        for i in range(len(of_layers[0].layers or ())):
            table.append(
                [str(i), *(_cell((found.layers or [])[i], i in drops[found.criterion]) for found in of_layers)]
            )
        lines += [
            "",
            *_columns(table, right=True),
            "",
            "layers with lower scores are dropped first; * would be dropped",
        ]
    for found in scores.values():
        if CRITERIA[found.criterion].blocks_only:
            length = len(drops[found.criterion])
            ranked = sorted((s, b) for b, s in found.blocks.items() if len(b) == length)[:_BEST_BLOCKS]
            best = ", ".join(f"{format_layers(block)} ({score:.4g})" for score, block in ranked)
            lines.append(f"{found.criterion}, blocks of {length}: {best}")
    return "\n".join(lines)


def _cell(score: float | None, dropped: bool) -> str:
    return ("-" if score is None else f"{score:.4g}") + ("*" if dropped else " ")


def _columns(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
