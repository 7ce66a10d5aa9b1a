"""A ranking as text: the layers each criterion would drop, and the scores of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..layer_ranges import format_layers, name_layers
from .registry import CRITERIA
from .scores import Scores

_BEST_BLOCKS = 3


def report(
    scores: Mapping[str, Scores],
    drops: Mapping[str, Sequence[int]],
    why: Mapping[str, str] | None = None,
    protect: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """Format a ranking as tables for a terminal.

    Args:
        scores (`Mapping[str, Scores]`): By criterion.
        drops (`Mapping[str, Sequence[int]]`): The layers each criterion would drop; criteria without scores included.
        why (`Mapping[str, str]`, *optional*): The reason for the choice, for criteria that give one.
        protect (`Mapping[str, Sequence[int]]`, *optional*): The layers that each criterion may not drop.
    """
    lines = _columns(
        [["criterion", "would drop", "by"]]
        + [[name, format_layers(gone), CRITERIA[name].what] for name, gone in drops.items()]
    )
    for name, reason in (why or {}).items():
        lines += ["", f"{name}: {reason}"]
    layer_scores = [s for s in scores.values() if s.layers is not None and CRITERIA[s.criterion].needs != "count"]
    if layer_scores:
        table = [["layer", *(s.criterion for s in layer_scores)]]
        for i in range(len(layer_scores[0].layers or ())):
            table.append([str(i), *(_cell((s.layers or [])[i], i in drops[s.criterion]) for s in layer_scores)])
        lines += [
            "",
            *_columns(table, right=True),
            "",
            "layers with lower scores are dropped first; * would be dropped",
        ]
    for layers in dict.fromkeys(tuple(kept) for kept in (protect or {}).values() if kept):
        names = ", ".join(name for name, kept in (protect or {}).items() if tuple(kept) == layers)
        lines.append(f"{names}: {name_layers(layers)} may not be dropped (--protect-first, --protect-last)")
    for name, criterion_scores in scores.items():
        if CRITERIA[name].blocks_only:
            length = len(drops[name])
            of_length = [(score, block) for block, score in criterion_scores.blocks.items() if len(block) == length]
            best = ", ".join(
                f"{format_layers(block)} ({score:.4g})" for score, block in sorted(of_length)[:_BEST_BLOCKS]
            )
            lines.append(f"{name}, blocks of {length}: {best}")
    return "\n".join(lines)


def _cell(score: float | None, dropped: bool) -> str:
    return ("-" if score is None else f"{score:.4g}") + ("*" if dropped else " ")


def _columns(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
