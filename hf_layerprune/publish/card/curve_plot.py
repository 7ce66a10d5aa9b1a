"""A curve on the card: what dropping layers costs, with and without repair, as a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...options import pluralize
from ...records.curve import final_quality
from ...records.figures import numbers
from .style import FAINT, INK, ROLE_COLOURS, ROLE_MARKERS, draw_grid, new_figure

_NAMES = {"cut": "cut", "repaired": "cut and repaired"}


def curve_table(points: Sequence[dict[str, Any]], chosen: int) -> list[list[str]]:
    """The rows of the table, the chosen one in bold."""
    rows = []
    for point in points:
        best = final_quality(point)
        row = [
            str(point["dropped"]),
            ", ".join(point["layers"].split(",")),
            numbers.format_number(best["kl"]),
            numbers.format_ratio(best["perplexity_ratio"]),
            f"{numbers.in_percent(best['top1_agreement'])} %",
        ]
        rows.append([f"**{cell}**" for cell in row] if point["dropped"] == chosen else row)
    return rows


def draw_curve(
    points: Sequence[dict[str, Any]],
    path: Path,
    digest: str | None = None,
    *,
    chosen: int | None = None,
    knee: int | None = None,
    remark: str = "",
) -> None:
    """Draw KL from the dense model against the number of layers that are dropped.

    The points are those of a quality curve or of a budget's search. The one with `chosen` layers is marked, and
    labelled with the remark if there is one; quality falls off after the `knee`.
    """
    series = {
        name: [(0, 0.0, 0.0)]
        + [(p["dropped"], p[name]["kl"], p[name].get("kl_stderr", 0.0)) for p in points if name in p]
        for name in _NAMES
    }
    series = {name: line for name, line in series.items() if len(line) > 1}
    best = series.get("repaired") or series["cut"]
    top = 1.25 * max(1e-6, *(kl + error for _, kl, error in best))  # dropping layers that do nothing costs nothing
    heights = {count: kl for count, kl, _ in best}
    with new_figure(path, height=3.9, digest=digest) as (_, axes):
        axes.axhline(0, color=ROLE_COLOURS["dense"], lw=1.2, ls=(0, (4, 3)), zorder=1)
        for name, line in series.items():
            _draw_line(axes, name, line, top)
        axes.plot(0, 0, color=ROLE_COLOURS["dense"], marker=ROLE_MARKERS["dense"], ms=7, zorder=4, clip_on=False)
        axes.annotate(
            "dense", (1, 0), xytext=(5, 0), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=9.5, va="center",
            color=ROLE_COLOURS["dense"], annotation_clip=False,
        )  # fmt: skip
        if knee in heights:
            axes.axvline(knee, color=FAINT, lw=1.2, ls=(0, (1, 1.5)), zorder=0)
            axes.annotate(
                "knee", (knee, top), xytext=(0, 3), textcoords="offset points", fontsize=9, color=INK, ha="center",
                annotation_clip=False,
            )  # fmt: skip
        if chosen is not None and chosen in heights:
            _mark_chosen(axes, (chosen, heights[chosen]), remark or f"chosen: {pluralize(chosen, 'layer')}")
        last = max(point["dropped"] for point in points)
        axes.set_xticks(range(0, last + 1, 1 if last <= 16 else 2 if last <= 32 else 5))
        axes.set_xlim(-0.3, last + 0.4)
        axes.set_ylim(-0.02 * top, top)
        axes.set_xlabel("layers dropped")
        axes.set_ylabel("KL from the dense model, nats per token")
        draw_grid(axes, "y")


def _draw_line(axes: Any, name: str, line: Sequence[tuple[int, float, float]], top: float) -> None:
    """Draw the points `(layers dropped, KL, standard error)` of the cut or the repaired model, and the line's name."""
    colour = ROLE_COLOURS[name]
    x, y, errors = zip(*line, strict=True)
    axes.errorbar(
        x[1:], y[1:], yerr=errors[1:], color=colour, marker=ROLE_MARKERS[name], ms=5.5, ls="", elinewidth=1.2, zorder=3
    )
    axes.plot(x, y, color=colour, lw=1.8, zorder=2)
    # A line that leaves the picture is named where it does.
    visible = [(count, kl) for count, kl, _ in line if kl <= top]
    inside = len(visible) == len(line)
    axes.annotate(
        _NAMES[name], visible[-1], xytext=(8, 0) if inside else (-6, 10), textcoords="offset points", fontsize=9.5,
        ha="left" if inside else "right", va="center", color=colour, annotation_clip=False
    )  # fmt: skip


def _mark_chosen(axes: Any, point: tuple[int, float], remark: str) -> None:
    colour = ROLE_COLOURS["healed"]
    axes.plot(*point, marker="o", ms=15, mfc="none", mec=colour, mew=2, zorder=5)
    axes.annotate(  # below the curve, where it is empty
        remark, point, xytext=(0.985, 0.06), textcoords="axes fraction", fontsize=9.5, ha="right", va="bottom", color=colour,
        fontweight="bold", arrowprops={"arrowstyle": "-", "color": colour, "shrinkB": 8, "relpos": (0.3, 1)},
    )  # fmt: skip
