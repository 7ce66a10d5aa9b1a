"""Formats numbers as a table for a terminal: the model, its base, and the stages in between."""

from __future__ import annotations

from collections.abc import Iterable

from ..records.figures import numbers
from ..records.figures.results import QUALITY, SIGNIFICANT, Cell, Results, Row, build_results, describe_run
from ..records.metrics import Metrics

_NOTES = {
    "change": "change: from dense, over the same questions or windows, with its standard error; of speeds, the median "
    "ratio of runs in turn; p: exact McNemar test for answers, paired t test for the rest",
    "theory": "theory: the ratio to dense that operations or bytes alone would give",
    "of margin": "of margin: the share of the dense model's margin over chance that remains; omitted if that margin is "
    "below two standard errors",
    "kl": "kl: KL(dense || model), nats per token; top1_agreement: same most likely next token as dense",
}


def report(metrics: Metrics, kinds: Iterable[str] = QUALITY) -> str:
    """Format a model's numbers of some kinds as a table, with a heading and notes."""
    results = build_results(metrics)
    rows = results.table(kinds, every=True) if results else []
    if not rows:
        return "nothing was measured"
    columns = [one for one in results.columns if any(one.weights in row.cells for row in rows)]
    headings = [
        f"{one.role + ': ':<10}{metrics.models[one.weights]['name']}, {one.layers} layers, {one.parameters:,} parameters, "
        f"weights {one.weights[:12]}"
        for one in columns
    ]
    table = [["task", "metric", "n", *(one.role for one in columns), "change", "theory", "of margin", "p"]]
    lines_of: dict[str, list[int]] = {"": []}  # the lines of the table, by the run that they are about
    for row in rows:
        words = ", ".join(filter(None, [row.engine, describe_run(row.run), row.qualifier]))
        task = f"{row.key[1]} ({words})" if row.key[1] and words else row.key[1]
        lines_of.setdefault("" if task else words, []).append(len(table))
        cells = [_format_value(row, row.cells.get(one.weights)) for one in columns]
        samples = f"{row.samples:,}" if row.samples else ""
        table.append([task, row.key[2], samples, *cells, *_comparison_cells(row, results)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    used = [i for i in range(len(widths)) if any(row[i] for row in table[1:])]
    formatted = [
        "  ".join(row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in used).rstrip()
        for row in table
    ]
    lines = formatted[:1]
    for words, numbered in lines_of.items():
        lines += [*([f"{words}:"] if words else []), *(formatted[i] for i in numbered)]
    shown = {table[0][i] for i in used} | {row[1] for row in table}
    notes = [note for word, note in _NOTES.items() if word in shown]
    required = [outcome.text for outcome in metrics.outcomes]
    return "\n".join([*headings, "", *lines, *(["", *required] if required else []), *(["", *notes] if notes else [])])


def _format_value(row: Row, cell: Cell | None) -> str:
    if cell is None:
        return ""
    kind, _, metric = row.key
    text = cell.value
    if "spread" in cell.record:
        least, most = (numbers.format_metric(metric, value, kind) for value in cell.record["spread"])
        if least.split()[1:] == most.split()[1:] == text.split()[1:]:  # the same unit
            least, most = least.split()[0], most.split()[0]
        text += f" [{least} to {most}]" if least != most else ""
    return f"{text} %" if row.share else text


def _comparison_cells(row: Row, results: Results) -> list[str]:
    cell = row.cells.get(results.own.weights) if results.own else None
    if cell is None or results.dense is None:
        return ["", "", "", ""]
    paired = cell.paired or {}
    theory, kept, p = (paired.get(name) for name in ("theoretical_share", "share_of_margin", "p_value"))
    significance = "" if p is None else "<1e-4" if p < 1e-4 else f"{p:.2g}"
    return [
        cell.change,
        "" if theory is None else numbers.format_ratio(theory),
        "" if kept is None else f"{numbers.in_percent(kept)} %",
        significance + (" noise" if p is not None and p > SIGNIFICANT else ""),
    ]
