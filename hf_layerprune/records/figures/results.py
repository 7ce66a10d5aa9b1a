"""Arrange the numbers of `metrics.json` in a table: one column per stage, one row per metric and task.

A stage or metric without numbers has no column or row, and a missing number is an empty cell. Differences from the dense
model are the paired ones in `metrics.json`, with standard errors, or else plain differences without.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from . import numbers
from .metric_names import NUMBER, SHARE, TASKS, get_metric

if TYPE_CHECKING:
    from ..metrics import Metrics

ROLES = ("dense", "cut", "repaired", "healed", "trained", "quantized", "model")
QUALITY = ("accuracy", "text", "distance")
COST = ("size", "speed", "memory")
# Settings of a timed run, and their descriptions.
RUN = {"batch": "batch size {}", "prompt_tokens": "{} prompt tokens", "new_tokens": "{} new tokens"}
# What was asked, and where: numbers that differ in one of them are not in one row.
_ASKED, _WHERE = ("dataset", "shots", "task_version"), ("dtype", "device")
CONDITIONS = (*_ASKED, *_WHERE)
# Settings that tell numbers apart too, and their descriptions.
_SETTINGS = {
    "limit": "first {} questions", "batch_size": "batch size {}", "windows": "{} windows", "length": "{} tokens per window",
    "threads": "{} threads",
}  # fmt: skip
_SHA256 = 64  # the length of a hash, which is shown in short
# A difference with a larger p-value is called noise.
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class ResultColumn:
    """One stage of the model, with the hash of its weights. `own` marks the model that the card describes."""

    role: str
    weights: str
    layers: int
    parameters: int
    own: bool


@dataclass(frozen=True)
class Cell:
    """One number in a table, and its difference from the dense model's.

    Args:
        value (`str`): The number, with its standard error.
        change (`str`): The difference or ratio; empty for the dense model.
        noise (`bool`): Whether the difference is not significant in a paired test.
        record (`dict`): The record in `metrics.json`.
        paired (`dict`, *optional*): The record there of the paired difference from the dense model, if there is one.
    """

    value: str
    change: str
    noise: bool
    record: dict[str, Any] = field(repr=False)
    paired: dict[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Row:
    """One metric of one task.

    Args:
        task (`str`): The label of the task; empty if there is none.
        metric (`str`): The label of the metric.
        better (`str`): `↑`, `↓`, or empty.
        samples (`int`, *optional*): Number of questions, tokens or repeats.
        chance (`str`): The value for random guessing; empty if not applicable.
        cells (`dict[str, Cell]`): By the weights of the column.
        key (`tuple[str, ...]`): `kind`, `task`, `metric`, as in `metrics.json`.
        share (`bool`): Whether its numbers are shares of 1, which are shown in percent.
        run (`tuple[tuple[str, int], ...]`): For a speed, the batch size and lengths of the run, by the keys of `RUN`.
        engine (`str`): For a speed in another engine than transformers, its name, and the type of the weights there.
        qualifier (`str`): What tells it from other rows of the same task, as in its label: another data set, dtype, ...
    """

    task: str
    metric: str
    better: str
    samples: int | None
    chance: str
    cells: dict[str, Cell]
    key: tuple[str, str, str]
    share: bool
    run: tuple[tuple[str, int], ...] = ()
    engine: str = ""
    qualifier: str = ""


@dataclass(frozen=True)
class Results:
    """All measured numbers, arranged for the card: a column for each stage, in order, and all rows.

    `metrics` is where they come from, and `pairs` has its comparisons, by the weights, kind, task and metric that they
    are about. The truth value is `False` if there are no numbers.
    """

    columns: list[ResultColumn]
    rows: list[Row]
    metrics: Any = field(repr=False)
    pairs: dict[tuple[Any, ...], list[dict[str, Any]]] = field(default_factory=dict, repr=False)

    def pairs_of(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """The paired differences between a number and those of other models, the newest last."""
        found = self.pairs.get((record["weights"], *_metric_key(record)), [])
        return [one for one in found if one.get("settings") in (None, record.get("settings"))]

    def __bool__(self) -> bool:
        return bool(self.rows)

    @property
    def own(self) -> ResultColumn | None:
        """The column of the model that the card describes."""
        return next((column for column in self.columns if column.own), None)

    @property
    def dense(self) -> ResultColumn | None:
        """The column of the base."""
        return next((column for column in self.columns if column.role == "dense"), None)

    @property
    def packed(self) -> bool:
        """Whether the dense model was measured as a GGUF file, and this one was not."""
        pair = [self.dense.weights if self.dense else "", self.metrics.weights]
        names = [self.metrics.models[weights]["name"] for weights in pair if weights in self.metrics.models]
        return [name.lower().endswith(".gguf") for name in names] == [True, False]

    def table(self, kinds: Iterable[str], *, every: bool = False) -> list[Row]:
        """The rows of the given kinds. Unless `every` is set, redundant rows are omitted: plain accuracy next to the
        length-normalised one, cross-entropy next to a perplexity, and speeds of runs other than `usual_run`.
        """
        rows = [row for row in self.rows if row.key[0] in tuple(kinds)]
        if every:
            return rows
        again = {(row.key[1], get_metric(row.key[2]).replaces, row.samples) for row in rows}
        rows = [row for row in rows if (row.key[1], row.key[2], row.samples) not in again]
        usual = self.usual_run
        return [row for row in rows if row.run in ((), usual)]

    @property
    def usual_run(self) -> tuple[tuple[str, int], ...]:
        """The run to show: the smallest batch size and, within that, the longest prompt."""
        runs = [row.run for row in self.rows if row.run]
        return max(runs, key=lambda run: (-dict(run).get("batch", 0), dict(run).get("prompt_tokens", 0)), default=())

    def mean_accuracy(self) -> dict[str, tuple[float, float | None]]:
        """Mean and standard error over the tasks that all columns have, by weights; empty for fewer than two tasks.

        Scores that are not shares of 1 are left out.
        """
        rows = [row for row in self.table(["accuracy"]) if row.share]
        rows = [row for row in rows if all(column.weights in row.cells for column in self.columns)]
        if len(rows) < 2:
            return {}
        means = {}
        for column in self.columns:
            records = [row.cells[column.weights].record for row in rows]
            errors = [record["stderr"] for record in records if record.get("stderr") is not None]
            complete = len(errors) == len(records)
            stderr = math.sqrt(sum(error**2 for error in errors)) / len(rows) if complete else None
            means[column.weights] = (sum(record["value"] for record in records) / len(rows), stderr)
        return means


def build_results(metrics: Metrics | None) -> Results:
    """Arrange measured numbers in a table."""
    if metrics is None or not metrics.results:
        return Results([], [], metrics)
    results = Results(list(_build_columns(metrics)), [], metrics)
    for one in metrics.comparisons:
        results.pairs.setdefault((one["weights"], *_metric_key(one)), []).append(one)
    alike: dict[str, dict[str, dict[str, Any]]] = {}
    for record in metrics.results:
        alike.setdefault(json.dumps(_key(record), sort_keys=True), {}).setdefault(record["weights"], record)
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for record in metrics.results:
        partners = alike[json.dumps(_key(record), sort_keys=True)]
        key = json.dumps([_key(record), _conditions(record, partners, results)], sort_keys=True)
        grouped.setdefault(key, {})[record["weights"]] = record
    rows = [_build_row(by_weights, results) for by_weights in grouped.values()]
    rows = list(_disambiguate([row for row in rows if row.cells]))
    order = {kind: index for index, kind in enumerate((*QUALITY, *COST))}
    results.rows.extend(sorted(rows, key=lambda row: order[row.key[0]]))
    return results


def _key(record: dict[str, Any]) -> list[Any]:
    return [record.get(name) for name in ("kind", "task", "metric", "settings")]


def _metric_key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("kind", "task", "metric"))


def _conditions(record: dict[str, Any], partners: dict[str, dict[str, Any]], results: Results) -> list[Any]:
    """What was asked, and where. A number that was compared with the base's when both were measured is shown with
    that, even if each model ran in its own type.
    """
    bases = {one["base"] for one in results.pairs_of(record)}
    partner = next((one for weights, one in partners.items() if weights in bases), record)
    return [*(record.get(name) for name in _ASKED), *(partner.get(name) for name in _WHERE)]


def _disambiguate(rows: list[Row]) -> Iterator[Row]:
    """The rows, labelled with the conditions in which those of one task, or of one metric without a task, differ."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.key[1] or (row.key, row.run, row.engine), []).append(row)
    for group in groups.values():
        names = _differing_conditions(group)
        for row in group:
            values = [dict.fromkeys(one[name] for one in _facts(row) if name in one) for name in names]
            described = zip(names, values, strict=True)
            words = ", ".join(
                " and ".join(_describe_condition(name, value) for value in found) for name, found in described if found
            )
            label: dict[str, Any] = (
                {"task": f"{row.task} ({words})"} if row.task else {"metric": f"{row.metric}, {words}"}
            )
            yield replace(row, qualifier=words, **label) if words else row


def _facts(row: Row) -> list[dict[str, Any]]:
    """The record of each number in a row, with the settings among its other fields."""
    return [(cell.record.get("settings") or {}) | cell.record for cell in row.cells.values()]


def _differing_conditions(rows: Sequence[Row]) -> list[str]:
    """The conditions and settings in which rows of one metric, or of one model, differ.

    A row may hold numbers in two types, each model's own, which tells it from no other row.
    """
    compared: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        facts = _facts(row)
        for which, fact in [(row.key, facts[0]), *zip(row.cells, facts, strict=True)]:
            compared.setdefault(which, []).append(fact)
    differing = [
        name
        for name in CONDITIONS
        if any(len({one[name] for one in some if name in one}) > 1 for some in compared.values())
    ]
    return differing + [name for name in _SETTINGS if len({_facts(row)[0].get(name) for row in rows}) > 1]


def _describe_condition(name: str, value: Any) -> str:
    if name == "dataset":
        return value[:8] if len(value) == _SHA256 else value
    words = {"shots": "{}-shot", "task_version": "version {}"} | _SETTINGS
    text = words.get(name, "{}").format(value)
    return text.removesuffix("s") if value == 1 else text


def _build_columns(metrics: Metrics) -> Iterator[ResultColumn]:
    measured = {record["weights"] for record in metrics.results}
    for role in ROLES:
        present = [
            weights for weights, model in metrics.models.items() if model["role"] == role and weights in measured
        ]
        # If several models have this role, use the folder's own, or else the newest.
        for weights in [metrics.weights] if metrics.weights in present else present[-1:]:
            model = metrics.models[weights]
            own = weights == metrics.weights and role != "dense"
            yield ResultColumn(role, weights, model["layers"], model["parameters"], own)


def _build_row(by_weights: dict[str, dict[str, Any]], results: Results) -> Row:
    sample = next(iter(by_weights.values()))
    kind, task, metric = sample["kind"], sample.get("task", ""), sample["metric"]
    known = get_metric(metric, kind, sample.get("unit"))
    base = by_weights.get(results.dense.weights) if results.dense else None
    if known.depends_on_file and results.packed:
        base = None  # quantised and unquantised files can't be compared in this metric
    # Some tasks score up to 100 (BLEU, or SQuAD v2's F1), which no name tells.
    beyond = known.unit == SHARE and any(abs(record["value"]) > 1 for record in by_weights.values())
    unit = NUMBER if beyond else known.unit
    columns = [column.weights for column in results.columns if column.weights in by_weights]
    cells = {weights: _build_cell(by_weights[weights], base, unit, results) for weights in columns}
    chance, settings = sample.get("chance"), sample.get("settings") or {}
    engine = " ".join(
        str(settings[name]) for name in ("engine", "weights") if "engine" in settings and name in settings
    )
    return Row(
        task=TASKS.get(task, task),
        metric=known.label + (f", in {engine}" if engine else ""),
        better="↑" if sample.get("higher_is_better", known.higher_is_better) else "↓",
        samples=sample.get("samples"),
        chance="" if chance is None else numbers.format_in_unit(unit, chance),
        cells=cells,
        key=(kind, task, metric),
        share=unit == SHARE,
        run=tuple((name, settings[name]) for name in RUN if isinstance(settings.get(name), int)),
        engine=engine,
    )


def _build_cell(record: dict[str, Any], base: dict[str, Any] | None, unit: str, results: Results) -> Cell:
    kind, metric, value = record["kind"], record["metric"], record["value"]
    share = unit == SHARE
    text = numbers.format_in_unit(unit, value)
    if record.get("stderr"):
        text = numbers.with_error(text, value, record["stderr"], share=share)
    if base is None or base is record:
        return Cell(text, "", False, record)
    # The newest.
    paired = next((one for one in reversed(results.pairs_of(record)) if one["base"] == base["weights"]), None)
    if share and metric != "top1_agreement":
        difference = paired["difference"] if paired else value - base["value"]
        change = numbers.with_sign(numbers.in_percent(difference), difference)
        if paired and paired.get("stderr"):
            change += f" ± {numbers.in_percent(paired['stderr'])}"
    elif kind == "distance" or not base["value"]:
        change = ""
    elif paired and paired.get("share") is not None:
        # Of runs in turn, in which whatever slowed down both cancels out.
        change = numbers.format_ratio(paired["share"])
    else:
        # A time at which the dense model did not run in turn says more about the machine than about the model.
        change = "" if kind == "speed" else numbers.format_ratio(value / base["value"])
    p_value = paired.get("p_value") if paired else None
    return Cell(text, change, p_value is not None and p_value > SIGNIFICANT, record, paired)


def describe_run(run: Iterable[tuple[str, int]]) -> str:
    """Describe the batch size and lengths of a timed run."""
    return ", ".join(RUN[name].format(f"{number:,}") for name, number in run)


def describe_conditions(results: Results) -> list[str]:
    """Describe the conditions under which the numbers were measured."""
    records = [cell.record for row in results.rows for cell in row.cells.values()]
    quality = [record for record in records if record["kind"] in QUALITY]
    words = []
    limits = {record.get("settings", {}).get("limit") for record in quality if record["kind"] == "accuracy"}
    shots = {record["shots"] for record in quality if "shots" in record}
    if shots:
        words.append("zero-shot" if shots == {0} else f"{' and '.join(map(str, sorted(shots)))}-shot")
    if limits - {None}:
        counts = " or ".join(map(str, sorted(limits - {None})))
        words.append(f"on the first {counts} questions of {'some tasks' if None in limits else 'each task'}")
    for name, word in (("dtype", "in"), ("device", "on")):
        values = sorted({str(record[name]).replace("cpu", "CPU") for record in records if name in record})
        if values:
            words.append(f"{word} {' and '.join(values)}")
    packages = {name: number for record in records for name, number in record["versions"].items()}
    tools = ["lm-eval"] * bool(shots) + ["transformers", "torch"]  # the harness measures tasks alone
    used = [f"{name} {packages[name]}" for name in tools if name in packages]
    if used:
        words.append(f"with {', '.join(used)}")
    dates = sorted({str(record["date"])[:10] for record in records})
    words.append(f"on {dates[0]}" if len(dates) == 1 else f"from {dates[0]} to {dates[-1]}")
    return words
