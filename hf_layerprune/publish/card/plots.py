"""The plots of a card, drawn from the same records as its text.

Each function that draws takes the picture to write, and a hash of the records for it (see [`~style.new_figure`]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...options import pluralize
from ...records.curve import curve_points
from ...records.figures.results import Results, Row
from ...records.history import TRAIN, History
from .curve_plot import draw_curve
from .escape import clean_line
from .style import DASHED, INK, ROLE_COLOURS, ROLE_MARKERS, draw_bars, draw_grid, new_figure

# The most tiles in a row of the layer map, so that their numbers stay readable on a phone.
_ROW = 16
_DARK = "#0b0f19"
_LIGHT = "#ffffff"


def draw_layer_map(history: History, path: Path, digest: str | None = None) -> None:
    """Draw the stack of decoder layers: which were kept, which were dropped, and which were changed later."""
    n, kept = history.num_base_layers, set(history.kept)
    healed = history.layers_changed("heal") | history.layers_changed(TRAIN)
    repaired = history.layers_changed("repair") - healed
    rows = -(-n // _ROW)
    columns = -(-n // rows)
    groups = {
        "dense": ("kept as it was", kept - healed - repaired, _LIGHT),
        "cut": ("dropped", set(history.dropped), ROLE_COLOURS["cut"]),
        "repaired": ("repaired", repaired, _LIGHT),
        "healed": ("trained", healed, _DARK),
    }
    styles: dict[str, Any] = {role: {"facecolor": ROLE_COLOURS[role], "edgecolor": "none"} for role in groups}
    styles["cut"] = {"facecolor": "none", **DASHED}
    with new_figure(path, height=0.4 + 0.4 * rows, digest=digest) as (figure, axes):
        from matplotlib.patches import FancyBboxPatch, Patch

        for i in range(n):
            x, y = i % columns, -1.32 * (i // columns)
            role = next(role for role, (_, layers, _) in groups.items() if i in layers)
            shape = "round,pad=0,rounding_size=0.16"
            axes.add_patch(FancyBboxPatch((x + 0.09, y), 0.82, 1.1, boxstyle=shape, **styles[role]))
            axes.text(x + 0.5, y + 0.53, str(i), ha="center", va="center", fontsize=10, color=groups[role][2])
        handles = [
            Patch(**styles[role], label=f"{words} ({len(layers)})")
            for role, (words, layers, _) in groups.items() if layers
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="outside lower left", ncols=len(handles), handlelength=1.1, handletextpad=0.5,
            columnspacing=1.8, borderaxespad=0.2,
        )  # fmt: skip
        axes.set_xlim(-0.05, max(columns, 12) + 0.05)
        axes.set_ylim(-1.32 * (rows - 1) - 0.08, 1.2)
        axes.axis("off")


def draw_accuracy(results: Results, rows: Sequence[Row], path: Path, digest: str | None = None) -> None:
    """Draw the accuracy of all stages on each task with standard errors, and chance."""
    columns = results.columns
    with new_figure(path, height=0.85 + len(rows) * (0.3 + 0.13 * len(columns)), digest=digest) as (figure, axes):
        step = 0.72 / max(1, len(columns))
        for index, column in enumerate(columns):
            records = {
                y: row.cells[column.weights].record for y, row in enumerate(rows) if column.weights in row.cells
            }
            if records:
                offset = (index - (len(columns) - 1) / 2) * step
                axes.errorbar(
                    [100 * one["value"] for one in records.values()], [y + offset for y in records],
                    xerr=[100 * one.get("stderr", 0) for one in records.values()], **_marker_style(column.role),
                    label=column.role,
                )  # fmt: skip
        of_rows = ([one.record.get("chance") for one in row.cells.values()] for row in rows)
        chances = {y: found for y, each in enumerate(of_rows) if (found := next(filter(None, each), None))}
        for y, chance in chances.items():
            axes.plot([100 * chance] * 2, [y - 0.42, y + 0.42], color=INK, lw=1.2, ls=(0, (1, 1.5)))
            if y == min(chances):
                axes.annotate("chance", (100 * chance, y - 0.46), ha="center", va="bottom", fontsize=8, color=INK)
        axes.set_yticks(range(len(rows)), [row.task for row in rows])
        axes.set_ylim(len(rows) - 0.45, -0.75)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("accuracy in %, with standard errors")
        axes.margins(x=0.08)
        draw_grid(axes, "x")
        figure.legend(loc="outside upper right", ncols=len(columns), handletextpad=0.3, columnspacing=1.4)


def draw_tradeoff(results: Results, speed: Row, path: Path, digest: str | None = None) -> None:
    """Draw quality against speed: the mean accuracy of every stage against its decode throughput, as a multiple of that
    of the dense model in the same runs. Throughputs of different runs say more about the machine than about the models.
    """
    means = results.mean_accuracy()
    with new_figure(path, height=2.9, digest=digest) as (_, axes):
        for column in results.columns:
            if column.weights not in speed.cells or column.weights not in means:
                continue
            cell, (mean, stderr) = speed.cells[column.weights], means[column.weights]
            times, error = 1.0, 0.0
            if column.role != "dense":
                paired, value = cell.paired or {}, cell.record["value"]
                if not (value and paired.get("share")):  # not measured in turn with the dense model
                    continue
                times = paired["share"]
                error = times * (paired.get("stderr") or 0) / value
            axes.errorbar(
                times, 100 * mean, xerr=error, yerr=100 * (stderr or 0),
                label=f"{column.role}, {pluralize(column.layers, 'layer')}", **_marker_style(column.role)
            )  # fmt: skip
        axes.set_xlabel("decode throughput, as a multiple of the dense model's")
        axes.set_ylabel("mean accuracy in %")
        axes.margins(x=0.2, y=0.2)
        axes.legend(loc="best")  # stages are often too close for labels beside them
        draw_grid(axes, "both")


def draw_scores(
    values: Sequence[float | None], dropped: Sequence[int], label: str, path: Path, digest: str | None = None
) -> None:
    """Draw a criterion's score of each layer of the base, where it has one, and mark the layers that were dropped."""
    with new_figure(path, height=2.3, digest=digest) as (_, axes):
        draw_bars(axes, {i: value for i, value in enumerate(values) if value is not None}, dropped, "dropped")
        axes.set_xlabel("decoder layer of the base")
        axes.set_ylabel(label)
        axes.set_xlim(-0.7, len(values) - 0.3)
        axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)


def _marker_style(role: str) -> dict[str, Any]:
    mark = {"color": ROLE_COLOURS[role], "marker": ROLE_MARKERS[role], "markersize": 6.5}
    return {**mark, "linestyle": "", "elinewidth": 1.6, "capsize": 0}


def available_plots(history: History, results: Results | None = None) -> dict[str, Callable[..., None]]:
    """The functions that draw the plots for which there are records, by name; each takes a path, and a digest."""
    drawings: dict[str, Callable[..., None]] = {"layers": partial(draw_layer_map, history)}
    scored = next(filter(None, (_scores_of(stage.entry, history) for stage in history.stages)), None)
    if scored is not None:
        drawings["scores"] = partial(draw_scores, scored[1], history.dropped, scored[0])
    if points := curve_points(history):
        drawings["curve"] = partial(draw_curve, points, chosen=len(history.dropped))
    if not results or len(results.columns) < 2:
        return drawings
    rows = [row for row in results.table(["accuracy"]) if row.share and len(row.cells) > 1]
    if rows:
        drawings["accuracy"] = partial(draw_accuracy, results, rows)
    speed = next(
        (row for row in results.table(["speed"]) if row.key[2] == "decode_tokens_per_second" and not row.engine), None
    )
    if speed is not None and any(
        speed.cells[one].paired for one in speed.cells.keys() & results.mean_accuracy().keys()
    ):
        drawings["tradeoff"] = partial(draw_tradeoff, results, speed)
    return drawings


def _scores_of(entry: dict[str, Any], history: History) -> tuple[str, list[float | None]] | None:
    """The criterion that the layers were chosen by, and its score of each layer of the base."""
    selection = entry.get("selection", {})
    values = selection.get("scores", {}).get("layers") or []
    if len(values) != history.num_base_layers:
        return None
    name = clean_line(selection.get("criterion", "score"), 40).replace("_", " ")
    return name.replace("$", ""), values
