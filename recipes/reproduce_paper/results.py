"""Results of rows: the JSON file that holds them, and the Markdown table.

results = Results.read(Path("results.json"))
results.add(row, plan, outcome)    # written atomically
print(markdown(rows, results))
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from plans import FIGURES, Plan, Row, defaults

from hf_layerprune.errors import CheckpointError
from hf_layerprune.files.copy import write_text
from hf_layerprune.files.json_file import read_object

SCHEMA_VERSION = 1
NOT_RUN = "not run"
_UNITS = {"trainable_millions": "trained, millions", "memory_gb": "GPU memory, GB", "seconds": "training, s"}
# Figures that have no standard error here, and depend on the machine.
_MACHINE_FIGURES = ("memory_gb", "seconds")


@dataclass
class Results:
    """The results of all rows.

    Args:
        path (`Path`): The file.
        runs (`dict[str, dict]`): Outcomes by the key of their plan.
        rows (`dict[str, str]`): For each row, the key of the plan that it was last run with.
    """

    path: Path
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read results; there are none if the file does not exist.

        Raises:
            CheckpointError: The file is damaged, or has another schema version.
        """
        if not path.is_file():
            return cls(path)
        content = read_object(path)
        if content.get("schema_version") != SCHEMA_VERSION:
            raise CheckpointError(f"{path} has no schema version {SCHEMA_VERSION}; remove it, and rows are run again")
        return cls(path, content["runs"], content["rows"])

    def outcome_of(self, row: Row) -> dict[str, Any] | None:
        """The outcome of a row's last run."""
        return self.runs.get(self.rows.get(row.name, ""))

    def has(self, row: Row, plan: Plan) -> bool:
        """Whether a plan's results are known, possibly from another row's run; if so, links the row to them."""
        if plan.key not in self.runs:
            return False
        if self.rows.get(row.name) != plan.key:
            self.rows[row.name] = plan.key
            self.write()
        return True

    def add(self, row: Row, plan: Plan, outcome: dict[str, Any]) -> None:
        """Add the outcome of a plan, and write the file."""
        self.runs[plan.key] = outcome | {
            "model": Path(plan.model).name if Path(plan.model).exists() else plan.model,
            "mistakes": list(plan.mistakes),
            "differences": list(plan.differences),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.rows[row.name] = plan.key
        self.write()

    def write(self) -> None:
        """Write the file atomically."""
        content = {"schema_version": SCHEMA_VERSION, "rows": self.rows, "runs": self.runs}
        write_text(self.path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@dataclass(frozen=True)
class Line:
    """One number of the paper and ours.

    Args:
        figure (`str`): One of `FIGURES`, or a task.
        paper (`float`, *optional*): The paper's number, corrected if it is known to be wrong.
        ours (`float`, *optional*): Our number.
        stderr (`float`, *optional*): The standard error of our number.
        printed (`float`, *optional*): The number that the paper printed, if it is known to be wrong.
    """

    figure: str
    paper: float | None
    ours: float | None = None
    stderr: float | None = None
    printed: float | None = None

    @property
    def difference(self) -> float | None:
        """Our number minus the paper's."""
        return None if self.ours is None or self.paper is None else self.ours - self.paper

    @property
    def is_within_error(self) -> bool | None:
        """Whether the difference is within one standard error of our number; `None` if it is unknown."""
        if self.difference is None or not self.stderr:
            return None
        return abs(self.difference) <= self.stderr


def make_lines(row: Row, outcome: dict[str, Any] | None) -> list[Line]:
    """A row's numbers: first those in the paper, then those that only we measure."""
    values, wanted = (outcome or {}).get("values", {}), row.figures()
    names = list(wanted) + [name for name in values if name not in wanted and name not in _UNITS]
    return [
        Line(
            name,
            wanted.get(name),
            values.get(name, {}).get("value"),
            values.get(name, {}).get("stderr"),
            row.paper[name] if name in row.corrected else None,
        )
        for name in names
    ]


def format_line(line: Line, outcome: dict[str, Any] | None) -> list[str]:
    """The cells of a line: figure, the paper's number, ours, difference, whether it is within the standard error."""
    paper = "" if line.paper is None else _number(line.figure, line.paper)
    if line.printed is not None:
        paper += f" (printed: {_number(line.figure, line.printed)})"
    ours = NOT_RUN if outcome is None else ""
    if line.ours is not None:
        ours = _number(line.figure, line.ours) + (f" ± {_number(line.figure, line.stderr)}" if line.stderr else "")
    difference = "" if line.difference is None else _number(line.figure, line.difference, sign=True)
    return [_UNITS.get(line.figure, line.figure), paper, ours, difference, _verdict(line, outcome)]


def _verdict(line: Line, outcome: dict[str, Any] | None) -> str:
    if outcome is None or line.difference is None:
        return ""
    if outcome["differences"]:
        return "not the same run"
    if line.figure in _MACHINE_FIGURES:
        return "another machine"
    if line.is_within_error is None:
        return ""
    return "yes" if line.is_within_error else f"no, {abs(line.difference) / (line.stderr or 1):.1f} s.e."


def _number(figure: str, value: float, sign: bool = False) -> str:
    plus = "+" if sign else ""
    if figure in ("trainable_millions", "memory_gb", "wikitext2", "ptb") or (figure not in FIGURES and abs(value) > 1):
        return f"{value:{plus}.2f}" if abs(value) < 1e5 else f"{value:{plus}.2e}"
    return f"{value:{plus},.0f}" if figure == "seconds" else f"{value:{plus}.4f}"


def format_removed(row: Row, outcome: dict[str, Any] | None) -> str:
    """The layers that our run dropped, and those of the paper."""
    ours, theirs = (outcome or {}).get("removed", ""), str(row.paper.get("removed", ""))
    if not theirs or (outcome or {}).get("differences"):
        return ours
    return f"{ours} (as the paper)" if ours == theirs else f"{ours} (paper: {theirs})".strip()


def markdown(rows: dict[str, Row], results: Results) -> str:
    """All tables as one Markdown text.

    Args:
        rows (`dict[str, Row]`): The rows.
        results (`Results`): Their results.

    Returns:
        `str`: How many rows were run, how runs differ from the paper's, and a table for each table of the paper.
    """
    outcome = {name: results.outcome_of(row) for name, row in rows.items()}
    done = sum(one is not None for one in outcome.values())
    text = [
        "# The paper's tables, and ours",
        "",
        f"Reassessing Layer Pruning in LLMs (arXiv:2411.15558). Rows run: {done} of {len(rows)}. Differences "
        "are our value minus the paper's; within the standard error means no larger than the standard error of our value.",
    ]
    ways = dict.fromkeys(tuple(one["differences"]) for one in outcome.values() if one and one["differences"])
    for way in ways:
        text += ["", f"Not the same run as the paper's: {'; '.join(way)}."]
    for table in dict.fromkeys(name.partition("/")[0] for name in rows):
        head = ["row", "layers dropped", "figure", "paper", "ours", "difference", "within s.e.", "mistakes on"]
        text += ["", f"## {table.replace('table', 'Table ')}", "", _cells(head), "|" + "---|" * len(head)]
        for name, row in rows.items():
            if name.startswith(f"{table}/"):
                text += _row_lines(name, row, outcome[name])
    notes = [(name, row.notes) for name, row in rows.items() if row.notes]
    text += ["", "## Notes", "", *(f"- `{name}`: {note}" for name, note in notes)] if notes else []
    return "\n".join(text) + "\n"


def _row_lines(name: str, row: Row, outcome: dict[str, Any] | None) -> list[str]:
    lines = []
    for number, line in enumerate(make_lines(row, outcome)):
        first = [f"`{name.partition('/')[2]}`", format_removed(row, outcome)] if number == 0 else ["", ""]
        last = [", ".join(outcome["mistakes"]) or "none"] if outcome and number == 0 else [""]
        lines.append(_cells([*first, *format_line(line, outcome), *last]))
    return lines


def _cells(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def mistakes_text() -> str:
    """The mistakes of the paper's code, one per line."""
    return "\n".join(
        f"{name}: {' '.join(mistake['what'].split())}" for name, mistake in defaults()["mistakes"].items()
    )
