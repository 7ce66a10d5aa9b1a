"""A ranking of layers: the scores and what follows from them, as text, as a file, and as pictures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, LayerPruneError
from ..files.copy import write_text
from ..layer_ranges import describe_layers, format_layers
from ..select import CRITERIA

if TYPE_CHECKING:
    from ..select.scores import Scores

logger = logging.getLogger(__name__)

_BEST_BLOCKS = 3
# What a ranking consists of. A folder that holds anything else is not replaced.
RANKING_FILES = re.compile(r"scores\.json|(choices|scores|blocks-\w+)\.(png|svg)")


@dataclass(repr=False)
class Ranking:
    """Scores, and what follows from them.

    Args:
        scores (`dict[str, Scores]`): By criterion.
        drops (`dict[str, list[int]]`): What each would drop, by criterion.
        why (`dict[str, str]`): For criteria that explain themselves.
        record (`dict[str, Any]`): All of it, as in `scores.json`.
        on_text (`bool`): Whether a criterion or a curve could run the model on text.
    """

    scores: dict[str, Scores]
    drops: dict[str, list[int]]
    why: dict[str, str]
    record: dict[str, Any]
    on_text: bool = True

    @property
    def layer_scores(self) -> list[Scores]:
        """The scores of single layers, but for those that are only an order."""
        return [s for s in self.scores.values() if s.layers is not None and CRITERIA[s.criterion].needs != "count"]

    def __str__(self) -> str:
        rows = [[name, format_layers(gone), CRITERIA[name].description] for name, gone in self.drops.items()]
        lines = _columns([["criterion", "would drop", "by"], *rows])
        for name, reason in self.why.items():
            lines += ["", f"{name}: {reason}"]
        if shown := self.layer_scores:
            table = [["layer", *(s.criterion for s in shown)]]
            for i, scores in enumerate(zip(*(s.layers or () for s in shown), strict=True)):
                cells = zip(scores, shown, strict=True)
                table.append([str(i), *(_cell(score, i in self.drops[s.criterion]) for score, s in cells)])
            note = "layers with lower scores are dropped first; * would be dropped"
            lines += ["", *_columns(table, right=True), "", note]
        if required := self.record["required"]:
            lines.append(f"{describe_layers(required)} can't be dropped from this architecture")
        protected: dict[tuple[int, ...], list[str]] = {}
        for name, layers in self.record["protect"].items():
            protected.setdefault(tuple(layers), []).append(name)
        for layers, names in protected.items():
            if layers:
                what = f"{describe_layers(layers)} may not be dropped (protect_first, protect_last)"
                lines.append(f"{', '.join(names)}: {what}")
        for name, found in self.scores.items():
            # Angular distance has scores of blocks of every length.
            lengths = {len(block) for block in found.blocks}
            for length in sorted(lengths.intersection([*self.record.get("lengths", ()), len(self.drops[name])])):
                ranked = sorted((score, block) for block, score in found.blocks.items() if len(block) == length)
                best = ", ".join(f"{format_layers(block)} ({score:.4g})" for score, block in ranked[:_BEST_BLOCKS])
                lines.append(f"{name}, blocks of {length}: {best}")
        return "\n".join(lines)

    __repr__ = __str__  # a notebook shows the table


def _cell(score: float | None, dropped: bool) -> str:
    return ("-" if score is None else f"{score:.4g}") + ("*" if dropped else " ")


def _columns(rows: Sequence[Sequence[str]], right: bool = False) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(w) if right else cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def write_ranking(ranking: Ranking, folder: Path) -> None:
    """Write `scores.json` and, if matplotlib is installed, the plots to a new folder.

    Raises:
        CheckpointError: A file can't be written.
    """
    write_text(folder / "scores.json", json.dumps(ranking.record, indent=1, allow_nan=False) + "\n")
    try:
        draw_ranking(ranking, folder)
    except CheckpointError:  # a picture can't be written, so the disk may be full: all or nothing
        raise
    except LayerPruneError as error:  # matplotlib is not installed
        logger.warning("%s; only the scores are written", error)


def draw_ranking(ranking: Ranking, folder: Path) -> None:
    """Draw the scores and what each criterion would drop; each plot as PNG and as SVG.

    Raises:
        LayerPruneError: matplotlib is not installed.
    """
    from ..publish.card import score_plots

    drops, num_layers = ranking.drops, ranking.record["num_layers"]
    for kind in ("png", "svg"):
        score_plots.draw_choices(drops, num_layers, folder / f"choices.{kind}")
        if ranking.layer_scores:
            score_plots.draw_layer_scores(ranking.layer_scores, drops, folder / f"scores.{kind}")
        for name, score in ranking.scores.items():
            if score.blocks:
                drop = drops[name]
                # A criterion that also scores single layers may drop no block; the best one of that length is shown.
                of_length = (block for block in score.blocks if len(block) == len(drop))
                best = min(of_length, key=score.blocks.__getitem__, default=())
                shown = drop if tuple(drop) in score.blocks else best
                score_plots.draw_block_scores(score, shown, folder / f"blocks-{name}.{kind}")
