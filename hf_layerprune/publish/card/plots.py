"""The plots of a card, drawn from the same records as its text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...records.figures.results import ResultColumn, Results, Row
from ...records.history import History
from .escape import plain
from .style import CYCLE, FAINT, INK, ROLE_COLOURS, ROLE_MARKERS, WIDE, draw, grid

# The most tiles in a row of the layer map, so that their numbers stay readable on a phone.
_ROW = 16
_DARK = "#0b0f19"
_LIGHT = "#ffffff"


def layer_map(history: History, path: Path) -> None:
    """Draw the stack of decoder layers: which were kept, which were dropped, and which were changed later.

    Args:
        history (`History`): What was done.
        path (`Path`): The picture to write.
    """
    from matplotlib.patches import FancyBboxPatch, Patch

    n, kept = history.num_base_layers, set(history.kept)
    repaired, healed = history.layers_changed("repair"), history.layers_changed("heal")
    rows = -(-n // _ROW)
    columns = -(-n // rows)
    shown: list[str] = []

    def style(i: int) -> tuple[str, str, str, str]:
        """A layer's state, fill colour, edge colour and label colour."""
        if i not in kept:
            return "cut", "none", ROLE_COLOURS["cut"], ROLE_COLOURS["cut"]
        if i in healed:
            return "healed", ROLE_COLOURS["healed"], "none", _DARK
        if i in repaired:
            return "repaired", ROLE_COLOURS["repaired"], "none", _LIGHT
        return "dense", ROLE_COLOURS["dense"], "none", _LIGHT

    with draw(path, width=7.2, height=0.4 + 0.4 * rows) as (figure, axes):
        for i in range(n):
            x, y = i % columns, -1.32 * (i // columns)
            kind, fill, edge, ink = style(i)
            shown += [kind] if kind not in shown else []
            box = FancyBboxPatch(
                (x + 0.09, y), 0.82, 1.1, boxstyle="round,pad=0,rounding_size=0.16", facecolor=fill, edgecolor=edge,
                linewidth=1.2, linestyle=(0, (2, 1.4)) if kind == "cut" else "-",
            )  # fmt: skip
            axes.add_patch(box)
            axes.text(x + 0.5, y + 0.53, str(i), ha="center", va="center", fontsize=10, color=ink)
        counts = {
            "dense": f"kept as it was ({len(kept - healed - repaired)})",
            "cut": f"dropped ({n - len(kept)})",
            "repaired": f"repaired ({len(repaired - healed)})",
            "healed": f"trained ({len(healed)})",
        }
        handles = [
            Patch(
                facecolor="none" if kind == "cut" else ROLE_COLOURS[kind], edgecolor=ROLE_COLOURS[kind], lw=1.2,
                linestyle=(0, (2, 1.4)) if kind == "cut" else "-", label=label,
            )
            for kind, label in counts.items() if kind in shown
        ]  # fmt: skip
        figure.legend(
            handles=handles, loc="outside lower left", ncols=len(handles), handlelength=1.1, handletextpad=0.5,
            columnspacing=1.8, borderaxespad=0.2,
        )  # fmt: skip
        axes.set_xlim(-0.05, max(columns, 12) + 0.05)
        axes.set_ylim(-1.32 * (rows - 1) - 0.08, 1.2)
        axes.axis("off")


def accuracy(results: Results, rows: Sequence[Row], path: Path) -> None:
    """Draw the accuracy of all stages on each task with standard errors, and chance.

    Args:
        results (`Results`): What was measured.
        rows (`Sequence[Row]`): The tasks.
        path (`Path`): The picture to write.
    """
    columns = results.columns
    with draw(path, width=7.2, height=0.85 + len(rows) * (0.3 + 0.13 * len(columns))) as (figure, axes):
        step = 0.72 / max(1, len(columns))
        for position, row in enumerate(rows):
            for index, column in enumerate(columns):
                cell = row.cells.get(column.weights)
                if cell is None:
                    continue
                y = position + (index - (len(columns) - 1) / 2) * step
                axes.errorbar(
                    100 * cell.record["value"], y, xerr=100 * cell.record.get("stderr", 0), **_mark(column.role),
                    label=column.role if position == 0 else None,
                )  # fmt: skip
            chance = next((cell.record["chance"] for cell in row.cells.values() if "chance" in cell.record), None)
            if chance is not None:
                axes.plot([100 * chance] * 2, [position - 0.42, position + 0.42], color=INK, lw=1.2, ls=(0, (1, 1.5)))
                if position == 0:
                    axes.annotate(
                        "chance", (100 * chance, position - 0.46), ha="center", va="bottom", fontsize=8, color=INK
                    )
        axes.set_yticks(range(len(rows)), [row.task for row in rows])
        axes.set_ylim(len(rows) - 0.45, -0.75)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("accuracy in %, with standard errors")
        axes.margins(x=0.08)
        grid(axes, "x")
        figure.legend(loc="outside upper right", ncols=len(columns), handletextpad=0.3, columnspacing=1.4)


def tradeoff(results: Results, speed: Row, path: Path) -> None:
    """Draw quality against speed: the mean accuracy of every stage against its decode throughput.

    Args:
        results (`Results`): What was measured, including the mean accuracy of each stage.
        speed (`Row`): Decode throughput.
        path (`Path`): The picture to write.
    """
    means = results.mean_accuracy()
    with draw(path, width=7.2, height=2.9) as (_, axes):
        for column in results.columns:
            if column.weights not in speed.cells or column.weights not in means:
                continue
            record, (mean, stderr) = speed.cells[column.weights].record, means[column.weights]
            low, high = record.get("spread", (record["value"],) * 2)
            x, y = record["value"], 100 * mean
            axes.errorbar(
                x, y, xerr=[[max(0, x - low)], [max(0, high - x)]], yerr=100 * (stderr or 0), **_mark(column.role)
            )
            axes.annotate(
                f"{column.role}, {column.layers} layers", (x, y), xytext=(6, 5),
                textcoords="offset points", fontsize=9, color=ROLE_COLOURS[column.role],
            )  # fmt: skip
        axes.set_xlabel("decode throughput, tokens/s")
        axes.set_ylabel("mean accuracy in %")
        axes.margins(x=0.2, y=0.2)
        grid(axes, "both")


def scores(values: Sequence[float | None], dropped: Sequence[int], label: str, path: Path) -> None:
    """Draw a criterion's score of each layer, and mark the layers that were dropped.

    Args:
        values (`Sequence[float | None]`): One score for each layer of the base; `None` for a layer without one.
        dropped (`Sequence[int]`): The dropped layers.
        label (`str`): The label of the score axis.
        path (`Path`): The picture to write.
    """
    gone, known = set(dropped), {i: value for i, value in enumerate(values) if value is not None}
    with draw(path, width=7.2, height=2.3) as (_, axes):
        for name, chosen, colour in (
            ("kept", [i for i in known if i not in gone], CYCLE[4]),
            ("dropped", [i for i in known if i in gone], ROLE_COLOURS["cut"]),
        ):
            style = {"facecolor": "none", "edgecolor": colour, "lw": 1.2, "ls": (0, (2, 1.4))}
            axes.bar(
                chosen, [known[i] for i in chosen], 0.78, label=name,
                **(style if name == "dropped" else {"color": colour}),
            )  # fmt: skip
        if known and min(known.values()) > 0 and max(known.values()) > WIDE * min(known.values()):
            axes.set_yscale("log")
        axes.set_xlabel("decoder layer of the base")
        axes.set_ylabel(label)
        axes.set_xlim(-0.7, len(values) - 0.3)
        axes.axhline(0, color=FAINT, lw=0.8)
        axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1)
        grid(axes, "y")


def _mark(role: str) -> dict[str, object]:
    return {
        "color": ROLE_COLOURS[role],
        "marker": ROLE_MARKERS[role],
        "markersize": 6.5,
        "linestyle": "",
        "elinewidth": 1.6,
        "capsize": 0,
    }


def pictures(history: History, results: Results | None) -> dict[str, Callable[[Path], None]]:
    """The plots that can be drawn from the records.

    Args:
        history (`History`): What was done.
        results (`Results`, *optional*): What was measured.

    Returns:
        `dict[str, Callable[[Path], None]]`: The function that draws each plot, by name.
    """
    drawings: dict[str, Callable[[Path], None]] = {"layers": lambda path: layer_map(history, path)}
    layer_scores = next(filter(None, (_scores_of(stage.entry, history) for stage in history.stages)), None)
    if layer_scores is not None:
        drawings["scores"] = lambda path: scores(layer_scores[1], history.dropped, layer_scores[0], path)
    if results is None or len(results.columns) < 2:
        return drawings
    rows = [row for row in results.table(["accuracy"]) if len(row.cells) > 1]
    if rows:
        drawings["accuracy"] = lambda path: accuracy(results, rows, path)
    speed = next((row for row in results.table(["speed"]) if row.key[2] == "decode_tokens_per_second"), None)
    if speed is not None and len([c for c in _both(results.columns, speed) if c in results.mean_accuracy()]) > 1:
        drawings["tradeoff"] = lambda path: tradeoff(results, speed, path)
    return drawings


def _both(columns: Sequence[ResultColumn], speed: Row) -> list[str]:
    return [column.weights for column in columns if column.weights in speed.cells]


def _scores_of(entry: dict[str, Any], history: History) -> tuple[str, list[float | None]] | None:
    """The criterion that the layers were chosen by, and its score of each layer of the base."""
    selection = entry.get("selection")
    if not isinstance(selection, dict):
        return None
    recorded = selection.get("scores")
    values = recorded.get("layers") if isinstance(recorded, dict) else None
    if not isinstance(values, list) or len(values) != history.num_base_layers:
        return None
    if not all(value is None or (isinstance(value, int | float) and abs(value) < 1e300) for value in values):
        return None
    name = plain(selection.get("criterion", "score"), 40).replace("_", " ")
    return name.replace("$", ""), values
