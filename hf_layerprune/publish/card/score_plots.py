"""The plots of a ranking: the scores of layers and blocks, and what each criterion would drop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...select.registry import CRITERIA
from ...select.scores import Scores
from .style import DROPPED, FAINT, INK, ROLE_COLOURS, draw_bars, dynamic_range, new_figure

_COLUMNS = 2


def draw_layer_scores(scores: Sequence[Scores], drops: Mapping[str, Sequence[int]], path: Path) -> None:
    """Draw the scores of single layers, one bar chart per criterion, with the layers that it would drop outlined."""
    columns = min(_COLUMNS, len(scores))
    rows = -(-len(scores) // columns)
    shape: dict[str, Any] = {"nrows": rows, "ncols": columns, "squeeze": False, "sharex": True}
    with new_figure(path, height=0.5 + 1.75 * rows, **shape) as (figure, panels):
        for axes, panel_scores in zip(panels.flat, scores, strict=False):
            values = {i: score for i, score in enumerate(panel_scores.layers or ()) if score is not None}
            draw_bars(axes, values, set(drops[panel_scores.criterion]))
            criterion = CRITERIA[panel_scores.criterion]
            paper = " (paper)" if panel_scores.variant == "paper" else ""
            axes.set_title(criterion.name + paper, fontsize=9.5, pad=5)
            axes.set_ylabel(criterion.unit, fontsize=8.5)
            axes.tick_params(labelsize=8)
            axes.set_xlim(-0.8, len(panel_scores.layers or ()) - 0.2)
        for axes in panels.flat[len(scores) :]:
            axes.axis("off")
        for axes in panels.flat[max(0, len(scores) - columns) : len(scores)]:  # the lowest of each column
            axes.set_xlabel("decoder layer of the base")
            axes.tick_params(labelbottom=True)
        figure.legend(*panels.flat[0].get_legend_handles_labels(), loc="outside upper right", ncols=2)


def draw_block_scores(scores: Scores, drops: Sequence[int], path: Path) -> None:
    """Draw the scores of blocks, and the block that would be dropped: a heat map, or bars if all have the same length."""
    lengths = sorted({len(block) for block in scores.blocks})
    if len(lengths) == 1:
        _draw_block_bars(scores, drops, lengths[0], path)
    else:
        _draw_heat_map(scores, drops, path)


def draw_choices(drops: Mapping[str, Sequence[int]], num_layers: int, path: Path) -> None:
    """Draw the layers that each criterion would drop, one row each, and below them how many agree."""
    names = list(drops)
    with new_figure(path, height=0.75 + 0.27 * len(names)) as (_, axes):
        from matplotlib.patches import FancyBboxPatch

        for y, name in enumerate(names):
            dropped = set(drops[name])
            for i in range(num_layers):
                style = DROPPED if i in dropped else {"facecolor": FAINT, "edgecolor": "none"}
                box = FancyBboxPatch(
                    (i + 0.08, y + 0.14), 0.84, 0.72, boxstyle="round,pad=0,rounding_size=0.12", **style
                )
                axes.add_patch(box)
        agree = [sum(i in set(dropped) for dropped in drops.values()) for i in range(num_layers)]
        for i, votes in enumerate(agree):
            if votes and len(names) > 1:
                axes.text(i + 0.5, len(names) + 0.45, str(votes), ha="center", va="center", fontsize=7.5, color=INK)
        labels = [*names, *(["how many agree"] if len(names) > 1 else [])]
        axes.set_yticks([y + 0.5 for y in range(len(labels))], labels, fontsize=8.5)
        step = 1 if num_layers <= 12 else 2 if num_layers <= 40 else 5
        axes.set_xticks([i + 0.5 for i in range(0, num_layers, step)], range(0, num_layers, step), fontsize=8)
        axes.set_xlim(0, num_layers)
        axes.set_ylim(len(labels), 0)
        axes.tick_params(length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.set_xlabel("decoder layer of the base")


def _draw_block_bars(scores: Scores, drops: Sequence[int], length: int, path: Path) -> None:
    starts = {block[0]: score for block, score in scores.blocks.items()}
    with new_figure(path, height=2.3) as (_, axes):
        draw_bars(axes, starts, drops[:1])
        axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
        axes.set_title(scores.criterion, pad=6)
        axes.set_xlabel(f"first layer of the block of {length}")
        axes.set_ylabel(CRITERIA[scores.criterion].unit)
        axes.set_xlim(-0.8, len(scores.alive) - 0.2)


def _draw_heat_map(scores: Scores, drops: Sequence[int], path: Path) -> None:
    position = {layer: i for i, layer in enumerate(scores.alive)}
    n, most = len(scores.alive), max(len(block) for block in scores.blocks)
    cells = [[math.nan] * n for _ in range(most)]
    for block, score in scores.blocks.items():
        cells[len(block) - 1][position[block[0]]] = score
    with new_figure(path, height=1.2 + min(3.6, 0.14 * most + 0.6)) as (figure, axes):
        from matplotlib.colors import LogNorm
        from matplotlib.patches import Rectangle

        norm = LogNorm() if dynamic_range(scores.blocks.values()) > 300 else None
        edges = [i - 0.5 for i in range(n + 1)], [k + 0.5 for k in range(most + 1)]
        # Rasterised, because thousands of cells would make a heavy SVG.
        mesh = axes.pcolormesh(*edges, cells, cmap="cividis", norm=norm, rasterized=True)
        # The best start of every length, and the block that would be dropped.
        for length in range(1, most + 1):
            row = [(score, position[block[0]]) for block, score in scores.blocks.items() if len(block) == length]
            if row:
                axes.plot(min(row)[1], length, "o", ms=2.6, color="#ffffff", mec="#0b0f19", mew=0.6)
        if drops:
            corner = (position[drops[0]] - 0.5, len(drops) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=ROLE_COLOURS["cut"], lw=2, zorder=3))
            axes.annotate(
                f"{drops[0]}-{drops[-1]}", (corner[0] + 1, corner[1] + 0.5), xytext=(6, 8), textcoords="offset points",
                fontsize=8.5, color=ROLE_COLOURS["cut"], fontweight="bold",
            )  # fmt: skip
        bar = figure.colorbar(mesh, ax=axes, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label(CRITERIA[scores.criterion].unit)
        axes.set_title(f"{scores.criterion}: every block (dots: the best start of each length)", pad=6, fontsize=9.5)
        axes.set_xlabel("first layer of the block")
        axes.set_ylabel("layers in the block")
