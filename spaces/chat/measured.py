"""The table of `metrics.json`, with the labels and number formats of the model's card."""

from __future__ import annotations

from html import escape
from types import SimpleNamespace
from typing import Any

try:  # in a published Space: a copy that `push --space` adds
    from figures import results
except ImportError:  # in a checkout or an installed package
    from hf_layerprune.records.figures import results

KINDS = (results.QUALITY, results.COST)  # quality, and cost


def table(metrics: dict[str, Any]) -> str:
    """A column for each model; below each number, its difference from the dense model's.

    Args:
        metrics (`dict`): The content of `metrics.json`.

    Returns:
        `str`: HTML.
    """
    arranged = results.results_of(SimpleNamespace(**metrics))
    heads = [f"{escape(one.role)}<br><small>{one.layers} layers</small>" for one in arranged.columns]
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body, noise = "", False
    for kinds in KINDS:
        for number, row in enumerate(arranged.table(kinds)):
            first = ' class="first"' if body and number == 0 else ""
            cells = [row.cells.get(column.weights) for column in arranged.columns]
            noise |= any(cell.noise for cell in cells if cell)
            body += f'<tr{first}><th scope="row">{label(row)}</th>'
            body += "".join(f"<td>{shown(cell) if cell else ''}</td>" for cell in cells) + "</tr>"
    return (
        f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<p>{legend(arranged, noise)}</p>"
    )


def label(row: results.Row) -> str:
    """The label of a row: task, metric, number of samples, chance."""
    notes = [f"n = {row.samples:,}"] if row.samples else []
    notes += [f"chance {row.chance}"] if row.chance else []
    first, rest = (row.task, [row.metric, *notes]) if row.task else (row.metric, notes)
    return f"{escape(first)}\N{NO-BREAK SPACE}{row.better}<br><small>{escape(', '.join(rest))}</small>"


def shown(cell: results.Cell) -> str:
    """A number, with its difference from the dense model's."""
    if not cell.change:
        return cell.value
    return f"{cell.value}<br><small>{f'<em>{cell.change}</em>' if cell.noise else cell.change}</small>"


def legend(arranged: results.Results, noise: bool) -> str:
    """The legend: how to read the table, and how its numbers were measured."""
    words = ["Small below a value: its difference from the dense model, or the ratio to it. ± is a standard error."]
    if noise:
        words.append("<em>In italics</em>: indistinguishable from noise (p &gt; 0.05).")
    if arranged.usual_run:
        words.append(f"Speeds are medians of n runs: {results.run_words(arranged.usual_run)}.")
    return " ".join([*words, escape(f"Measured {', '.join(results.measured_with(arranged))}.")])
