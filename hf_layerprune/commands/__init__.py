"""The commands, one module each: `HELP`, `DESCRIPTION`, `Request` (a dataclass of options), and `run(request)`.

A module turns a request into one call of the package that does the work, which it imports inside `run`, so that `--help`
stays instant. To add a command, add its module, and its name in the list below, which is the order in `--help`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..measure.requests import BenchRequest, EvalRequest
    from ..records.metrics import Metrics

COMMANDS = ("prune", "inspect", "rank", "advise", "recipes", "eval", "bench", "card", "push", "verify", "chat")


@dataclass(frozen=True)
class Result:
    """The result of a command.

    Args:
        summary (`str`): One line: what was made, and where.
        text (`str`): What was found, as text.
        data (`dict[str, Any]`): All of it as data, which `--json` prints.
        follow_up (`tuple[str, ...]`): The command to run next, split into words.
        errors (`tuple[str, ...]`): What failed, one line each.
        exit_code (`int`): The exit code.
    """

    summary: str = ""
    text: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    follow_up: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    exit_code: int = 0


def suggest(command: str, *words: object) -> tuple[str, ...]:
    """The command to run next, split into words; a word that is `None` is left out, with the option before it."""
    kept: list[str] = []
    for word in map(str, words):
        if word != "None":
            kept.append(word)
        elif kept and kept[-1].startswith("--"):
            kept.pop()
    return ("hf-layerprune", command, *kept)


def measurement_result(
    request: EvalRequest | BenchRequest, metrics: Metrics, text: str, missed: Sequence[str] = ()
) -> Result:
    """The result of a command that measured a model, with the requirements that the model misses."""
    folder = Path(request.model).expanduser()
    own = folder / "metrics.json"
    target = request.output or (own if folder.is_dir() else None)
    summary = f"the numbers are in {target}" if target else ""
    # A card shows the folder's own numbers.
    ready = target == own and (folder / "lineage.json").is_file() and not missed
    follow_up = suggest("card", request.model) if ready else ()
    errors = (f"missed: {', '.join(missed)}",) if missed else ()
    return Result(summary, text, metrics.record, follow_up, errors, exit_code=1 if missed else 0)
