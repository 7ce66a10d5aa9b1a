"""The tables of a card, in Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from markupsafe import Markup

from ...layer_ranges import describe_layers
from ...options import pluralize
from ...records.figures import numbers
from ...records.figures.results import ResultColumn, Results, Row, describe_run
from ...records.history import QUANTIZE, TRAIN, Stage
from ...records.quantized import describe_quantization
from ...records.requirements import Outcome
from .escape import code_span, escape_text, hub_link

_NBSP = "\u00a0"
# The most important settings of a training run.
_TRAINING = {
    "method": "what is trained", "loss": "loss", "kd_direction": "direction of the KL divergence",
    "learning_rate": "learning rate", "lr_scheduler_type": "schedule", "optim": "optimiser",
    "num_train_epochs": "epochs", "max_steps": "steps", "rows_a_step": "rows per step",
    "max_length": "maximum tokens per row", "seed": "seed",
}  # fmt: skip
_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps", "world_size")


def table(header: Sequence[Any], align: str, rows: Sequence[Sequence[Any]]) -> Markup:
    """A Markdown table without empty columns.

    Args:
        header (`Sequence`): The heading of each column.
        align (`str`): `l` or `r` for each column.
        rows (`Sequence[Sequence]`): The cells; whatever is not `Markup` is escaped.

    Returns:
        `Markup`: The table; empty if there are no rows.
    """
    filled = [index for index in range(len(header)) if any(str(row[index]) for row in rows)]
    if not filled:
        return Markup("")
    lines: list[list[str]] = [
        [escape_text(header[index]) for index in filled],
        [{"l": ":---", "r": "---:"}[align[index]] for index in filled],
    ]
    lines += [[escape_text(row[index]) for index in filled] for row in rows]
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def results_table(rows: Sequence[Row], results: Results) -> Markup:
    """One row per number and one column per stage; below each value, its difference from the dense model's."""
    columns = results.columns
    # The values come first, because a phone shows only the first two or three columns without scrolling.
    roles = [
        Markup(f"{escape_text(one.role)}<br><sub>this{_NBSP}model</sub>" if one.own else one.role) for one in columns
    ]
    header = ["", *roles, "chance", "n"]
    lines = []
    several = len({row.run for row in rows if row.run}) > 1
    for row in rows:
        name = f"{escape_text(row.metric)}{_NBSP}{row.better}"
        if several and row.run:
            name += f"<br><sub>{describe_run(row.run)}</sub>"
        if row.task:
            name = f"**{escape_text(row.task)}**{_NBSP}{row.better}<br><sub>{escape_text(row.metric)}</sub>"
        samples = f"{row.samples:,}" if row.samples else ""
        lines.append([Markup(name), *(_cell(row, one) for one in columns), row.chance, samples])
    return table(header, "l" + "r" * (len(columns) + 2), lines)


def _cell(row: Row, column: ResultColumn) -> Markup:
    cell = row.cells.get(column.weights)
    if cell is None:
        return Markup("")
    # Our own numbers, which need no escaping; a line break must not split them.
    value, change = (text.replace(" ", _NBSP) for text in (cell.value, cell.change))
    value = f"**{value}**" if column.own else value
    if not change:
        return Markup(value)
    return Markup(f"{value}<br><sub>{f'*{change}*' if cell.noise else change}</sub>")


def requirements_table(outcomes: Sequence[Outcome]) -> Markup:
    """One row per requirement."""
    rows = []
    for outcome in outcomes:
        values = [
            f"{numbers.format_number(value)}{f' ({where})' if where else ''}" for where, value in outcome.measured
        ]
        verdict = "yes" if outcome.met else Markup("**no**")
        rows.append([code_span(str(outcome.bound)), ", ".join(values) or "not measured", verdict])
    return table(["required", "measured", "met"], "lll", rows)


def data_table(stages: Sequence[Stage]) -> Markup:
    """The data used for choosing layers, repair and training."""
    rows = []
    for stage in stages:
        for one in stage.data:
            name = hub_link(str(one["id"]), "datasets") if one.get("id") else code_span(one.get("name", "unnamed"))
            if one.get("images"):
                name = Markup(f"{name}, with images")
            if one.get("answers"):
                name = Markup(f"{name}, answers {escape_text(str(one['answers']))}")
            pin = one.get("revision") or one.get("sha256")
            rows.append(
                [
                    _purpose(stage),
                    Markup(f"{name} {code_span(str(pin)[:12])}" if pin else name),
                    f"{one['rows']:,}" if one.get("rows") else "",
                    numbers.format_count(one["tokens"]) if one.get("tokens") else "",
                    one.get("license") or "",
                ]
            )
    return table(["used to", "data", "rows", "tokens", "licence"], "llrrl", rows)


def _purpose(stage: Stage) -> str:
    """The purpose for which a stage used its data."""
    if stage.name != "prune":
        return stage.name
    uses = {"selection": "choose layers", "repair": "repair"}
    return " and ".join(words for name, words in uses.items() if stage.entry.get(name)) or stage.name


def training_table(stage: Stage) -> Markup:
    """The most important settings of a training run; the list of settings has all of them."""
    settings = dict(stage.settings)
    each = [settings[name] for name in _STEP if isinstance(settings.get(name), int)]
    if len(each) == len(_STEP):
        settings["rows_a_step"] = prod(each)
    if settings.get("max_steps", -1) not in (None, -1):  # they end training, whatever the number of epochs
        settings.pop("num_train_epochs", None)
    names = _TRAINING | ({"method": "method"} if stage.name == TRAIN else {})
    facts = {words: settings.get(name) for name, words in names.items()}
    rows = [
        [words, code_span(f"{value:.3g}" if isinstance(value, float) else value)]
        for words, value in facts.items()
        if value not in (None, "", [], -1)
    ]
    return table([stage.name, ""], "ll", rows)


def stage_line(stage: Stage) -> Markup:
    """One line about a stage: what was done, how many tensors changed, how long it took."""
    line, entry = f"**{escape_text(stage.name)}**", stage.entry
    if stage.name == "prune":
        line += f": {_describe_cut(stage)}"
    elif stage.name == QUANTIZE:
        line += f": {code_span(describe_quantization(stage.settings.get('quantization_config')))}"
    elif stage.settings.get("method"):
        line += f": {code_span(stage.settings['method'])}"
    if stage.changed:
        line += f"; {pluralize(len(stage.changed), 'tensor')} changed"
    facts, chosen = [], entry.get("selection", {})
    if "seconds" in chosen:
        facts.append(f"{numbers.format_duration(chosen['seconds'])} to choose the layers")
    if entry.get("seconds") is not None:
        facts.append(numbers.format_duration(entry["seconds"]) + " to cut" * bool(facts))
    if "peak_memory_bytes" in entry:
        facts.append(f"{numbers.format_size(entry['peak_memory_bytes'])} of memory")
    if entry.get("date"):
        facts.append(escape_text(str(entry["date"])[:10]))
    return Markup(f"{line}. <sub>{', '.join(facts)}</sub>" if facts else line)


def _describe_cut(stage: Stage) -> str:
    """Which layers a cut dropped, and why; and whether its repair changed nothing."""
    settings, entry = stage.settings, stage.entry
    text = f"{describe_layers(settings.get('drop_layers') or ())} dropped"
    if why := str(entry.get("selection", {}).get("why") or ""):
        text += f" ({escape_text(why.partition(': ')[2] if why.startswith(('layer ', 'layers ')) else why)})"
    elif settings.get("criterion"):
        text += f", chosen by {code_span(settings['criterion'])}"
    if (entry.get("repair") or {}).get("changed_tensors") == []:
        text += f"; its repair, {code_span(entry['repair'].get('method'))}, changed nothing"
    return text
