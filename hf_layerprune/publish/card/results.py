"""The tables of a card, from `metrics.json`: one column for each stage that was measured, one row for each number.

What was not measured has no column, no row, or an empty cell. A difference to the dense model is the paired one that
`metrics.json` holds, with its standard error; where it holds none, the difference of the two values, without one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ...records.metrics import Metrics
from . import numbers

ROLES = ("dense", "cut", "repaired", "healed", "model")
QUALITY = ("accuracy", "text", "distance")
COST = ("size", "speed", "memory")
# Settings of a run that is timed, and how they are told.
RUN = {"batch": "a batch of {}", "prompt_tokens": "a prompt of {} tokens", "new_tokens": "{} new ones"}
# What a packed file says of its format rather than of the model.
OF_THE_FORMAT = ("bytes_on_disk", "load_seconds", "peak_rss_bytes")
# A difference is called noise above this.
SIGNIFICANT = 0.05
_TASKS = {
    "piqa": "PIQA", "hellaswag": "HellaSwag", "openbookqa": "OpenBookQA", "openbook_qa": "OpenBookQA",
    "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "mmlu": "MMLU", "cmmlu": "CMMLU",
    "winogrande": "WinoGrande", "wikitext": "WikiText-2", "lambada_openai": "LAMBADA", "boolq": "BoolQ",
    "gsm8k": "GSM8K",
}  # fmt: skip
_METRICS = {
    "acc": "accuracy", "acc_norm": "normalised accuracy", "perplexity": "perplexity",
    "word_perplexity": "perplexity a word", "byte_perplexity": "perplexity a byte", "bits_per_byte": "bits a byte",
    "nll": "nats a token", "kl": "KL from dense, nats a token",
    "top1_agreement": "same next token as dense", "parameters": "parameters",
    "bytes_on_disk": "size on disk", "prefill_tokens_per_second": "reading, tokens a second",
    "decode_tokens_per_second": "writing, tokens a second", "time_to_first_token": "time to the first token",
    "load_seconds": "time to load", "peak_rss_bytes": "peak memory", "peak_cuda_bytes": "peak GPU memory",
    "kv_cache_bytes_per_token": "cache a token",
}  # fmt: skip
_LOWER = ("perplexity", "nll", "kl", "bits_per_byte", "bytes", "seconds", "time_", "parameters")


@dataclass(frozen=True)
class Column:
    """One stage of the model.

    Args:
        role (`str`): `dense`, `cut`, `repaired`, `healed` or `model`.
        weights (`str`): The hash of its weights.
        layers (`int`): How many decoder layers it has.
        parameters (`int`): How many parameters.
        own (`bool`): Whether it is the model that the card is about.
    """

    role: str
    weights: str
    layers: int
    parameters: int
    own: bool


@dataclass(frozen=True)
class Cell:
    """One number of a table, with how far it is from the dense model's.

    Args:
        value (`str`): The number, with its standard error.
        change (`str`): The difference or ratio; empty for the dense model.
        noise (`bool`): Whether a paired test can't tell the difference from chance.
        record (`dict`): What `metrics.json` says.
    """

    value: str
    change: str
    noise: bool
    record: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Row:
    """One metric of one task.

    Args:
        task (`str`): What to call the task; empty for what has none.
        metric (`str`): What to call the metric.
        better (`str`): `↑`, `↓`, or empty.
        samples (`int`, *optional*): On how many questions, tokens or repeats.
        chance (`str`): What guessing gets; empty where that has no meaning.
        cells (`dict[str, Cell]`): By the weights of the column.
        key (`tuple[str, ...]`): `kind`, `task`, `metric`, as in `metrics.json`.
        run (`tuple[tuple[str, int], ...]`): Of a speed, at which batch size and lengths: `RUN` and its numbers.
    """

    task: str
    metric: str
    better: str
    samples: int | None
    chance: str
    cells: dict[str, Cell]
    key: tuple[str, str, str]
    run: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Results:
    """All that was measured, as the card shows it.

    Args:
        columns (`list[Column]`): The stages, in the order in which the model went through them.
        rows (`list[Row]`): All rows.
        metrics (`Metrics`): What they were made of.
    """

    columns: list[Column]
    rows: list[Row]
    metrics: Metrics = field(repr=False)

    @property
    def own(self) -> Column | None:
        """The column of the model that the card is about."""
        return next((column for column in self.columns if column.own), None)

    @property
    def dense(self) -> Column | None:
        """The column of the base."""
        return next((column for column in self.columns if column.role == "dense"), None)

    @property
    def packed(self) -> bool:
        """Whether the dense model was measured as a GGUF file, and this one was not."""
        return _is_packed(self.metrics, self.dense)

    def table(self, kinds: Iterable[str], *, every: bool = False) -> list[Row]:
        """The rows of some kinds. Unless `every`, without those that say again what another one says: plain accuracy
        beside the length-normalised one, nats beside a perplexity, and speeds of other runs than `usual_run`.
        """
        rows = [row for row in self.rows if row.key[0] in tuple(kinds)]
        if every:
            return rows
        told = {(row.key[1], row.key[2], row.samples) for row in rows}
        again = {"acc": "acc_norm", "nll": "perplexity"}
        rows = [row for row in rows if (row.key[1], again.get(row.key[2]), row.samples) not in told]
        return [row for row in rows if row.run in ((), self.usual_run)]

    @property
    def usual_run(self) -> tuple[tuple[str, int], ...]:
        """The run that stands for all: of the smallest batch, and in that with the longest prompt."""
        runs = [row.run for row in self.rows if row.run]
        return max(runs, key=lambda run: (-dict(run).get("batch", 0), dict(run).get("prompt_tokens", 0)), default=())

    def mean_accuracy(self) -> dict[str, tuple[float, float | None]]:
        """Mean and standard error over the tasks that every column has, by weights; empty with less than two tasks."""
        rows = [row for row in self.table(["accuracy"]) if all(one.weights in row.cells for one in self.columns)]
        if len(rows) < 2:
            return {}
        found = {}
        for column in self.columns:
            records = [row.cells[column.weights].record for row in rows]
            errors = [record.get("stderr") for record in records]
            stderr = None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(rows)
            found[column.weights] = (sum(record["value"] for record in records) / len(rows), stderr)
        return found


def results_of(metrics: Metrics | None) -> Results | None:
    """Arrange what was measured.

    Args:
        metrics (`Metrics`, *optional*): The numbers of a folder.

    Returns:
        `Results`, *optional*: `None` where there are no numbers.
    """
    if metrics is None or not metrics.results:
        return None
    columns = list(_columns(metrics))
    dense = next((column for column in columns if column.role == "dense"), None)
    grouped: dict[str, dict[str, dict[str, Any]]] = {}
    for record in metrics.results:
        key = json.dumps(
            [record["kind"], record.get("task"), record["metric"], record.get("settings")], sort_keys=True
        )
        grouped.setdefault(key, {})[record["weights"]] = record
    packed = _is_packed(metrics, dense)
    rows = [_row(by_weights, columns, dense, metrics, packed) for by_weights in grouped.values()]
    order = {kind: index for index, kind in enumerate((*QUALITY, *COST))}
    rows = sorted((row for row in rows if row.cells), key=lambda row: order[row.key[0]])
    return Results(columns, rows, metrics)


def _columns(metrics: Metrics) -> Iterator[Column]:
    measured = {record["weights"] for record in metrics.results}
    for role in ROLES:
        found = [weights for weights, model in metrics.models.items() if model["role"] == role and weights in measured]
        # Of several models of one stage, the folder's own; or else the newest.
        for weights in [metrics.weights] if metrics.weights in found else found[-1:]:
            model = metrics.models[weights]
            own = weights == metrics.weights and role != "dense"
            yield Column(role, weights, model["layers"], model["parameters"], own)


def _is_packed(metrics: Metrics, dense: Column | None) -> bool:
    """Whether the dense model was a GGUF file, and this one is not."""
    names = [
        metrics.models[weights]["name"]
        for weights in (dense.weights if dense else "", metrics.weights)
        if weights in metrics.models
    ]
    return [name.endswith(".gguf") for name in names] == [True, False]


def _row(
    by_weights: dict[str, dict[str, Any]], columns: list[Column], dense: Column | None, metrics: Metrics, packed: bool
) -> Row:
    sample = next(iter(by_weights.values()))
    kind, task, metric = sample["kind"], sample.get("task", ""), sample["metric"]
    base = by_weights.get(dense.weights) if dense else None
    # A packed file and an unpacked one are no measure of each other.
    if packed and metric in OF_THE_FORMAT:
        base = None
    cells = {
        column.weights: _cell(by_weights[column.weights], base, metrics)
        for column in columns
        if column.weights in by_weights
    }
    higher = sample.get("higher_is_better")
    if higher is None:
        higher = not any(part in metric for part in _LOWER)
    chance, settings = sample.get("chance"), sample.get("settings") or {}
    return Row(
        task=_TASKS.get(task, task),
        metric=_METRICS.get(metric, metric.replace("_", " ")),
        better="↑" if higher else "↓",
        samples=sample.get("samples"),
        chance="" if chance is None else numbers.measured(metric, chance, kind),
        cells=cells,
        key=(kind, task, metric),
        run=tuple((name, settings[name]) for name in RUN if isinstance(settings.get(name), int)),
    )


def _cell(record: dict[str, Any], base: dict[str, Any] | None, metrics: Metrics) -> Cell:
    kind, metric, value = record["kind"], record["metric"], record["value"]
    text = numbers.measured(metric, value, kind, record.get("unit"))
    if record.get("stderr"):
        text = numbers.with_error(text, value, record["stderr"], share=numbers.is_share(metric, kind))
    if base is None or base is record:
        return Cell(text, "", False, record)
    paired = comparison(metrics, record, base["weights"])
    if numbers.is_share(metric, kind) and metric != "top1_agreement":
        difference = paired["difference"] if paired else value - base["value"]
        change = numbers.signed(numbers.percent(difference), difference)
        if paired and paired.get("stderr"):
            change += f" ± {numbers.percent(paired['stderr'])}"
    elif kind == "distance" or not base["value"]:
        change = ""
    else:
        change = numbers.ratio(value / base["value"])
    p_value = paired.get("p_value") if paired else None
    return Cell(text, change, p_value is not None and p_value > SIGNIFICANT, record)


def comparison(metrics: Metrics, record: dict[str, Any], base: str) -> dict[str, Any] | None:
    """The paired difference between a number and the base's, if `metrics.json` has one."""
    same = ("weights", "kind", "metric", "task")
    for found in reversed(metrics.comparisons):
        if found["base"] == base and all(found.get(name) == record.get(name) for name in same):
            settings = found.get("settings")
            if settings is None or settings == record.get("settings"):
                return found
    return None
