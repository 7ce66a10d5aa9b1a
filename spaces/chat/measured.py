"""The table of what was measured: `metrics.json`, in the words and figures of the model's card."""

from __future__ import annotations

import json
from html import escape
from typing import Any

import figures

ROLES = ("dense", "cut", "repaired", "healed", "model")
# What a model is worth, and what it takes.
KINDS = (("accuracy", "text", "distance"), ("size", "speed", "memory"))
# Settings of a run that is timed, and how they are told.
RUN = {"batch": "a batch of {}", "prompt_tokens": "a prompt of {} tokens", "new_tokens": "{} new ones"}
# One of two numbers that say the same is enough.
AGAIN = {"acc": "acc_norm", "nll": "perplexity"}
LOWER = ("perplexity", "nll", "kl", "bits_per_byte", "bytes", "seconds", "time_", "parameters")
NOISE = 0.05
TASKS = {
    "piqa": "PIQA", "hellaswag": "HellaSwag", "openbookqa": "OpenBookQA", "openbook_qa": "OpenBookQA",
    "arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "mmlu": "MMLU", "cmmlu": "CMMLU",
    "winogrande": "WinoGrande", "wikitext": "WikiText-2", "lambada_openai": "LAMBADA", "boolq": "BoolQ",
    "gsm8k": "GSM8K",
}  # fmt: skip
METRICS = {
    "acc": "accuracy", "acc_norm": "normalised accuracy", "perplexity": "perplexity",
    "word_perplexity": "perplexity a word", "byte_perplexity": "perplexity a byte", "bits_per_byte": "bits a byte",
    "nll": "nats a token", "kl": "KL from dense, nats a token",
    "top1_agreement": "same next token as dense", "parameters": "parameters",
    "bytes_on_disk": "size on disk", "prefill_tokens_per_second": "reading, tokens a second",
    "decode_tokens_per_second": "writing, tokens a second", "time_to_first_token": "time to the first token",
    "load_seconds": "time to load", "peak_rss_bytes": "peak memory", "peak_cuda_bytes": "peak GPU memory",
    "kv_cache_bytes_per_token": "cache a token",
}  # fmt: skip

Record = dict[str, Any]


def table(metrics: Record) -> str:
    """What was measured: a column for each model, and below each number how far it is from the dense model's.

    Args:
        metrics (`dict`): What `metrics.json` says.

    Returns:
        `str`: HTML.
    """
    results, models = metrics["results"], columns(metrics)
    rows: dict[str, dict[str, Record]] = {}
    for result in results:
        key = json.dumps(
            [result["kind"], result.get("task"), result["metric"], result.get("settings")], sort_keys=True
        )
        rows.setdefault(key, {})[result["weights"]] = result
    shown = [row for row in rows.values() if worth_telling(row, results) and row.keys() & models.keys()]
    dense = next((weights for weights, model in models.items() if model["role"] == "dense"), None)
    compared = {_same(one): one for one in metrics.get("comparisons", ()) if one["base"] == dense}

    heads = [f"{escape(model['role'])}<br><small>{model['layers']} layers</small>" for model in models.values()]
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body, noise = "", False
    for kinds in KINDS:
        group = [row for kind in kinds for row in shown if next(iter(row.values()))["kind"] == kind]
        for number, row in enumerate(group):
            first = ' class="first"' if body and number == 0 else ""
            body += f'<tr{first}><th scope="row">{label(next(iter(row.values())))}</th>'
            for weights in models:
                text, unsure = cell(row.get(weights), row.get(dense), compared)
                noise |= unsure
                body += f"<td>{text}</td>"
            body += "</tr>"
    return (
        f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<p>{legend(results, shown, noise)}</p>"
    )


def columns(metrics: Record) -> dict[str, Record]:
    """The models that were measured, in the order in which they were made: of each role the card's own, or the last."""
    measured = {result["weights"] for result in metrics["results"]}
    found: dict[str, str] = {}
    for weights, model in metrics["models"].items():
        if weights in measured and found.get(model["role"]) != metrics["weights"]:
            found[model["role"]] = weights
    return {found[role]: metrics["models"][found[role]] for role in ROLES if role in found}


def worth_telling(row: dict[str, Record], results: list[Record]) -> bool:
    """Whether a row says what no other one says."""
    sample = next(iter(row.values()))
    instead = AGAIN.get(sample["metric"])
    alike = [one for one in results if all(one.get(name) == sample.get(name) for name in ("task", "samples"))]
    if any(one["metric"] == instead for one in alike):
        return False
    return run_of(sample) in ((), usual_run(results))


def run_of(record: Record) -> tuple[tuple[str, int], ...]:
    """At which batch size and lengths a speed was measured."""
    settings = record.get("settings") or {}
    return tuple((name, settings[name]) for name in RUN if isinstance(settings.get(name), int))


def usual_run(results: list[Record]) -> tuple[tuple[str, int], ...]:
    """The run that stands for all: of the smallest batch, and in that with the longest prompt."""
    runs = [run_of(result) for result in results if run_of(result)]
    return max(runs, key=lambda run: (-dict(run).get("batch", 0), dict(run).get("prompt_tokens", 0)), default=())


def label(record: Record) -> str:
    """What a row is about."""
    metric, task = record["metric"], record.get("task", "")
    higher = record.get("higher_is_better")
    higher = not any(part in metric for part in LOWER) if higher is None else higher
    notes = [f"n = {record['samples']:,}"] if "samples" in record else []
    if "chance" in record:
        notes.append(f"chance {figures.percent(record['chance'])}")
    name = METRICS.get(metric, metric.replace("_", " "))
    first, rest = (TASKS.get(task, task), [name, *notes]) if task else (name, notes)
    return f"{escape(first)}\N{NO-BREAK SPACE}{'↑' if higher else '↓'}<br><small>{escape(', '.join(rest))}</small>"


def cell(record: Record | None, base: Record | None, compared: dict[tuple, Record]) -> tuple[str, bool]:
    """A number, with its difference from the dense model's, and whether that is noise."""
    if record is None:
        return "", False
    kind, metric, value = record["kind"], record["metric"], record["value"]
    share = figures.is_share(metric, kind)
    text = figures.measured(metric, value, kind, record.get("unit"))
    if record.get("stderr"):
        text = figures.with_error(text, value, record["stderr"], share=share)
    pair = compared.get(_same(record), {})
    unsure = pair.get("p_value") is not None and pair["p_value"] > NOISE
    change = ""
    if base is not None and base is not record:
        if share and metric != "top1_agreement":
            difference = pair.get("difference", value - base["value"])
            change = figures.signed(figures.percent(difference), difference)
            change += f" ± {figures.percent(pair['stderr'])}" if pair.get("stderr") else ""
        elif kind != "distance" and base["value"]:
            change = figures.ratio(value / base["value"])
    small = f"<br><small>{'<em>' if unsure else ''}{change}{'</em>' if unsure else ''}</small>" if change else ""
    return text + small, unsure and bool(change)


def legend(results: list[Record], shown: list[dict[str, Record]], noise: bool) -> str:
    """How to read the table, and how its numbers came about."""
    words = ["Small below a value: its difference from the dense model, or how many times as much it is."]
    words.append("± is a standard error.")
    if noise:
        words.append("<em>In italics</em>: not to be told from noise (p &gt; 0.05).")
    if run := usual_run(results):
        told = ", ".join(RUN[name].format(f"{number:,}") for name, number in run)
        words.append(f"Speeds are medians of n runs: {told}.")
    records = [record for row in shown for record in row.values()]
    where = [" and ".join(sorted({str(one[name]) for one in records if name in one})) for name in ("dtype", "device")]
    dates = sorted(str(record["date"])[:10] for record in records)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    return " ".join([*words, escape(f"Measured in {where[0]} on {where[1]}, {when}.")])


def _same(record: Record) -> tuple:
    """What a result and its comparison have in common."""
    settings = json.dumps(record.get("settings") or {}, sort_keys=True)
    return record["weights"], record["kind"], record.get("task"), record["metric"], settings
