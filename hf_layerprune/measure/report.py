"""Formats numbers as a table for a terminal: the model, its base, and the stages in between."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ..records.metrics import Metrics

_ROLES = ("dense", "cut", "repaired", "healed", "model")
_SHARES = ("acc", "acc_norm", "top1_agreement", "exact_match", "f1")
# A difference with a larger p-value is called noise.
_NOISE = 0.05


def report(metrics: Metrics, kinds: Iterable[str] = ("accuracy", "text", "distance")) -> str:
    """Format numbers as a table.

    Args:
        metrics (`Metrics`): The numbers of a model.
        kinds (`Iterable[str]`): The kinds of numbers to show.

    Returns:
        `str`: The table, with a heading and notes.
    """
    kinds = tuple(kinds)
    results = [record for record in metrics.results if record["kind"] in kinds]
    measured = {record["weights"] for record in results}
    columns = sorted(
        (weights for weights in metrics.models if weights in measured),
        key=lambda weights: (_ROLES.index(metrics.models[weights]["role"]), weights == metrics.weights),
    )
    base = next((one for one in columns if metrics.models[one]["role"] == "dense" and one != metrics.weights), None)
    lines = [_heading(metrics, weights) for weights in columns]
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for record in results:
        rows.setdefault(_row_key(record), {})[record["weights"]] = record
    compared = {(_row_key(one), one["base"]): one for one in metrics.comparisons if one["weights"] == metrics.weights}
    table = [["task", "metric", "n", *(metrics.models[weights]["role"] for weights in columns)]]
    if base is not None:
        table[0] += ["difference", "share", "of margin", "p"]
    for key, cells in rows.items():
        first = next(iter(cells.values()))
        row = [_task(first), first["metric"], f"{first['samples']:,}" if "samples" in first else ""]
        row += [_value(cells[weights]) if weights in cells else "" for weights in columns]
        if base is not None:
            row += _compared(first["metric"], compared.get((key, base)))
        table.append(row)
    return "\n".join([*lines, "", *aligned(table), *_notes(metrics, base, table)])


def aligned(table: list[list[str]]) -> list[str]:
    """Lines with aligned columns: the first two to the left, numbers to the right."""
    table = [row for row in table if row]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    used = (
        [i for i in range(len(widths)) if any(row[i] for row in table[1:])] if len(table) > 1 else range(len(widths))
    )
    return [
        "  ".join(row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in used).rstrip()
        for row in table
    ]


def _heading(metrics: Metrics, weights: str) -> str:
    model = metrics.models[weights]
    return (
        f"{model['role'] + ':':<10}{model['name']}, {model['layers']} layers, {model['parameters']:,} parameters, "
        f"weights {weights[:12]}"
    )


def _row_key(record: dict[str, Any]) -> str:
    return json.dumps([record.get(name) for name in ("kind", "task", "metric", "settings")], sort_keys=True)


def _task(record: dict[str, Any]) -> str:
    settings = record.get("settings") or {}
    parts = [f"{short} {settings[name]}" for name, short in _SETTINGS.items() if name in settings]
    return " ".join(filter(None, [record.get("task", ""), f"({', '.join(parts)})" if parts else ""]))


_SETTINGS = {"batch": "batch", "prompt_tokens": "prompt", "new_tokens": "new"}


def _value(record: dict[str, Any]) -> str:
    text = number(record["metric"], record["value"])
    if "stderr" in record:
        return f"{text} ± {_error(record['metric'], record['stderr'], record['value'])}"
    if record.get("samples", 1) > 1 and "spread" in record:
        return f"{text} [{' to '.join(number(record['metric'], value) for value in record['spread'])}]"
    return text


def _error(metric: str, error: float, value: float) -> str:
    return f"{100 * error:.1f}" if metric in _SHARES else f"{error:.2g}" if abs(value) < 1e5 else f"{error:.1e}"


def number(metric: str, value: float) -> str:
    """A number with its significant digits and its unit."""
    if metric in _SHARES:
        return f"{100 * value:.1f} %"
    if metric.endswith("bytes") or metric.startswith("bytes") or "_bytes_" in metric:
        return f"{value / 1e6:,.1f} MB" if value >= 1e5 else f"{value:,.0f} B"
    if metric == "parameters":
        return f"{value:,.0f}"
    if metric.endswith("seconds") or metric.startswith("time_"):
        return f"{value:.3f} s"
    if abs(value) >= 1e5:
        return f"{value:.2e}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.4g}"


def _compared(metric: str, comparison: dict[str, Any] | None) -> list[str]:
    if comparison is None:
        return ["", "", "", ""]
    difference = ""
    if metric in _SHARES:
        difference = f"{100 * comparison['difference']:+.1f}"
        if "stderr" in comparison:
            difference += f" ± {100 * comparison['stderr']:.1f}"
    elif comparison["kind"] in ("text", "accuracy"):
        difference = f"{comparison['difference']:+.4g}"
        if "stderr" in comparison:
            difference += f" ± {comparison['stderr']:.2g}"
    share = _share(comparison.get("share"))
    if "theoretical_share" in comparison:
        share += f" (theory {_share(comparison['theoretical_share'])})"
    p_value = comparison.get("p_value")
    p = "" if p_value is None else "<1e-4" if p_value < 1e-4 else f"{p_value:.2g}"
    return [
        difference,
        share,
        _share(comparison.get("share_of_margin")),
        p + (" noise" if (p_value or 0) > _NOISE else ""),
    ]


def _share(share: float | None) -> str:
    if share is None:
        return ""
    return f"{100 * share:.1f} %" if abs(share) < 10 else f"{share:.3g} x"


def _notes(metrics: Metrics, base: str | None, table: list[list[str]]) -> list[str]:
    notes = []
    shown = {row[1] for row in table}
    if base is not None and shown & {"acc", "acc_norm", "nll"}:
        notes.append(
            "difference: from dense, over the same questions or windows, with its standard error; p: exact McNemar test for "
            "answers, paired t test for nll"
        )
    if base is not None and shown & {"acc", "acc_norm"}:
        notes.append(
            "of margin: the share of the dense model's margin over chance that remains; omitted if that margin is below "
            "two standard errors"
        )
    if "kl" in shown:
        notes.append("kl: KL(dense || model), nats per token; top1_agreement: same most likely next token as dense")
    return ["", *notes] if notes else []
