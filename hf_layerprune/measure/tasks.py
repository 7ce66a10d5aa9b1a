r"""The tasks of an evaluation: the harness's own by name, and files in a folder, which become tasks of the harness.

    with task_set(["piqa", "mmlu"]) as tasks: ...              # tasks of lm-evaluation-harness; "paper" means eight of them
    with task_set(None, Path("my-tasks")) as tasks: ...        # every *.jsonl in the folder

A line of a `.jsonl` file is one question: `{"query": "...", "choices": ["...", "..."], "gold": 0}`. The model scores
`query + " " + choice`; if every query of a file begins with "Question: ", "\nAnswer:" is appended to the query. A YAML
file of the same name may set the harness's `doc_to_text`, `target_delimiter`, `description` and `metadata`, and nothing
else. The first three are Jinja templates, which run in Jinja's sandbox: a folder of tasks can't run code. A `.txt` file
is a text, on which perplexity and distance are measured; if it is named in `tasks`, it also becomes a task of the
harness, which measures its per-word and per-byte perplexity.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LayerPruneError, boundary
from ..files.json_file import parse_json
from ..files.text_file import read_text as read_text_file
from ..files.text_file import read_yaml

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# The eight tasks of arXiv:2411.15558: zero-shot, without a chat template.
PAPER = ("piqa", "hellaswag", "openbookqa", "arc_easy", "arc_challenge", "mmlu", "cmmlu", "winogrande")

_SIDECAR_FIELDS = {"doc_to_text": str, "target_delimiter": str, "description": str, "metadata": dict}
_VERSION = 1.0


@dataclass(frozen=True)
class LocalTask:
    """Multiple-choice questions in a file.

    Args:
        name (`str`): The file's name without `.jsonl`.
        path (`Path`): The file.
        rows (`list[dict]`): `query`, `choices` and `gold` of each question.
        fields (`dict[str, Any]`): The fields of the harness's YAML that set the prompt.
    """

    name: str
    path: Path
    rows: list[dict[str, Any]]
    fields: dict[str, Any]


@dataclass(frozen=True)
class LocalText:
    """A text in a file.

    Args:
        name (`str`): The file's name without `.txt`.
        path (`Path`): The file.
        text (`str`): Its content.
    """

    name: str
    path: Path
    text: str

    @property
    def sha256(self) -> str:
        """The sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class TaskSet:
    """Tasks that are ready to run, with their data loaded.

    Args:
        tasks (`dict[str, Task | Group]`): The harness's objects, by name.
        datasets (`dict[str, str]`): The Hub id of each task's data, or the sha256 of its file.
        local (`frozenset[str]`): The names of the tasks that are local files.
    """

    tasks: dict[str, Task | Group] = field(default_factory=dict)
    datasets: dict[str, str] = field(default_factory=dict)
    local: frozenset[str] = frozenset()


@contextmanager
def task_set(names: Sequence[str] | None, folder: Path | None = None) -> Iterator[TaskSet]:
    """Find and load tasks. Errors in them are reported here, before a model is loaded.

    Args:
        names (`Sequence[str]`, *optional*): Tasks, groups, tags or patterns of the harness, files of `folder` without
            their extension, or `"paper"`. By default every `.jsonl` file of `folder`.
        folder (`Path`, *optional*): A folder with task files.

    Yields:
        `TaskSet`: The tasks, which can be run inside the `with` block.

    Raises:
        LayerPruneError: A task is unknown, its data is not available, or a file is not a valid task.
    """
    files = read_tasks(folder) if folder else {}
    wanted = list(names) if names is not None else [name for name, one in files.items() if isinstance(one, LocalTask)]
    wanted = [name for one in wanted for name in (PAPER if one == "paper" else (one,))]
    wanted = list(dict.fromkeys(wanted))
    if not wanted:
        yield TaskSet()
        return
    require_harness()
    ours = [name for name in wanted if name in files]
    theirs = [name for name in wanted if name not in files]
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as temporary:
        for name in ours:
            write_task(files[name], Path(temporary))
        loaded = _load_named(theirs, list(files), folder) | _load_files(ours, Path(temporary))
        hashes = {name: _sha256(files[name].path) for name in ours}
        ids = {name: hashes.get(name) or _dataset(one) for name, one in loaded.items()}
        yield TaskSet(loaded, ids, frozenset(ours))


def require_harness() -> None:
    """Check that lm-evaluation-harness is installed, and make it render templates in a sandbox."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LayerPruneError('tasks need lm-evaluation-harness: pip install "hf-layerprune[eval]"')
    import lm_eval.utils

    lm_eval.utils.env = sandbox()
    lm_eval.utils.env.filters["regex_replace"] = lm_eval.utils.regex_replace


def sandbox() -> SandboxedEnvironment:
    """A Jinja environment with the harness's settings, in which templates can't reach Python objects."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


# --- tasks of the harness ----------------------------------------------------------------------------------


def _load_named(names: Sequence[str], files: Sequence[str], folder: Path | None) -> dict[str, Task | Group]:
    if not names:
        return {}
    manager = _all_tasks()
    known = dict.fromkeys(manager.all_tasks)
    loaded: dict[str, Task | Group] = {}
    for name in names:
        matches = [name] if name in known else manager.match_tasks([name])
        if not matches:
            raise LayerPruneError(_unknown(name, [*files, *known], folder))
        for match in matches:
            loaded |= _load(manager, match)
    return loaded


@cache
def _all_tasks() -> TaskManager:
    """The harness's index of its tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _unknown(name: str, known: Sequence[str], folder: Path | None) -> str:
    near = difflib.get_close_matches(name, ["paper", *known], n=3, cutoff=0.5)
    where = (
        f"neither a task of lm-evaluation-harness nor a file in {folder}" if folder else "not a task of the harness"
    )
    return f"{name!r} is {where}; " + (f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all")


def _load(manager: Any, name: str) -> dict[str, Task | Group]:
    hint = "go online, or name files with --tasks-from FOLDER"
    with boundary(f"can't load task {name}", hint, LayerPruneError):
        loaded = manager.load([name])
    groups = loaded.get("groups") or {}
    return {name: groups[name]} if name in groups else dict(loaded["tasks"])


def _dataset(task: Task | Group) -> str:
    leaves = task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]
    return str(leaves[0].config.dataset_path) if leaves else ""


# --- files ------------------------------------------------------------------------------------------------


def read_tasks(folder: Path) -> dict[str, LocalTask | LocalText]:
    """Read all tasks and texts of a folder.

    Args:
        folder (`Path`): The folder.

    Returns:
        `dict[str, LocalTask | LocalText]`: The tasks and texts by name, in alphabetical order.

    Raises:
        LayerPruneError: The folder has none, or one is invalid; the message names the line.
    """
    if not folder.is_dir():
        raise LayerPruneError(f"{folder} is not a folder; name one with .jsonl files (tasks) or .txt files (texts)")
    files: dict[str, LocalTask | LocalText] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.txt")]):
        if path.stem in files:
            raise LayerPruneError(f"{path} and {files[path.stem].path} have the same name; rename one")
        files[path.stem] = read_task(path) if path.suffix == ".jsonl" else read_text(path)
    if not files:
        raise LayerPruneError(f"{folder} has no .jsonl file (a task) and no .txt file (a text); name another folder")
    return files


def read_task(path: Path) -> LocalTask:
    """Read a file of questions.

    Args:
        path (`Path`): A `.jsonl` file.

    Returns:
        `LocalTask`: The task.

    Raises:
        LayerPruneError: A line is not a valid question.
    """
    rows = []
    for number, line in enumerate(read_text_file(path).split("\n"), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if (problem := _problem_of(row)) is not None:
            raise LayerPruneError(f"{path}, line {number}: {problem}")
        rows.append({name: row[name] for name in ("query", "choices", "gold")})
    if not rows:
        raise LayerPruneError(f"{path} has no questions; put one on each line")
    return LocalTask(path.stem, path, rows, _prompt(path, rows))


def _problem_of(row: Any) -> str | None:
    if not isinstance(row, dict) or not {"query", "choices", "gold"} <= row.keys():
        return 'a question is {"query": "...", "choices": ["...", "..."], "gold": 0}'
    query, choices, gold = row["query"], row["choices"], row["gold"]
    if not isinstance(query, str) or not query.strip():
        return f"query is {query!r}, but must be a non-empty text"
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        return "choices must be at least two texts, none of them empty"
    if isinstance(gold, bool) or not isinstance(gold, int):
        return f"gold is {gold!r}, but must be the index of the right choice, counted from 0"
    if not 0 <= gold < len(choices):
        return f"gold is {gold}, but the choices are 0..{len(choices) - 1}"
    return None


def _prompt(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    asks = all(row["query"].startswith("Question: ") for row in rows)
    fields: dict[str, Any] = {"doc_to_text": "{{query}}\nAnswer:" if asks else "query"}
    sidecar = path.with_suffix(".yaml")
    if not sidecar.is_file():
        return fields
    fields |= read_yaml(sidecar)
    for name, value in fields.items():
        if name not in _SIDECAR_FIELDS:
            raise LayerPruneError(
                f"{sidecar} has a field {name!r}, but only {', '.join(_SIDECAR_FIELDS)} can be set for a local task"
            )
        if not isinstance(value, _SIDECAR_FIELDS[name]):
            raise LayerPruneError(
                f"{sidecar}: {name} is a {type(value).__name__}, but must be text (metadata: a mapping)"
            )
        if isinstance(value, str) and value not in rows[0]:
            with boundary(f"{sidecar}: the template {name} can't be used", kind=LayerPruneError):
                sandbox().from_string(value).render(**rows[0])
    return fields


def read_text(path: Path) -> LocalText:
    """Read a text file.

    Args:
        path (`Path`): A `.txt` file.

    Returns:
        `LocalText`: The text.

    Raises:
        LayerPruneError: It is empty, or not UTF-8.
    """
    text = read_text_file(path)
    if not text.strip():
        raise LayerPruneError(f"{path} is empty; put a text into it to measure perplexity on")
    return LocalText(path.stem, path, text)


def write_task(task: LocalTask | LocalText, folder: Path) -> Path:
    """Write a local task or text as a task of the harness: its rows, and a YAML file that refers to them.

    Args:
        task (`LocalTask` or `LocalText`): The task.
        folder (`Path`): The folder to write to, from which `lm_eval run --include_path FOLDER --tasks NAME` runs it.

    Returns:
        `Path`: The YAML file.
    """
    import yaml

    data = folder / f"{task.name}.jsonl"
    rows: Any = [{"text": task.text}] if isinstance(task, LocalText) else task.rows
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config: dict[str, Any] = {
        "task": task.name,
        "dataset_path": "json",
        # The cache is deleted together with the files.
        "dataset_kwargs": {"data_files": {"test": str(data.resolve())}, "cache_dir": str(folder.resolve() / "cache")},
        "test_split": "test",
        "metadata": {"version": _VERSION},
    }
    if isinstance(task, LocalText):
        metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        config |= {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text"}
        config["metric_list"] = [{"metric": metric} for metric in metrics]
    else:
        config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        config["metric_list"] = [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ]
        config |= task.fields
    path = folder / f"{task.name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def _load_files(names: Sequence[str], folder: Path) -> dict[str, Task | Group]:
    if not names:
        return {}
    import datasets
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    bars_disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return {name: one for wanted in names for name, one in _load(manager, wanted).items()}
    finally:
        if not bars_disabled:
            datasets.enable_progress_bars()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
