"""The sentences of a card's "Limits" section: what got worse and by how much, each from a measured number."""

from __future__ import annotations

from collections.abc import Iterator

from markupsafe import Markup

from ...options import join_words
from ...records.figures import numbers
from ...records.figures.results import Cell, Results, Row
from ...records.history import History
from .escape import escape_text

# Above this ratio of its perplexity to the dense model's, the model no longer predicts text in any useful sense.
_BROKEN = 10.0
_WORSE = 1.02
_FEWEST_LOST = 6  # questions, with none gained: of fewer, the exact test calls none significant


def describe_limits(results: Results, history: History) -> list[Markup]:
    """Describe what a pruned model lost.

    Returns:
        `list[Markup]`: One sentence for each number that got worse, one on the smallest detectable difference, and one on
            engines that run another model, which the last cut recorded.
    """
    sentences = _lost_quality(results)
    cuts = [stage.entry for stage in history.stages if stage.name == "prune"]
    if misread := cuts[-1].get("misread") if cuts else None:
        sentences.append(Markup(f"**Another model in some engines**: {escape_text(misread)}, without a warning."))
    return sentences


def _lost_quality(results: Results) -> list[Markup]:
    own = results.own
    if own is None:
        return [Markup("This model has not been measured. Measure it before you rely on it.")]
    missing_base = [] if results.dense else [Markup("Its base was not measured, so what it lost is unknown.")]
    rows = [row for row in results.table(["accuracy", "text", "distance"]) if own.weights in row.cells]
    sentences = [
        *missing_base,
        *_accuracy_losses(rows, own.weights, results),
        *_text_losses(rows, own.weights, results),
    ]
    if detection_limit := _detection_limit(rows):
        sentences.append(detection_limit)
    return sentences


def _accuracy_losses(rows: list[Row], own: str, results: Results) -> Iterator[Markup]:
    same: list[Markup] = []
    for row in (row for row in rows if row.key[0] == "accuracy"):
        cell, task = row.cells[own], escape_text(row.task)
        dense = row.cells.get(results.dense.weights) if results.dense else None
        if cell.noise:
            same.append(task)
        elif cell.change.startswith(numbers.MINUS):
            chance = _is_chance(cell)
            end = f", indistinguishable from chance ({row.chance} %)" if chance else ""
            yield Markup(
                f"**{task}**: {escape_text(row.metric)} fell by {cell.change.lstrip(numbers.MINUS)} points, to "
                f"{cell.value.partition(' ')[0]} %{end}."
            )
        elif not row.share and dense is not None and _is_worse(row, cell, dense):
            yield Markup(f"**{task}**: {escape_text(row.metric)} went from {dense.value} to {cell.value}.")
    if same:
        yield Markup(
            f"On {join_words(same)}, no difference is distinguishable from noise with this number of questions; there may "
            "still be a difference."
        )


def _is_worse(row: Row, cell: Cell, dense: Cell) -> bool:
    ours, theirs = cell.record["value"], dense.record["value"]
    return ours < theirs if row.better == "↑" else ours > theirs


def _is_chance(cell: Cell) -> bool:
    record = cell.record
    if "chance" not in record or not record.get("stderr"):
        return False
    return record["value"] - record["chance"] < 2 * record["stderr"]


def _text_losses(rows: list[Row], own: str, results: Results) -> Iterator[Markup]:
    dense = results.dense.weights if results.dense else ""
    for row in rows:
        cell, kind, metric = row.cells[own], row.key[0], row.key[2]
        if kind == "text" and "perplexity" in metric and dense in row.cells:
            before, after = row.cells[dense].record["value"], cell.record["value"]
            if after <= before * _WORSE:
                continue
            end = "; at that level it hardly predicts text any more" if after > _BROKEN * before else ""
            on = f" on {escape_text(row.task)}" if row.task else ""
            yield Markup(
                f"**Perplexity**{on} rose from {numbers.format_number(before)} to {numbers.format_number(after)}, "
                f"{numbers.format_ratio(after / before)}{end}."
            )
        elif metric == "top1_agreement":
            on = f" of {escape_text(row.task)}" if row.task else ""
            other = numbers.in_percent(1 - cell.record["value"])
            yield Markup(
                f"**Top-1 agreement**: at {other} % of the tokens{on}, its likeliest next token differs from the dense "
                "model's."
            )


def _detection_limit(rows: list[Row]) -> Markup | None:
    """A sentence with the smallest difference that this many questions can detect."""
    accuracies = [row for row in rows if row.key[0] == "accuracy" and row.share]
    pairs = [cell.paired for row in accuracies for cell in row.cells.values() if cell.paired]
    limits = [2 * paired["stderr"] for paired in pairs if paired.get("stderr")]
    if not limits:
        return None
    counts = [paired["samples"] for paired in pairs if paired.get("test") == "mcnemar_exact" and "samples" in paired]
    least = numbers.in_percent(min(1, max([*limits, *(_FEWEST_LOST / count for count in counts)])))
    return Markup(f"With this many questions per task, differences below about {least} points can't be detected.")
