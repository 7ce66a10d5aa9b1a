"""Write docs/gpu.md: the text between the marks is generated from the results, the rest is written by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import expected
from .steps import ROOT

PAGE = ROOT / "docs" / "gpu.md"
RESULTS, EXPECTED = "results", "expected"
NOT_RUN = (
    "Not run on a GPU yet. Every part has passed a dry run on a CPU (`--tiny`), and the tests of part a pass on an emulated "
    "card (`make emulated-gpu`)."
)

Found = dict[str, dict[str, Any]]


def write(results: Path, page: Path) -> None:
    """Replace the text between the marks of a page.

    Args:
        results (`Path`): The folder of results.
        page (`Path`): The page; if it does not exist, it is made from docs/gpu.md.
    """
    found = read(results)
    text = (page if page.exists() else PAGE).read_text(encoding="utf-8")
    text = replace_between(text, RESULTS, tables(found))
    ours = found.get("b-ours", {}).get("result") if not any(one["tiny"] for one in found.values()) else None
    speed = (ours["fraction_of_peak"], ours["limits"]["flops"]) if ours else ()
    page.write_text(replace_between(text, EXPECTED, expected.table(*speed)), encoding="utf-8")


def read(results: Path) -> Found:
    """All results by step."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(results.glob("?-*.json"))}
    return {name: one for name, one in found.items() if "result" in one}


def replace_between(text: str, mark: str, new: str) -> str:
    """Replace the text between two marks."""
    start, end = f"<!-- {mark} -->", f"<!-- end of {mark} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"the page has no {start} ... {end}")
    return f"{before}{start}\n{new}\n{end}{after}"


def tables(found: Found) -> str:
    if not found:
        return NOT_RUN
    lines = []
    if any(one["tiny"] for one in found.values()):
        lines.append("**A dry run with tiny shapes: the numbers mean nothing.**\n")
    for place in dict.fromkeys(machine(one["machine"]) for one in found.values()):
        lines.append(f"{place}\n")
    for letter, write_part in PARTS.items():
        mine = {name: one["result"] for name, one in found.items() if name.startswith(letter)}
        if mine:
            dates = sorted({found[name]["date"][:10] for name in mine})
            seconds = sum(found[name]["seconds"] for name in mine)
            command = f"python benchmarks/gpu.py --part {letter}"
            lines += [
                f"### Part {letter}\n",
                f"`{command}`, {', '.join(dates)}, {seconds:.0f} s\n",
                write_part(mine),
                "",
            ]
    return "\n".join(lines).rstrip()


def machine(found: dict[str, Any]) -> str:
    """The card and the versions in a line."""
    versions = [f"{name} {found[name]}" for name in found if name not in ("card", "memory_gb")]
    memory = f" ({found['memory_gb']} GB)" if "memory_gb" in found else ""
    return f"{found['card']}{memory}; {', '.join(versions)}"


def rows(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def part_a(mine: dict[str, Any]) -> str:
    return ", ".join(f"{count} {name}" for name, count in mine["a-tests"].items())


def part_b(mine: dict[str, Any]) -> str:
    """Tokens per second and memory, and this package's against each other way."""
    body, ours = [], mine.get("b-ours")
    goals = {"b-trl-default": "3", "b-trl-tuned": "2"}
    for name, one in mine.items():
        seconds = one["seconds"]
        speeds = [f"{n * one['tokens'] / spent:.0f}" for n, spent in enumerate(seconds, 1)]
        against = memory = ""
        if ours and name not in ("b-ours", "b-ours-kd"):
            faster = seconds[-1] / ours["seconds"][-1]
            against = f"{faster:.2f}" + (f" (goal {goals[name]})" if name in goals else "")
            memory = f"{ours['peak_bytes'] / one['peak_bytes']:.2f}" + (" (goal 0.5)" if name in goals else "")
        reached = (
            f"{one['fraction_of_peak']:.0%} of {one['limit_of_fraction']:.0%}" if "fraction_of_peak" in one else ""
        )
        epoch = f"{seconds[-1] - seconds[-2]:.1f}"
        body.append(
            [f"`{name[2:]}`", *speeds, epoch, f"{one['before_the_first_step']:.1f}", f"{one['cache_bytes'] / 1e9:.2f}",
             f"{one['peak_bytes'] / 1e9:.1f}", against, memory, reached]
        )  # fmt: skip
    head = [
        "way", "tokens/s, 1 epoch", "2", "3", "s of the last epoch", "s before the first step", "cache GB", "peak GB",
        "ours is faster, 3 epochs", "ours / its peak", "of the card's bf16 peak, of what is possible (computed)",
    ]  # fmt: skip
    return rows(head, body)


def part_c(mine: dict[str, Any]) -> str:
    body = []
    for name, one in mine.items():
        if name == "c-cut":
            for state in ("cold", "warm"):
                spent = one[f"{state}_seconds"]
                body.append([f"cut, {state}", f"{spent:.1f}", ratio(spent, one["drive_seconds"]), ""])
        elif name == "c-load":
            for way, entry in one.items():
                if isinstance(entry, dict) and "seconds" in entry:
                    spent = entry["seconds"]
                    body.append(
                        [f"load: {way}", f"{spent:.1f}", ratio(spent, one["drive_seconds"]), gb(entry["peak_bytes"])]
                    )
        elif name.startswith("c-rank"):
            spent = f"{one['seconds']:.1f} (loading {one['load_seconds']:.1f})"
            body.append([f"rank: {name.removeprefix('c-rank-')}", spent, "", gb(one["peak_bytes"])])
    drive = mine.get("c-drive")
    said = ""
    if drive:
        speeds = [drive[f"{way}_bytes_per_second"] / 1e9 for way in ("read", "write")]
        said = f"The drive reads {speeds[0]:.2f} GB/s and writes {speeds[1]:.2f} GB/s.\n\n"
    return said + rows(["what", "s", "of the drive's own time", "peak GB"], body)


def part_d(mine: dict[str, Any]) -> str:
    """Ratios of the cut model to the dense one."""
    body = []
    for name, one in mine.items():
        for batch, entry in one.items():
            if batch.startswith("batch"):
                cells = [name[2:].split("-")[0], batch.removeprefix("batch ")]
                for what in ("decode", "prefill"):
                    speeds = entry[f"{what}_tokens_per_second"]
                    cells += [f"{speeds['dense']:.0f}", f"{speeds['cut']:.0f}"]
                    cells.append(f"{speeds['ratio']:.2f} of {entry[f'{what}_ideal']:.2f}")
                body.append(cells)
    head = ["mode", "batch"]
    for what in ("decode", "prefill"):
        head += [f"{what} tokens/s, dense", "cut", "ratio, of the ideal one"]
    return rows(head, body)


def part_e(mine: dict[str, Any]) -> str:
    """Tokens and seconds of each round, and what was measured."""
    body = []
    for name, one in mine.items():
        if name.endswith("measured"):
            for metric, sides in one.items():
                values = [f"{sides[side]:.4g}" if side in sides else "" for side in ("dense", "cut")]
                body.append([name[2:].removesuffix("-measured"), metric, *values])
        elif "tokens" in one:
            body.append([name[2:], f"{one['tokens']:,} tokens", "", f"{one['training_seconds'] or 0:.0f} s"])
    return rows(["cut and round", "what", "dense", "healed"], body)


def part_f(mine: dict[str, Any]) -> str:
    """What was proven with each engine."""
    body = [
        [f"`{name[2:].removesuffix('-2')}.yaml`", str(one["processes"]), f"{one['adapter_difference']:.1e}",
         " to ".join(f"{loss:.3f}" for loss in one["losses"])]
        for name, one in mine.items()
    ]  # fmt: skip
    return rows(["settings", "processes", "adapter against model", "loss"], body)


def ratio(seconds: float, at_best: float) -> str:
    return f"{seconds / at_best:.2f}"


def gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "a": part_a, "b": part_b, "c": part_c, "d": part_d, "e": part_e, "f": part_f,
}  # fmt: skip
