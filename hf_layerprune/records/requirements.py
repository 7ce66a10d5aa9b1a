"""Requirements: bounds on measured numbers that a model must meet, such as `perplexity_ratio<=1.2,piqa>=0.6`.

    bounds = parse_bounds("perplexity_ratio<=1.2,top1_agreement>=0.8")
    for outcome in check_bounds(bounds, metrics):
        print(outcome.met, outcome.text)

A bound names a metric of `metrics.json` (every text or workload that it was measured on must meet the bound), a task or a
text (its main metric, the one that a card shows), or one of both as `TASK:METRIC`. With the suffix `_ratio`, it is about
the model's number divided by the dense model's. This module does not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import TYPE_CHECKING, Any

from ..errors import CutError
from ..options import Kind, Options, option
from .figures.metric_names import METRICS, SHARE

if TYPE_CHECKING:
    from .metrics import Metrics

_BOUND = re.compile(r"\s*([^\s<>=,]{1,200})\s*(<=|>=|<|>)\s*(-?[\d.]{1,40}(?:[eE][+-]?\d{1,2})?)\s*")
_EXAMPLE = "perplexity_ratio<=1.2,top1_agreement>=0.8,piqa>=0.6"
_RATIO = "_ratio"
_MAX_BOUNDS = 100
# A task's main metric is the first of these that it has, as on a card.
_MAIN_METRICS = ("acc_norm", "acc", "exact_match", "f1", "perplexity", "word_perplexity")
# Timed runs of different sizes are different numbers; of other settings, the newest number counts.
_RUN_SETTINGS = ("batch", "prompt_tokens", "new_tokens")
_OF_TASKS = ("acc_norm", "acc", "exact_match", "f1", "word_perplexity", "byte_perplexity", "bits_per_byte")
_OF_TEXTS, _FROM_BASE = ("perplexity", "nll"), ("kl", "top1_agreement")


@dataclass(frozen=True)
class Bound:
    """A bound on a measured number: a metric, a task, a text or `TASK:METRIC`, each with or without `_ratio`."""

    name: str
    operator: str
    limit: float

    def __str__(self) -> str:
        return f"{self.name}{self.operator}{repr(self.limit).removesuffix('.0')}"

    @property
    def plain(self) -> str:
        """The name without `_ratio`."""
        return self.name.removesuffix(_RATIO)

    @property
    def is_ratio(self) -> bool:
        """Whether it is about the ratio to the dense model."""
        return self.name.endswith(_RATIO)

    def is_met_by(self, value: float) -> bool:
        """Whether a number meets it."""
        return {"<=": le, ">=": ge, "<": lt, ">": gt}[self.operator](value, self.limit)


@dataclass(frozen=True)
class Outcome:
    """A bound, and the numbers that it applies to, each with what it was measured on, if anything."""

    bound: Bound
    measured: tuple[tuple[str, float], ...]

    @property
    def met(self) -> bool:
        """Whether it was measured, and every number meets it."""
        return bool(self.measured) and all(self.bound.is_met_by(value) for _, value in self.measured)

    @property
    def record(self) -> dict[str, Any]:
        """Its record in `metrics.json`."""
        measured = [{"value": value} | ({"on": where} if where else {}) for where, value in self.measured]
        return {"require": str(self.bound), "met": self.met, "measured": measured}

    @property
    def text(self) -> str:
        """One line on the outcome; for what was not measured, with what to run."""
        if not self.measured:
            return f"{self.bound} is required, but not measured; {how_to_measure(self.bound)}"
        missed = [one for one in self.measured if not self.bound.is_met_by(one[1])]
        values = ", ".join(f"{value:.4g}{f' ({where})' if where else ''}" for where, value in missed or self.measured)
        return f"{self.bound} is {'missed' if missed else 'met'}: {values}"


def parse_bounds(text: str) -> tuple[Bound, ...]:
    """Parse bounds that are separated by commas; `none` stands for no bounds.

    Raises:
        ValueError: A bound is malformed, or its limit is out of range.
    """
    return () if text.strip() == "none" else tuple(_parse(part, text) for part in text.split(",", _MAX_BOUNDS))


def _parse(text: str, all_bounds: str) -> Bound:
    try:
        name, operator, word = _BOUND.fullmatch(text).groups()  # type: ignore[union-attr]
        limit = float(word)
    except (AttributeError, ValueError):
        wrong = "" if text == all_bounds else f"; {text.strip()[:60]!r} is none"
        raise ValueError(f"must be bounds such as {_EXAMPLE}, separated by commas{wrong}") from None
    metric = METRICS.get(name.rpartition(":")[2])
    # Some tasks' F1 goes up to 100, as SQuAD v2's does.
    if metric is not None and metric.unit == SHARE and metric is not METRICS["f1"] and not 0 <= limit <= 1:
        raise ValueError(f"has the limit {word}, but {name} is a share from 0 to 1; write 0.8 for 80 %")
    return Bound(name, operator, limit)


def _check(value: Any) -> tuple[Bound, ...]:
    if isinstance(value, str):
        return parse_bounds(value)
    if not isinstance(value, tuple | list) or not all(isinstance(one, Bound) for one in value):
        raise ValueError(f"must be bounds such as {_EXAMPLE}")
    return tuple(value)


REQUIREMENTS = Kind(parse_bounds, _check, "BOUNDS")


@dataclass(kw_only=True)
class RequireOptions(Options):
    """What a model must reach."""

    require: tuple[Bound, ...] | None = option(
        None,
        f"Bounds that the numbers must meet, such as {_EXAMPLE}, on metrics, tasks, or their ratio to the dense model's; "
        "in eval, none clears bounds recorded before",
        REQUIREMENTS,
    )


def check_bounds(bounds: Iterable[Bound], metrics: Metrics) -> list[Outcome]:
    """Check each bound against the newest numbers of a model."""
    return [Outcome(bound, tuple(_measured_values(bound, metrics))) for bound in bounds]


def _measured_values(bound: Bound, metrics: Metrics) -> list[tuple[str, float]]:
    """What a bound is about, and its numbers."""
    own = [one for one in metrics.results if one["weights"] == metrics.weights]
    task, _, metric = bound.plain.rpartition(":")
    records = [one for one in own if one["metric"] == metric and (not task or one.get("task") == task)]
    if not records:
        of_task = [one for one in own if one.get("task") == bound.plain]
        present = {one["metric"] for one in of_task}
        main = next((name for name in _MAIN_METRICS if name in present), None)
        records = [one for one in of_task if one["metric"] == main]
    values: dict[str, float] = {}
    for record in records:
        run = [f"{name} {record['settings'][name]}" for name in _RUN_SETTINGS if name in record.get("settings", {})]
        where = record["task"] if "task" in record and record["task"] not in (task, bound.plain) else ", ".join(run)
        value = _ratio_to_dense(record, metrics) if bound.is_ratio else record["value"]
        if value is not None:
            values[where] = value
    return list(values.items())


def _ratio_to_dense(record: dict[str, Any], metrics: Metrics) -> float | None:
    """A number divided by the dense model's, as it was recorded with it."""
    same = ("weights", "kind", "metric", "task", "settings")
    for paired in reversed(metrics.comparisons):
        dense = metrics.models.get(paired["base"], {}).get("role") == "dense"
        if dense and all(paired.get(name) == record.get(name) for name in same):
            return paired.get("share")
    return None


def check_measurable(
    bounds: Iterable[Bound],
    metrics: Metrics,
    *,
    tasks: Sequence[str] = (),
    texts: Sequence[str] = (),
    base: bool = False,
) -> None:
    """Refuse bounds on what was not measured and what a run, on these tasks and texts, will not measure either.

    Raises:
        CutError: A name is unknown, or neither this run nor an earlier one measures it.
    """
    of_text = {*_OF_TEXTS, *(_FROM_BASE if base else ())}
    measured = {*(_OF_TASKS if tasks else ()), *(of_text if texts else ())}
    for outcome in check_bounds(bounds, metrics):
        bound = outcome.bound
        task, _, metric = bound.plain.rpartition(":")
        here = bound.plain in (*tasks, *texts, *measured) or (task in texts and metric in of_text)
        here = here or task in tasks  # which may have metrics of their own
        if outcome.measured or (here and (base or not bound.is_ratio)):
            continue
        if not here and not task and metric not in METRICS:
            known = [*tasks, *texts, *(one["task"] for one in metrics.results if "task" in one), *METRICS]
            raise CutError(
                f"{bound} is required, but {bound.plain!r} is neither a metric nor a task or text that is measured; known "
                f"are {', '.join(dict.fromkeys(known))}"
            )
        raise CutError(outcome.text)


def how_to_measure(bound: Bound) -> str:
    """The command that measures what a bound is about."""
    task, _, metric = bound.plain.rpartition(":")
    base = " --base BASE" if bound.is_ratio or metric in _FROM_BASE else ""
    if metric in (*_OF_TEXTS, *_FROM_BASE):
        return f"run hf-layerprune eval MODEL{base} --text {task or 'TEXT'}"
    if metric in METRICS and metric not in _OF_TASKS:
        return f"run hf-layerprune bench MODEL{base}"
    return f"run hf-layerprune eval MODEL{base} --tasks {task or (metric if metric not in METRICS else 'TASKS')}"
