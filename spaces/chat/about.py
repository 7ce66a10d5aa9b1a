"""What the model's repository says of it: its card, and the records from which that is made.

The records are `lineage.json` (where the weights come from and how they were changed), `metrics.json` (what was measured)
and the metadata of `README.md`, the card.
"""

from __future__ import annotations

import json
import os
import re
from base64 import b64encode
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from huggingface_hub.repocard import REGEX_YAML_BLOCK, metadata_load
from transformers.utils.hub import cached_file

COLUMNS = 16  # the most cells in a row of the layer map, to stay readable on a phone
MAX_LAYERS = 1_000
NO_CARD = "This model has no card yet: `hf-layerprune card MODEL` writes it."
LEFT_OUT = "The card of this model is not shown here: it is too large, or a link out of the model's folder."
MAX_SHOWN = 4 << 20  # of a card with its pictures, which every visitor loads
# The start of any HTML but comments, links in brackets and the tags of our own cards, which have no attributes.
MARKUP = re.compile(r"<(?!/?(?:br|details|sub|summary)>|!--[^<>]*-->|https?://[^\s<>]+>)(?=[A-Za-z/!?])")
MAX_BYTES = 32 << 20  # of a file of records
MAX_VALUES = 1_000_000  # in the metadata of a card, whose YAML can repeat a value very often


@dataclass
class Records:
    """The records of a model, each empty if the repository has no such file, and what to show of its card as `text`."""

    model: str
    lineage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    text: str = ""

    @classmethod
    def load(cls, model: str) -> Records:
        """Read the records of a folder or a repository on the Hub.

        Raises:
            ValueError: They are too large, or can't be shown.
        """
        records: dict[str, Any] = {}
        for name in ("lineage.json", "metrics.json", "README.md"):
            if (file := find_file(model, name)) is None:
                continue
            try:
                if os.path.getsize(file) > MAX_BYTES:
                    raise ValueError(f"it is larger than {format_bytes(MAX_BYTES)}")
                if name == "README.md":
                    records["card"] = metadata_load(file) or {}
                    check_size(records["card"])
                    text = REGEX_YAML_BLOCK.sub("", Path(file).read_text(encoding="utf-8-sig"), count=1)
                    safe = len(text) <= MAX_SHOWN and is_inside(model, file)
                    records["text"] = render_card(model, text) if safe else LEFT_OUT
                else:
                    records[name.removesuffix(".json")] = json.loads(Path(file).read_bytes())
            except Exception as error:  # dates, numbers and tags of YAML raise any
                raise ValueError(f"its {name} is damaged ({' '.join(str(error).split())})") from error
        found = cls(model, **records)
        at = "" if os.path.isdir(model) else f"[{model}](https://huggingface.co/{model})\n\n"
        found.text = at + (found.text or NO_CARD)
        try:  # now, so that no part of the page can fail later
            layer_map_html(found), found.name
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
        published = self.lineage.get("published", {})
        on_hub = str(published.get("repo_id", "")).rpartition("/")[2]
        return str(on_hub or published.get("name") or f"{base}-{len(layers[1])}L")

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
        if not 0 < total <= MAX_LAYERS:
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
        if (count := count + len(inside)) > MAX_VALUES:
            raise ValueError(f"it has more than {MAX_VALUES:,} values")
        level += inside


def find_file(model: str, name: str) -> str | None:
    """The path of a file of a folder or a repository on the Hub; `None` if there is none."""
    return cached_file(model, name, _raise_exceptions_for_missing_entries=False)


def render_card(model: str, text: str) -> str:
    """The text of a model's card with its pictures put into it.

    Nothing else is loaded or placed by it: other pictures are links, and HTML, formulas and diagrams are shown as text.
    """
    room = MAX_SHOWN - len(text)

    def picture(found: re.Match[str]) -> str:
        nonlocal room
        file = found[2] and find_file(model, found[2])
        if not file or not is_inside(model, file) or (room := room - os.path.getsize(file)) < 0:
            return found[1] or ""
        return f"![{found[1]}](data:image/png;base64,{b64encode(Path(file).read_bytes()).decode()})"

    text = MARKUP.sub("&lt;", text).replace("```mermaid", "``` mermaid")
    text = re.sub(r"\[([\w.-]+)\]\(\1\)", r"\1", text)  # files of the model, which the page has no address of
    return re.sub(r"!\[([^][]*)\]\((assets/\w+\.png)\)|!(?=\[)", picture, text)


def is_inside(model: str, file: str) -> bool:
    """Whether a file lies in its folder. The page would show the target of a link out of it to every visitor."""
    real = Path(file).resolve()
    return not os.path.isdir(model) or Path(model).resolve() in real.parents or real.match("models--*/blobs/*")


def layer_map_html(records: Records) -> str:
    """A small layer map for an empty chat, with the dropped layers as holes; empty if the layers are unknown."""
    if (layers := records.layers()) is None:
        return ""
    total, left = layers
    dropped = [layer for layer in range(total) if layer not in left]
    rows = -(-total // COLUMNS)
    columns = -(-total // rows)
    # Not an SVG: Gradio's chatbot removes the attributes that scale it.
    cells = [f'<span class="{"gone" if layer in dropped else "kept"}"></span>' for layer in range(total)]
    tiles = "".join(f"<div>{''.join(cells[row * columns : (row + 1) * columns])}</div>" for row in range(rows))
    base = escape(str(records.base or "the base").rsplit("/", 1)[-1])
    text = f"{base} without {'layer' if len(dropped) == 1 else 'layers'} {format_ranges(dropped)}"
    return f'<div class="glance">{tiles}<p>{text}</p></div>'


def format_bytes(count: float) -> str:
    """A number of bytes with a unit."""
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"


def format_ranges(layers: list[int]) -> str:
    """Layers as ranges, such as `20-26, 29`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs) or "none"
