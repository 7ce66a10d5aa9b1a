"""`docs/options.md`: every option of every command and config, made from their declarations.

python -m tests.options_page --write
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from hf_layerprune.adapter.config import LayerDropConfig
from hf_layerprune.cli import build_parser
from hf_layerprune.heal.options import FinishOptions, HealOptions, RowOptions
from hf_layerprune.options import CutOptions, option_fields
from hf_layerprune.records.requirements import RequireOptions

PAGE = Path(__file__).resolve().parents[1] / "docs" / "options.md"
_HEAD = """<!-- Made by `python -m tests.options_page --write`, which `make docs` runs; don't edit. -->

# Options

All options of the commands, of the healing recipe and of the two configs in Python. [Commands](commands.md) says what the
commands do.
"""


def _cell(text: object) -> str:
    return " ".join(str(text).replace("|", "\\|").split())


def _table(rows: list[tuple[str, str, str]]) -> list[str]:
    lines = ["| option | default | meaning |", "|---|---|---|"]
    return lines + [f"| {name} | {default} | {_cell(meaning)} |" for name, default, meaning in rows]


def _of_command(parser: argparse.ArgumentParser) -> list[tuple[str, str, str]]:
    rows = []
    for action in sorted(parser._actions, key=lambda action: bool(action.option_strings)):
        if isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
        meaning = (action.help or "").replace("%%", "%")
        default = "" if action.default in (None, False, argparse.SUPPRESS, []) else f"`{action.default}`"
        if isinstance(action.default, tuple):
            default = f"`{','.join(map(str, action.default))}`"
        meaning = meaning.removesuffix(f" (default: {default.strip('`')})") if default else meaning
        if action.choices:
            meaning += f": {', '.join(map(str, action.choices))}"
        rows.append((name, default, meaning[:1].upper() + meaning[1:]))
    return rows


def _of_config(cls: type) -> list[tuple[str, str, str]]:
    known = option_fields(cls)
    rows = []
    for field in dataclasses.fields(cls):
        if field.name in known:
            rows.append((f"`{field.name}`", f"`{field.default!r}`", known[field.name].text))
    return rows


def page() -> str:
    """The text of the page."""
    lines = [_HEAD]
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for name, parser in commands.choices.items():
        lines += [f"## `hf-layerprune {name}`", "", _cell(parser.description), "", *_table(_of_command(parser)), ""]
    lines += ["## `LayerDropConfig`", "", "The fields that a user sets, without those of PEFT's `PeftConfig`.", ""]
    lines += [*_table(_of_config(LayerDropConfig)), ""]
    lines += [
        "## `HealConfig`",
        "",
        "Its other fields are those of TRL's `SFTConfig`.",
        "",
        *_table(_of_config(HealOptions)),
        "",
    ]
    lines += [
        "## `recipes/sft_tail.py`",
        "",
        "It takes the options of `HealConfig`, those of TRL for models and data, and these:",
        "",
    ]
    own = (RowOptions, CutOptions, FinishOptions, RequireOptions)
    lines += [*_table([row for cls in own for row in _of_config(cls)]), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/options.md is not up to date: make docs")
