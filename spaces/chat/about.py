"""The page "About this model": the records in the model's repository, as HTML.

The records are the files that its card is made from: `lineage.json` (where the weights come from and how they were
changed), `metrics.json` (what was measured) and the metadata of `README.md`. Numbers are formatted as on the card.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from huggingface_hub import constants
from huggingface_hub.repocard import metadata_load
from transformers.utils.hub import cached_file

try:  # in a published Space: a copy that `push --space` adds
    from figures import results, stages
except ImportError:  # in a checkout or an installed package
    from hf_layerprune.records.figures import results, stages

bytes_ = results.numbers.size  # a number of bytes with a unit
COLUMNS = 16  # the most cells in a row of the layer map, to stay readable on a phone
MOST_LAYERS = 1_000
MOST_BYTES = 32 << 20  # of a file of records
MOST_VALUES = 1_000_000  # in the metadata of a card, whose YAML can repeat a value very often


@dataclass
class Records:
    """The records of a model; each part is empty if the repository has no such file."""

    model: str
    lineage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str) -> Records:
        """Read the records of a folder or a repository on the Hub.

        Raises:
            ValueError: They are too large, or can't be shown.
        """
        records = {}
        for name in ("lineage.json", "metrics.json", "README.md"):
            if (file := cached_file(model, name, _raise_exceptions_for_missing_entries=False)) is None:
                continue
            try:
                if os.path.getsize(file) > MOST_BYTES:
                    raise ValueError(f"it is larger than {bytes_(MOST_BYTES)}")
                if name == "README.md":
                    records["card"] = metadata_load(file) or {}
                    check_size(records["card"])
                else:
                    records[name.removesuffix(".json")] = json.loads(Path(file).read_bytes())
            except Exception as error:  # dates, numbers and tags of YAML raise any
                raise ValueError(f"its {name} is damaged ({' '.join(str(error).split())})") from error
        found = cls(model, **records)
        try:  # now, so that no part of the page can fail later
            page(found), at_a_glance(found), found.name
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError("its lineage.json or the metadata of its README.md is damaged") from error
        return found

    @property
    def name(self) -> str:
        """The model's name: on the Hub its own; for a folder the one that its card has."""
        folder = self.model.rstrip("/").rsplit("/", 1)[-1]
        layers = self.layers()
        if not os.path.isdir(self.model) or layers is None:
            return folder
        base = re.sub(r"\.gguf$", "", str(self.base or folder), flags=re.IGNORECASE).rstrip("/").rsplit("/", 1)[-1]
        return str(self.lineage.get("published", {}).get("name") or f"{base}-{len(layers[1])}L")

    @property
    def base(self) -> str | None:
        """The model's base, as its maker named it."""
        named, base = self.card.get("base_model"), self.lineage.get("base", {})
        named = named[0] if isinstance(named, list) and named else named
        return named or base.get("hub_id") or base.get("id")

    def layers(self) -> tuple[int, list[int]] | None:
        """The number of layers in the base, and the indices of those that remain."""
        cuts = [entry for entry in self.lineage.get("entries", []) if entry["stage"] == "prune"]
        if not cuts:
            return None
        total = cuts[0]["layers"]["base"]
        if not 0 < total <= MOST_LAYERS:
            raise ValueError(f"a model has no {total} layers")
        left = list(range(total))
        for cut in cuts:  # each cut counts the layers that were left before it
            gone = set(cut["settings"]["drop_layers"])
            left = [layer for position, layer in enumerate(left) if position not in gone]
        return total, left


def check_size(card: dict[str, Any]) -> None:
    """Refuse the metadata of a card if it holds too many values, each counted as often as it appears."""
    level, count = [card], 0
    while level:
        value = level.pop()
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        inside = inside if isinstance(inside, list | tuple) else ()  # YAML makes tuples of `!!pairs`
        if (count := count + len(inside)) > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES:,} values")
        level += inside


def page(records: Records) -> str:
    """The whole page as HTML."""
    parts = [layer_map(records), measured(records.metrics), history(records.lineage), sources(records)]
    return f'<div class="about">{"".join(parts)}</div>'


def layer_map(records: Records) -> str:
    """A map of the base's layers, with the dropped ones drawn as holes."""
    if (layers := records.layers()) is None:
        return "<p>This repository has no <code>lineage.json</code>, so the dropped layers are unknown.</p>"
    total, left = layers
    gone, remain = dropped(layers), f"{len(left)} of {total} layers"
    return (
        f'<h2>{remain}</h2><div class="layers" role="img" aria-label="{remain} remain; dropped: {gone}">'
        f"{tiles(layers, numbered=True)}</div>"
        f"<p>Dropped: {word(total - len(left))} {gone} of {escape(str(records.base or 'the base'))}, counted from 0.</p>"
    )


def at_a_glance(records: Records) -> str:
    """A small layer map for an empty chat; empty if the layers are unknown."""
    if (layers := records.layers()) is None:
        return ""
    total, left = layers
    base = escape(str(records.base or "the base").rsplit("/", 1)[-1])
    gone = f"{word(total - len(left))} {dropped(layers)}"
    return f'<div class="layers glance">{tiles(layers)}<p>{base} without {gone}</p></div>'


def tiles(layers: tuple[int, list[int]], *, numbered: bool = False) -> str:
    """A tile for each layer of the base. Not an SVG: Gradio's chatbot removes the attributes that scale it."""
    total, left = layers
    rows = -(-total // COLUMNS)
    columns = -(-total // rows)
    cells = []
    for layer in range(total):
        state, what = ("kept", "kept") if layer in left else ("gone", "dropped")
        title = f' title="Layer {layer}: {what}"' if numbered else ""
        cells.append(f'<span class="{state}"{title}>{layer if numbered else ""}</span>')
    return "".join(f"<div>{''.join(cells[row * columns : (row + 1) * columns])}</div>" for row in range(rows))


def dropped(layers: tuple[int, list[int]]) -> str:
    """The layers that a model lacks, as ranges."""
    total, left = layers
    return ranges(sorted(set(range(total)) - set(left)))


def measured(metrics: dict[str, Any]) -> str:
    """A table of all results, with a column for each measured model."""
    try:
        if not metrics.get("results"):
            return "<h2>Measured</h2><p>Nothing has been measured yet.</p>"
        return f"<h2>Measured</h2>{table(metrics)}"
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # it doesn't follow its schema
        return "<h2>Measured</h2><p>The <code>metrics.json</code> of this repository is damaged.</p>"


def table(metrics: dict[str, Any]) -> str:
    """The numbers of a `metrics.json`: a column for each model; below each, its difference from the dense model's."""
    arranged = results.results_of(SimpleNamespace(**metrics))
    heads = [f"{escape(one.role)}<br><small>{one.layers:d} layers</small>" for one in arranged.columns]
    head = "".join(f'<th scope="col">{one}</th>' for one in heads)
    body, noise = "", False
    for kinds in (results.QUALITY, results.COST):
        for number, row in enumerate(arranged.table(kinds)):
            first = ' class="first"' if body and number == 0 else ""
            cells = [row.cells.get(column.weights) for column in arranged.columns]
            noise |= any(cell.noise for cell in cells if cell)
            body += f'<tr{first}><th scope="row">{_label(row)}</th>'
            body += "".join(f"<td>{_shown(cell) if cell else ''}</td>" for cell in cells) + "</tr>"
    return (
        f'<div class="scroll"><table><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"<p>{_legend(arranged, noise)}</p>"
    )


def _label(row: results.Row) -> str:
    """The label of a row: task, metric, number of samples, chance."""
    notes = [f"n = {row.samples:,}"] if row.samples else []
    notes += [f"chance {row.chance}"] if row.chance else []
    first, rest = (row.task, [row.metric, *notes]) if row.task else (row.metric, notes)
    return f"{escape(first)}\N{NO-BREAK SPACE}{row.better}<br><small>{escape(', '.join(rest))}</small>"


def _shown(cell: results.Cell) -> str:
    """A number, with its difference from the dense model's."""
    if not cell.change:
        return cell.value
    return f"{cell.value}<br><small>{f'<em>{cell.change}</em>' if cell.noise else cell.change}</small>"


def _legend(arranged: results.Results, noise: bool) -> str:
    """The legend: how to read the table, and how its numbers were measured."""
    words = ["The small figure below a value is its difference from the dense model, or its ratio to it."]
    words.append("± is a standard error.")
    if noise:
        words.append("Differences <em>in italics</em> are indistinguishable from noise (paired test, p &gt; 0.05).")
    if arranged.usual_run:
        words.append(f"Speeds are medians of n runs: {results.run_words(arranged.usual_run)}.")
    return " ".join([*words, escape(f"Measured {', '.join(results.measured_with(arranged))}.")])


def history(lineage: dict[str, Any]) -> str:
    """The stages in which the model was made."""
    if not lineage.get("entries"):
        return ""
    items = []
    for entry in lineage["entries"]:
        seconds = f", {results.numbers.seconds(entry['seconds'])}" if entry.get("seconds", 0) >= 1 else ""
        items.append(
            f"<li><b>{escape(entry['stage'])}</b> <small>{escape(entry['date'][:10])}{seconds}</small>"
            f"<br>{escape(told(entry))}</li>"
        )
    return f"<h2>How it was made</h2><ol>{''.join(items)}</ol>"


def told(entry: dict[str, Any]) -> str:
    """What a stage did, in the words of the card."""
    settings = entry["settings"]
    if entry["stage"] != "prune":
        text = "; ".join(f"{words}: {value}" for words, value in stages.training_settings(settings).items())
        return f"{text[:1].upper()}{text[1:]}." if text else ""
    drop = sorted(settings["drop_layers"])
    said = [f"{word(len(drop)).capitalize()} {ranges(drop)} dropped"]
    if settings.get("criterion"):
        said.append(f"chosen by {settings['criterion']}")
    if settings.get("repair"):
        said.append(f"repaired by {settings['repair']}")
    return f"{', '.join(said)}."


def sources(records: Records) -> str:
    """The licence, and links to the model and its base."""
    base, licence = records.base, records.card.get("license_name") or records.card.get("license")
    lines = [f"Model card: {link(records.model)}"]
    if base:
        commit = records.lineage.get("base", {}).get("commit")
        lines.append(f"Base: {link(base)}" + (f" at <code>{escape(commit[:12])}</code>" if commit else ""))
    lines.append(f"Licence: {escape(str(licence)) if licence else 'the card names none'}")
    return f"<h2>Licence and sources</h2><ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def link(model: str) -> str:
    """A model's name, linked to its page if it is on the Hub."""
    name = escape(model)
    if model.count("/") != 1 or model.startswith((".", "~", "/")):
        return name
    return f'<a href="{escape(constants.ENDPOINT)}/{name}" target="_blank" rel="noopener">{name}</a>'


def word(count: int) -> str:
    """`layer` for one layer, `layers` for several."""
    return "layer" if count == 1 else "layers"


def ranges(layers: list[int]) -> str:
    """Layers as ranges, such as `20-26, 29`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"
