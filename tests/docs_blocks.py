"""Run every code block of the documentation, page by page, as a reader would type it.

    HF_ENDPOINT=... python -m tests.docs_blocks README.md docs/index.md

Each page runs in a folder of its own, with `./my-model` and `model.gguf` in it. Commands run in this process, since a
process for each line would take minutes. Long commands are shortened by extra options (`SHORT`), `chat`, which serves until
it is stopped, is only parsed, and for `pip`, `make` and scripts, the names of extras, targets and options are checked. A
block below `<!-- not run: REASON -->`, which every `console` block needs, is only parsed. Prints a line of JSON for each
block.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import os
import re
import shlex
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]
ROWS = ["--calibration-samples", "4", "--calibration-length", "32"]
SHORT = {
    "prune": ROWS,
    "rank": ROWS,
    "eval": ["--limit", "2", "--windows", "2", "--length", "32"],
    "bench": "--repeats 1 --load-repeats 0 --new-tokens 2 --batch-sizes 1 --prompt-lengths 8".split(),
}
ON_A_CPU = ["--use_cpu", "true", "--fp16", "false", "--bf16", "false"]
RECIPE = [
    "--max_steps", "2", "--self_rows", "4", "--self_length", "32", "--max_length", "32", "--calibration_samples", "4",
    "--calibration_length", "32", "--report_to", "none", *ON_A_CPU,
]  # fmt: skip


@dataclass
class Block:
    """A fenced block: its page, line number, language and text, and the reason if it is not run."""

    page: str
    line: int
    language: str
    text: str
    reason: str = ""


def blocks(page: Path) -> Iterator[Block]:
    """The Python and shell blocks of a page; those that can't run here follow `<!-- not run: REASON -->`."""
    above = ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        language = token.info.split()[0] if token.type == "fence" and token.info else ""
        if language in ("python", "bash", "console"):
            reason = re.fullmatch(r"<!-- not run: (.+) -->\s*", above, re.S)
            yield Block(
                page.relative_to(ROOT).as_posix(),
                token.map[0] + 1,
                language,
                token.content,
                reason[1] if reason else "",
            )
        above = token.content if token.type == "html_block" else ""


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


def parse_only(block: Block) -> None:
    """Parse a block that is not run; raises if its Python, or a `hf-layerprune` command, does not parse."""
    from hf_layerprune.cli import build_parser

    if block.language == "python":
        compile(block.text, f"{block.page}:{block.line}", "exec")
        return
    for program, *words in commands(block.text):
        if program == "hf-layerprune":
            build_parser().parse_args(words)


def run_command(words: list[str]) -> None:
    """Run one command of a shell block; raises `AssertionError` if it fails."""
    program, *rest = words
    if program == "hf-layerprune":
        _hf_layerprune(rest)
    elif program == "pip" and rest[0] == "install":
        _pip(rest[1:])
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(rest) <= set(targets), f"no make target {rest}"
    elif program == "accelerate" and rest[0] == "launch":
        _recipe(rest[1:])
    elif program == "python":
        _script(rest)
    else:
        raise AssertionError(f"nothing runs {program!r}")


def _hf_layerprune(words: list[str]) -> None:
    from hf_layerprune.cli import build_parser, main

    if words[0] == "chat":
        build_parser().parse_args(words)
        return
    reads_text = words[0] != "prune" or {"--repair", "--from-curve", "auto"} & set(words)
    more = SHORT.get(words[0], []) if reads_text else []
    if {"--tasks", "--tasks-from"} & {*words} and "--text" not in words:
        more = more[:2]  # no windows of texts
    code = main([*words, *more])
    # A random model may miss what a page requires of a real one.
    assert code in ((0, 1) if "--require" in words else (0,)), f"exit code {code}"


def _pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        named = re.fullmatch(r"(?:\.|hf-layerprune)(?:\[([\w,]+)\])?|-e", word)
        assert named, f"pip install {word}"
        assert set((named[1] or "").split(",")) - {""} <= set(extras)


def _script(words: list[str]) -> None:
    """Check that a script or a module exists and names the options that it is given."""
    if words[0] == "-m":
        module = ROOT / words[1].replace(".", "/")
        file = module.with_suffix(".py") if module.with_suffix(".py").is_file() else module / "__main__.py"
    else:
        file = ROOT / words[0]
    assert file.is_file(), f"no {file}"
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert not [option for option in given if f'"{option}"' not in file.read_text(encoding="utf-8")]


def _recipe(words: list[str]) -> None:
    if words[0] == "--config_file":
        assert (ROOT / words[1]).is_file(), f"no file {words[1]}"
        words = words[2:]
    assert words[0] == "recipes/sft_tail.py"
    if words[1:] == ["..."]:
        return
    from tests.heal_makers import load_recipe

    recipe = load_recipe()
    words = [str(ROOT / word) if word.startswith("recipes/") else word for word in words[1:]]
    large = any("configs/paper_" in word for word in words)  # models of 8 billion parameters
    settings = recipe.make_parser().parse_args_and_config([*words, *(ON_A_CPU if large else RECIPE)])
    if not large:
        recipe.main(*settings)


def run_page(page: Path) -> None:
    """Run a page in an empty folder, and print a line for each block."""
    gc.collect()
    gc.freeze()  # training runs collect garbage again and again, among all that was imported before
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, target in json.loads(os.environ.get("DOCS_FILES", "{}")).items():
            Path(name).symlink_to(target)
        names: dict[str, Any] = {"__name__": "__main__"}
        for block in blocks(page):
            said = io.StringIO()
            error, start = None, time.process_time()
            try:
                with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                    if block.reason or block.language == "console":
                        assert block.reason, "say why it is not run: <!-- not run: REASON -->"
                        parse_only(block)
                    elif block.language == "python":
                        exec(compile(block.text, f"{block.page}:{block.line}", "exec"), names)
                    else:
                        for words in commands(block.text):
                            said.write(f"$ {shlex.join(words)}\n")
                            run_command(words)
            except (Exception, SystemExit):
                error = f"{traceback.format_exc()[-1500:]}\n{said.getvalue()[-1500:]}"
            seconds = round(time.process_time() - start, 1)
            print(json.dumps({"page": block.page, "line": block.line, "error": error, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    from tests.gguf_makers import read_once

    read_once()
    for argument in sys.argv[1:]:
        run_page(Path(argument).resolve())
