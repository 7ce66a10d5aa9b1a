"""The page "About this model": the records of the model's repository, as HTML.

The records are the files that its card is made of: `lineage.json` (where the weights come from and what was done to
them), `metrics.json` (what was measured) and the metadata of `README.md`. They are shown, not interpreted: no number
here is computed from anything but one record.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from html import escape
from typing import Any

from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load
from transformers.utils.hub import cached_file

ROLES = ("dense", "cut", "repaired", "healed", "model")
KINDS = {
    "accuracy": "Accuracy",
    "text": "Text",
    "distance": "Distance from the dense model",
    "speed": "Speed",
    "memory": "Memory",
    "size": "Size",
}
COLUMNS = 16  # cells in a row of the layer map: readable on a phone


@dataclass
class Records:
    """What a repository says about its model; each part is empty where the repository has no such file."""

    model: str
    lineage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str) -> Records:
        """Read the records of a folder or a repository on the Hub."""

        def path(name: str) -> str | None:
            return cached_file(model, name, _raise_exceptions_for_missing_entries=False)

        found = {}
        for name in ("lineage", "metrics"):
            if file := path(f"{name}.json"):
                with open(file, encoding="utf-8") as opened:
                    found[name] = json.load(opened)
        readme = path("README.md")
        return cls(model, card=(metadata_load(readme) or {}) if readme else {}, **found)

    @property
    def base(self) -> str | None:
        """What the model was cut from, as its maker named it."""
        named, base = self.card.get("base_model"), self.lineage.get("base", {})
        named = named[0] if isinstance(named, list) and named else named
        return named or base.get("hub_id") or base.get("id")

    def layers(self) -> tuple[int, list[int]] | None:
        """How many layers the base has, and which of them are left, as indices in the base."""
        cuts = [entry for entry in self.lineage.get("entries", []) if entry["station"] == "prune"]
        if not cuts:
            return None
        total = cuts[0]["layers"]["base"]
        left = list(range(total))
        for cut in cuts:  # each one counts the layers that it found
            gone = set(cut["settings"]["drop_layers"])
            left = [layer for position, layer in enumerate(left) if position not in gone]
        return total, left


def page(records: Records) -> str:
    """All there is to know about a model."""
    parts = [layer_map(records), measured(records.metrics), history(records.lineage), sources(records)]
    return f'<div class="about">{"".join(parts)}</div>'


def layer_map(records: Records) -> str:
    """The base's layers, those that are gone drawn as holes."""
    if (layers := records.layers()) is None:
        return "<p>This repository has no <code>lineage.json</code>, so what was dropped is not on record.</p>"
    total, left = layers
    gone = sorted(set(range(total)) - set(left))
    size, gap = 24, 4
    rows = -(-total // COLUMNS)
    cells = []
    for layer in range(total):
        x, y = layer % COLUMNS * (size + gap) + 1, layer // COLUMNS * (size + gap) + 1
        state, what = ("kept", "kept") if layer in left else ("gone", "dropped")
        cells.append(
            f'<g class="{state}"><title>Layer {layer}: {what}</title>'
            f'<rect x="{x}" y="{y}" width="{size}" height="{size}" rx="4"/>'
            f'<text x="{x + size / 2}" y="{y + size / 2}">{layer}</text></g>'
        )
    width, height = min(total, COLUMNS) * (size + gap) - gap + 2, rows * (size + gap) - gap + 2
    words = f"{len(left)} of {total} layers left; dropped: {ranges(gone)}"
    return (
        f"<h2>{len(left)} of {total} layers</h2>"
        f'<svg class="layers" viewBox="0 0 {width} {height}" style="max-width:{width * 1.25:.0f}px" role="img" '
        f'aria-label="{words}">{"".join(cells)}</svg>'
        f"<p>Dropped: layers {ranges(gone)} of {escape(str(records.base or 'the base'))}, counted from 0.</p>"
    )


def measured(metrics: dict[str, Any]) -> str:
    """One table of all results, a column for each model that was measured."""
    if not metrics.get("results"):
        return "<h2>Measured</h2><p>Nothing was measured yet.</p>"
    models = sorted(metrics["models"].items(), key=lambda item: ROLES.index(item[1]["role"]))
    models = [(key, model) for key, model in models if any(r["weights"] == key for r in metrics["results"])]
    rows: dict[tuple, dict[str, dict]] = {}
    for result in metrics["results"]:
        rows.setdefault(_row(result), {})[result["weights"]] = result
    compared = {(_row(one), one["weights"]): one for one in metrics["comparisons"]}

    head = "".join(f'<th scope="col">{escape(model["role"])}<br>{model["layers"]} layers</th>' for _, model in models)
    body = ""
    for kind, title in KINDS.items():
        lines = [(row, found) for row, found in rows.items() if row[0] == kind]
        if lines:
            body += f'<tr><th scope="rowgroup" colspan="{len(models) + 1}">{title}</th></tr>'
        for row, found in lines:
            cells = "".join(f"<td>{_cell(found.get(key), compared.get((row, key)))}</td>" for key, _ in models)
            body += f'<tr><th scope="row">{_label(next(iter(found.values())))}</th>{cells}</tr>'
    results = metrics["results"]
    settings = {name: sorted({str(r[name]) for r in results if name in r}) for name in ("dtype", "device")}
    dates = sorted(r["date"][:10] for r in results)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    where = "; ".join(", ".join(values) for values in settings.values() if values)
    return (
        f'<h2>Measured</h2><div class="scroll"><table><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
        f"<p>± is one standard error; in brackets, the difference from the dense model. {escape(where)}; {when}.</p>"
    )


def history(lineage: dict[str, Any]) -> str:
    """What was done, station by station."""
    if not lineage.get("entries"):
        return ""
    items = []
    for entry in lineage["entries"]:
        settings = ", ".join(
            f"{name.replace('_', ' ')} {_short(value)}"
            for name, value in entry["settings"].items()
            if value not in (None, False, "", [], {})
        )
        seconds = f", {entry['seconds']:,.0f} s" if entry.get("seconds", 0) >= 1 else ""
        items.append(
            f"<li><b>{escape(entry['station'])}</b> <small>{escape(entry['date'][:10])}{seconds}</small>"
            f"<br>{escape(settings)}</li>"
        )
    return f"<h2>How it was made</h2><ol>{''.join(items)}</ol>"


def sources(records: Records) -> str:
    """The licence, and where to read on."""
    base, licence = records.base, records.card.get("license_name") or records.card.get("license")
    lines = [f"Model card: {link(records.model)}"]
    if base:
        commit = records.lineage.get("base", {}).get("commit")
        lines.append(f"Base: {link(base)}" + (f" at <code>{escape(commit[:12])}</code>" if commit else ""))
    lines.append(f"Licence: {escape(str(licence)) if licence else 'the card names none'}")
    return f"<h2>Licence and sources</h2><ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def link(model: str) -> str:
    """A model's name, leading to its page where it has one."""
    name = escape(model)
    if model.count("/") != 1 or model.startswith((".", "~", "/")):
        return name
    return f'<a href="{escape(constants.ENDPOINT)}/{name}" target="_blank" rel="noopener">{name}</a>'


def ranges(layers: list[int]) -> str:
    """Layers in words: 20-26, 29."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"


def bytes_(count: float) -> str:
    """A number of bytes in words."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def _row(record: dict[str, Any]) -> tuple:
    """What results of several models have in common when they answer the same question."""
    return (
        record["kind"],
        record.get("task"),
        record["metric"],
        json.dumps(record.get("settings", {}), sort_keys=True),
    )


def _label(result: dict[str, Any]) -> str:
    words = [result["task"]] if "task" in result else []
    words.append(result["metric"].removesuffix("_bytes").replace("_", " "))
    notes = [f"n = {result['samples']:,}"] if "samples" in result else []
    if result["kind"] == "accuracy" and "chance" in result:
        notes.append(f"chance {100 * result['chance']:.0f} %")
    notes += [f"{name.replace('_', ' ')} {_short(value)}" for name, value in result.get("settings", {}).items()]
    small = f"<br><small>{escape(', '.join(notes))}</small>" if notes else ""
    return f"{escape(', '.join(words))}{small}"


def _cell(result: dict[str, Any] | None, comparison: dict[str, Any] | None) -> str:
    if result is None:
        return ""
    text = _number(result["value"], result) + _error(result)
    if comparison is not None:
        sign = "+" if comparison["difference"] > 0 else "\N{MINUS SIGN}" if comparison["difference"] < 0 else "±"
        difference = _number(abs(comparison["difference"]), result, difference=True)
        text += f"<br><small>({sign}{difference}{_error(comparison)})</small>"
    return text


def _error(record: dict[str, Any]) -> str:
    return f" ± {_number(record['stderr'], record, difference=True)}" if "stderr" in record else ""


def _number(value: float, record: dict[str, Any], difference: bool = False) -> str:
    if record["kind"] == "accuracy":
        return f"{100 * value:.1f}" + ("" if difference else " %")
    if record["metric"].endswith("bytes") or record.get("unit") == "bytes" or "bytes_on" in record["metric"]:
        return bytes_(value)
    text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    unit = record.get("unit", "")
    return text if difference or unit in ("", record["metric"]) else f"{text} {escape(unit)}"


def _short(value: Any) -> str:
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return ranges(sorted(value))
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:79] + "…"
