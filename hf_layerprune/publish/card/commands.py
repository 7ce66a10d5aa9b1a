"""The commands that reproduce a model, from the records of its stages."""

from __future__ import annotations

import shlex
from pathlib import PurePath
from typing import Any

from ...layer_ranges import format_layers
from ...options import BUDGETS, CutOptions, TuningOptions, option_fields, to_arguments
from ...records.history import TRAIN, History, Stage
from ...records.names import last_part

_LINE = 80
# What chooses the layers, besides a budget.
_SELECTION = ("criterion", "variant", "steps", "contiguous", "protect_first", "protect_last")


def list_commands(history: History) -> list[str]:
    """The commands, one for each stage that records one. Folder names match between consecutive commands. A comment
    stands for training with other software.
    """
    commands: list[str] = []
    source = None
    for number, stage in enumerate(history.stages):
        if command := stage.entry.get("command"):
            commands.append(_wrap(_split(command)))
        elif stage.name == "prune" and stage.settings.get("drop_layers"):
            output = _next_input(history, number) or ("pruned" if source is None else f"{source}-again")
            if not _is_base(history, output):  # a recipe that starts from the base prunes it
                commands.append(_wrap(_prune_command(history, stage, source, output)))
            source = output
        elif stage.name == TRAIN and commands:
            commands.append("# Here, the model was trained with other software.")
    return commands


def _is_base(history: History, name: str) -> bool:
    """Whether a command names the base: as the history does, or, of its path, the part below the working folder."""
    parts, whole = PurePath(name).parts, PurePath(str(history.lineage.base.get("id"))).parts
    return name in (history.base_id, history.base_on_hub) or (len(parts) > 1 and whole[-len(parts) :] == parts)


def _next_input(history: History, number: int) -> str | None:
    """The name that the next command uses for the output of a stage."""
    for stage in history.stages[number + 1 :]:
        words = _split(stage.entry.get("command", ""))
        if "--model_name_or_path" in words[:-1]:
            return words[words.index("--model_name_or_path") + 1]
    return None


def _prune_command(history: History, stage: Stage, source: str | None, output: str) -> list[str]:
    """The command that cuts `source`, or else the base."""
    settings, base = stage.settings, history.lineage.base
    # Prefer the base on the Hub, which every reader can get; a GGUF file has other weights than that.
    start = history.base_id if history.from_gguf or not history.base_on_hub else history.base_on_hub
    words = ["hf-layerprune", "prune", source or start, output]
    budget = next((name for name in BUDGETS if settings.get(name) is not None), None)
    if budget is None:
        words += ["--drop-layers", format_layers(settings["drop_layers"])]
    else:  # its repair is fitted to the rows that are not held out
        words += _arguments({name: settings.get(name) for name in (budget, *_SELECTION)})
    if settings.get("dtype", "auto") != "auto":
        words += ["--dtype", str(settings["dtype"])]
    words += _arguments({"repair": settings.get("repair")})
    if settings.get("repair") or budget:
        words += _calibration_arguments(stage.entry.get("calibration", {}))
    if settings.get("form") == "adapter":
        words.append("--adapter")
        tuned = {name: settings[name] for name in option_fields(TuningOptions) if name in settings}
        words += to_arguments(TuningOptions(**tuned))
    if source is None and base.get("commit"):
        words += ["--revision", str(base["commit"])]
    return words


def _calibration_arguments(text: dict[str, Any]) -> list[str]:
    name = str(text.get("source", "self"))
    name = last_part(name) if name.startswith(("/", "~", ".")) else name
    sizes = {f"calibration_{size}": text.get(size) for size in ("samples", "length")}
    return _arguments({"calibration": name, **sizes, "seed": text.get("seed")})


def _arguments(settings: dict[str, Any]) -> list[str]:
    """The command-line options for settings of a cut that differ from their defaults."""
    arguments: list[str] = []
    for name, option in option_fields(CutOptions).items():
        value = settings.get(name)
        if value not in (None, option.default):
            arguments.append(f"--{name.replace('_', '-')}")
            arguments += [] if value is True else [f"{value:.15g}" if isinstance(value, float) else str(value)]
    return arguments


def _split(command: str) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError:  # an unclosed quote
        return command.split()


def _wrap(words: list[str]) -> str:
    """A command; if it is long, each option is on a line of its own."""
    quoted = [shlex.quote(word) for word in words]
    line = " ".join(quoted)
    if len(line) <= _LINE:
        return line
    return " ".join(f"\\\n    {word}" if word.startswith("--") else word for word in quoted)
