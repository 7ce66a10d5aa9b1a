"""Read the rows of the tables from their YAML files, and turn each into a plan. This file must not import torch.

rows = read_rows()                                        # by name, such as table1/llama-taylor
plan = make_plan(rows["table1/llama-taylor"], Options())  # all settings for pruning, training and evaluation
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hf_layerprune.errors import CutError
from hf_layerprune.options import CutOptions
from hf_layerprune.records.fingerprints import sha256_of
from hf_layerprune.select.registry import CRITERIA

HERE = Path(__file__).parent
ROWS = HERE / "rows"
CONFIGS = HERE.parent / "configs"
# Settings of recipes/sft_tail.py that follow from the row: those of the cut, which is made before, and of the files.
ROW_SETTINGS = {field.name for field in fields(CutOptions) if field.name != "seed"} | {
    "model_name_or_path", "datasets", "dataset_name", "test_split_size", "template", "output_dir",
    "resume_from_checkpoint",
}  # fmt: skip
# The paper's numbers that a row may have, besides those of single tasks.
FIGURES = ("mean", "wikitext2", "ptb", "trainable_millions", "memory_gb", "seconds")


@dataclass(frozen=True)
class Row:
    """One row of a table of the paper.

    Args:
        name (`str`): Its table, and its name in that table's file in `rows/`.
        model (`str`): One of `models` in `defaults.yaml`.
        method (`str`): One of `methods`.
        paper (`dict[str, Any]`): The paper's numbers: those of `FIGURES`, `tasks` by name, and `removed` layers.
        criterion (`str`, *optional*): How layers are chosen; none if no layers are dropped.
        drop (`float`, *optional*): Share of the layers to drop; overrides `defaults.yaml`.
        per_step (`int`, *optional*): Layers dropped per step, with training after each step; all at once by default.
        calibration_samples (`int`, *optional*): Calibration rows; overrides `defaults.yaml`.
        data (`str`, defaults to `"alpaca"`): One of `data`.
        texts (`tuple[str, ...]`): Texts on which perplexity is measured.
        corrected (`dict[str, float]`): Corrected values of numbers that are wrong in the paper.
        notes (`str`): Remarks for the reader.
    """

    name: str
    model: str
    method: str
    paper: dict[str, Any]
    criterion: str | None = None
    drop: float | None = None
    per_step: int | None = None
    calibration_samples: int | None = None
    data: str = "alpaca"
    texts: tuple[str, ...] = ()
    corrected: dict[str, float] = field(default_factory=dict)
    notes: str = ""

    def figures(self) -> dict[str, float]:
        """The paper's numbers by name, including those of tasks, with corrections applied."""
        plain = {name: self.paper[name] for name in FIGURES if name in self.paper}
        return plain | self.paper.get("tasks", {}) | self.corrected


@dataclass(frozen=True)
class Options:
    """The user's changes to all rows.

    Args:
        models (`dict[str, str]`): Locations of models, by their name in the rows; `"*"` replaces all models.
        mistakes (`tuple[str, ...]`): Mistakes of the paper's code to repeat.
        limit (`int`, *optional*): Number of questions per task.
        tasks_from (`str`, *optional*): A folder of task files that replace the paper's eight tasks.
        texts (`dict[str, str]`): Text files by name; they are measured for every row.
        windows (`int`, *optional*): Number of windows per text.
        calibration (`str`, *optional*): Another calibration text for criteria.
        data (`str`, *optional*): A file of training rows that replaces each row's data set.
        max_steps (`int`, *optional*): Number of training steps.
        settings (`dict[str, Any]`): Other settings of `recipes/sft_tail.py`.
    """

    models: dict[str, str] = field(default_factory=dict)
    mistakes: tuple[str, ...] = ()
    limit: int | None = None
    tasks_from: str | None = None
    texts: dict[str, str] = field(default_factory=dict)
    windows: int | None = None
    calibration: str | None = None
    data: str | None = None
    max_steps: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def differences(self) -> list[str]:
        """How a run differs from the paper's, for a reader; empty for a full run."""
        reasons = []
        if "*" in self.models:
            reasons.append(f"model {Path(self.models['*']).name}")
        if self.data:
            reasons.append(f"trained on {Path(self.data).name}")
        if self.max_steps:
            reasons.append(f"{self.max_steps} steps")
        reasons += [f"{name}={value}" for name, value in self.settings.items()]
        if self.calibration:
            reasons.append(f"calibrated on {Path(self.calibration).name}")
        if self.tasks_from:
            reasons.append("tasks from files")
        if self.limit:
            reasons.append(f"{self.limit} questions per task")
        if self.windows:
            reasons.append(f"{self.windows} windows per text")
        reasons += [
            f"{name} is {Path(source).name}" for name, source in self.texts.items() if Path(source).stem != name
        ]
        return reasons


@dataclass(frozen=True)
class Plan:
    """All settings that decide a row's numbers.

    Args:
        model (`str`): The base.
        cut (`dict[str, Any]`, *optional*): Fields of `PruneRequest`; none if no layers are dropped.
        per_step (`int`, *optional*): See [`Row`].
        tune (`dict[str, Any]`, *optional*): Settings of `recipes/sft_tail.py`; none if nothing is trained.
        data (`dict[str, Any]`, *optional*): Source of the training rows, see `training_rows.py`.
        evaluate (`dict[str, Any]`): Fields of `EvalRequest`, with `texts` by name, and `merged_in_4_bits`.
        mistakes (`tuple[str, ...]`): The repeated mistakes that concern the row.
        differences (`tuple[str, ...]`): How the run differs from the paper's.
    """

    model: str
    cut: dict[str, Any] | None
    per_step: int | None
    tune: dict[str, Any] | None
    data: dict[str, Any] | None
    evaluate: dict[str, Any]
    mistakes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """A hash of all settings that decide the numbers; rows with the same key share a run."""
        sources = [(self.cut or {}).get("calibration"), (self.data or {}).get("name"), self.evaluate.get("tasks_from")]
        files = hash_local_files(*sources, *self.evaluate["texts"].values())
        return hash_json([self.model, self.cut, self.per_step, self.tune, self.data, self.evaluate, *files])

    @property
    def folder_name(self) -> str:
        """The name of the run's folder."""
        parts = [Path(self.model).name, (self.cut or {}).get("criterion", "dense"), (self.tune or {}).get("method")]
        return re.sub(r"[^\w.-]+", "_", "-".join(part for part in parts if part)) + f"-{self.key[:10]}"

    @property
    def cut_name(self) -> str:
        """The name of the folder of a cut in one step, which several runs may share."""
        key = hash_json([self.model, self.cut, *hash_local_files((self.cut or {}).get("calibration"))])
        return re.sub(r"[^\w.-]+", "_", f"{Path(self.model).name}-{(self.cut or {})['criterion']}") + f"-{key[:10]}"


def hash_local_files(*sources: str | None) -> list[str]:
    """The sha256 of the files that sources of data name, such as `rows.jsonl:text`; those of a folder; none on the Hub."""
    found = []
    for source in sources:
        location = source or ""
        while location and not Path(location).expanduser().exists():
            location = location.rpartition(":")[0]
        if location:
            path = Path(location).expanduser()
            files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
            found += [sha256_of(file) for file in files]
    return found


def hash_json(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@cache
def defaults() -> dict[str, Any]:
    return yaml.safe_load((HERE / "defaults.yaml").read_text(encoding="utf-8"))


def read_rows() -> dict[str, Row]:
    """Read all rows from the tables' files, each of which maps names to rows.

    Returns:
        `dict[str, Row]`: By name, such as `table1/llama-taylor`, in alphabetical order.
    """
    rows = {}
    for path in sorted(ROWS.glob("*.yaml"), key=lambda path: path.name.lower()):
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
        for short, own in sorted(table.items(), key=lambda item: item[0].lower()):
            name = f"{path.stem}/{short}"
            rows[name] = Row(name=name, **own | {"texts": tuple(own.get("texts", ()))})
    return rows


def choose_rows(rows: dict[str, Row], patterns: list[str], matching: re.Pattern[str] | None) -> dict[str, Row]:
    """Pick rows by name.

    Args:
        rows (`dict[str, Row]`): All of them.
        patterns (`list[str]`): Names, or shell patterns such as `table1/llama-*`; a table stands for all its rows.
        matching (`re.Pattern`, *optional*): A regular expression to search for in the name.

    Returns:
        `dict[str, Row]`: Rows that match a pattern or the expression; all rows if neither is given.

    Raises:
        CutError: A pattern matches no row.
    """
    if not patterns and matching is None:
        return rows
    chosen: set[str] = set()
    for pattern in patterns:
        matches = [name for name in rows if fnmatch.fnmatchcase(name, pattern) or name.startswith(f"{pattern}/")]
        if not matches:
            tables = ", ".join(dict.fromkeys(name.partition("/")[0] for name in rows))
            raise CutError(f"no row is called {pattern}; the tables are {tables}, and --list shows their rows")
        chosen |= set(matches)
    if matching is not None:
        matches = [name for name in rows if matching.search(name)]
        if not matches:
            raise CutError(f"no row's name has {matching.pattern} in it; --list shows all")
        chosen |= set(matches)
    return {name: row for name, row in rows.items() if name in chosen}


def relevant_mistakes(row: Row) -> list[str]:
    """The mistakes of the paper's code that concern a row."""
    return [
        name
        for name, mistake in defaults()["mistakes"].items()
        if all(getattr(row, what) in values for what, values in mistake["concerns"].items())
    ]


def make_plan(row: Row, options: Options) -> Plan:
    """Combine a row with the defaults and the user's options.

    Args:
        row (`Row`): The row.
        options (`Options`): The user's changes.

    Returns:
        `Plan`: All settings.

    Raises:
        CutError: A mistake or a model is unknown.
    """
    common = defaults()
    for name in options.mistakes:
        if name not in common["mistakes"]:
            raise CutError(f"unknown mistake {name!r}; choose from {', '.join(common['mistakes'])}, or all")
    for word in options.models:
        if word not in ("*", *common["models"]):
            raise CutError(f"no row has a model {word!r}; they have {', '.join(common['models'])}")
    mistakes = [name for name in relevant_mistakes(row) if name in options.mistakes]

    def with_mistakes(part: str, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, with the mistakes of the paper's code that are to be repeated."""
        for name in mistakes:
            settings = settings | common["mistakes"][name].get(part, {})
        return settings

    tune = _tune_settings(row, options, with_mistakes)
    return Plan(
        model=options.models.get(row.model) or options.models.get("*") or common["models"][row.model],
        cut=_cut_settings(row, options, with_mistakes),
        per_step=row.per_step,
        tune=tune,
        data=None if tune is None else _data_settings(row, options, with_mistakes),
        evaluate=_evaluate_settings(row, options, with_mistakes),
        mistakes=tuple(mistakes),
        differences=tuple(options.differences()),
    )


WithMistakes = Callable[[str, dict[str, Any]], dict[str, Any]]


def _cut_settings(row: Row, options: Options, with_mistakes: WithMistakes) -> dict[str, Any] | None:
    if row.criterion is None:
        return None
    common = defaults()["cut"]
    cut = common | {"criterion": row.criterion}
    if row.drop is not None:
        cut["drop"] = row.drop
    cut = with_mistakes("cut", cut)
    if options.calibration is not None:
        cut |= {"calibration": options.calibration, "calibration_samples": common["calibration_samples"]}
    if row.calibration_samples is not None:
        cut["calibration_samples"] = row.calibration_samples
    if CRITERIA[row.criterion].needs != "text":
        cut = {name: value for name, value in cut.items() if not name.startswith("calibration")}
    return cut


def _tune_settings(row: Row, options: Options, with_mistakes: WithMistakes) -> dict[str, Any] | None:
    common = defaults()
    method = common["methods"][row.method]
    if method is None:
        return None
    settings = yaml.safe_load((CONFIGS / method["settings"]).read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in ROW_SETTINGS}
    settings |= common["tune"] | common["data"][row.data].get("tune", {}) | method.get("change", {})
    settings = with_mistakes("tune", settings)
    if options.max_steps is not None:
        # Keep the shape of the schedule: the paper warms up for 100 of about 1,555 steps.
        warm_up = round(options.max_steps * 100 / 1555)
        settings |= {"max_steps": options.max_steps, "warmup_steps": warm_up, "eval_strategy": "no"}
        settings |= {"load_best_model_at_end": False, "save_steps": max(1, options.max_steps // 2), "logging_steps": 1}
    settings |= options.settings
    return {name: value for name, value in settings.items() if value is not None}


def _data_settings(row: Row, options: Options, with_mistakes: WithMistakes) -> dict[str, Any]:
    data = with_mistakes(
        "data", {name: value for name, value in defaults()["data"][row.data].items() if name != "tune"}
    )
    return data if options.data is None else data | {"name": options.data}


def _evaluate_settings(row: Row, options: Options, with_mistakes: WithMistakes) -> dict[str, Any]:
    evaluate = dict(with_mistakes("evaluate", defaults()["evaluate"]))
    if options.tasks_from is not None:
        evaluate |= {"tasks": None, "tasks_from": options.tasks_from}
    if options.limit is not None:
        evaluate |= {"limit": options.limit}
    if options.windows is not None:
        evaluate |= {"windows": options.windows}
    return evaluate | {"texts": {name: name for name in row.texts} | options.texts}
