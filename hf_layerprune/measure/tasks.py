r"""The tasks of an evaluation: the harness's own by name, and files in a folder, which become tasks of the harness.

    tasks = task_set(["piqa", "mmlu"])           # tasks of lm-evaluation-harness; "paper" means eight of them
    tasks = task_set(None, Path("my-tasks"))     # every *.jsonl in the folder

A line of a `.jsonl` file is one question: `{"query": "...", "choices": ["...", "..."], "gold": 0}`. The model scores
`query + " " + choice`; if every query of a file begins with "Question: ", "\nAnswer:" is appended to the query. A YAML
file of the same name may set the harness's `doc_to_text`, `target_delimiter`, `description` and `metadata`, and nothing
else. The first three are Jinja templates, which run in Jinja's sandbox: a folder of tasks can't run code. Questions
about images, whose answers the model writes, have the form that [`.image_tasks`] describes. A `.txt` file is a text, on
which perplexity and distance are measured; if it is listed in `tasks`, it also becomes a task of the harness, which
measures its per-word and per-byte perplexity.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CutError, LayerPruneError, boundary
from ..files import text_file
from ..files.json_rows import read_rows
from ..screen import progress_bar
from . import image_tasks
from .texts import Text, read_text

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

# The eight tasks of arXiv:2411.15558: zero-shot, without a chat template.
PAPER = ("piqa", "hellaswag", "openbookqa", "arc_easy", "arc_challenge", "mmlu", "cmmlu", "winogrande")

_SIDECAR_FIELDS = {"doc_to_text": str, "target_delimiter": str, "description": str, "metadata": dict}


@dataclass(frozen=True)
class LocalTask:
    """Questions in a file: multiple-choice, or about images.

    Args:
        name (`str`): The file's name without `.jsonl`.
        rows (`list[dict]`): `query`, `choices` and `gold` of each question; or `query`, `answer` and `images`.
        fields (`dict[str, Any]`): The fields of the harness's YAML that set the prompt.
        dataset (`str`): The sha256 of the file, and of its images.
    """

    name: str
    rows: list[dict[str, Any]]
    fields: dict[str, Any]
    dataset: str


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


def task_set(names: Sequence[str] | None, folder: Path | None = None) -> TaskSet:
    """Find and load tasks. Errors in them are reported here, before a model is loaded.

    Args:
        names (`Sequence[str]`, *optional*): Tasks, groups, tags or patterns of the harness, files of `folder` without
            their extension, or `"paper"`. By default every `.jsonl` file of `folder`.
        folder (`Path`, *optional*): A folder with task files.

    Returns:
        `TaskSet`: The tasks.

    Raises:
        CutError: A task is unknown.
        LayerPruneError: Its data is not available, or a file is not a valid task.
    """
    paths = task_files(folder) if folder else {}
    if names is None:
        names = [name for name, path in paths.items() if path.suffix == ".jsonl"]
    wanted = list(dict.fromkeys(name for one in names for name in (PAPER if one == "paper" else (one,))))
    files = read_tasks(folder, wanted) if folder else {}
    if not wanted:
        return TaskSet()
    require_harness()
    theirs = [match for name in wanted if name not in files for match in _find(name, list(paths), folder)]
    ours = [name for name in wanted if name in files]
    loaded: dict[str, Task | Group] = {}
    with quiet():
        for name in theirs:
            with boundary(
                f"can't load task {name}", "go online, or specify files with --tasks-from FOLDER", LayerPruneError
            ):
                found = _all_tasks().load([name])
            loaded |= {name: found["groups"][name]} if name in found["groups"] else found["tasks"]
        for name in ours:
            with boundary(f"can't load task {name}", kind=LayerPruneError):
                loaded[name] = _local(files[name])
    datasets = {name: files[name].dataset if name in files else _dataset(task) for name, task in loaded.items()}
    return TaskSet(loaded, datasets, frozenset(ours))


# --- the harness -------------------------------------------------------------------------------------------


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


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the harness's log messages, and its progress bars for steps that take no time.

    Also skip its report on the environment, which takes seconds after each task, and its call of git, which prints an
    error outside a repository; neither is used here.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator
    import lm_eval.models.huggingface

    log = logging.getLogger("lm_eval")
    level, bar, evaluator = log.level, lm_eval.api.task.tqdm, lm_eval.evaluator
    add_env_info, get_git_commit_hash = evaluator.add_env_info, evaluator.get_git_commit_hash
    bars = {lm_eval.api.model: True, lm_eval.api.task: True, lm_eval.models.huggingface: None}
    log.setLevel(logging.ERROR)
    evaluator.add_env_info, evaluator.get_git_commit_hash = (lambda results: None), (lambda: None)
    for module, hidden in bars.items():
        module.tqdm = partial(_bar, hidden)
    try:
        yield
    finally:
        log.setLevel(level)
        evaluator.add_env_info, evaluator.get_git_commit_hash = add_env_info, get_git_commit_hash
        for module in bars:
            module.tqdm = bar


def _bar(hidden: bool | None, *args: Any, **words: Any) -> Any:
    return progress_bar(*args, **words | {"disable": hidden})


@cache
def _all_tasks() -> TaskManager:
    """The harness's index of its tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _find(name: str, files: Sequence[str], folder: Path | None) -> list[str]:
    """The harness's tasks of a name or a pattern."""
    known = dict.fromkeys(_all_tasks().all_tasks)
    if matches := [name] if name in known else _all_tasks().match_tasks([name]):
        return matches
    near = difflib.get_close_matches(name, ["paper", *files, *known], n=3, cutoff=0.5)
    where = (
        f"neither a task of lm-evaluation-harness nor a file in {folder}" if folder else "not a task of the harness"
    )
    way_out = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all"
    raise CutError(f"{name!r} is {where}; {way_out}")


def _dataset(task: Task | Group) -> str:
    leaves = image_tasks.leaves(task)
    return str(leaves[0].config.dataset_path) if leaves else ""


def _local(task: LocalTask | Text) -> Task:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {"test": Dataset.from_list(rows_of(task))}
    return ConfigurableTask(config=task_config(task) | {"custom_dataset": lambda **_: data})


def rows_of(task: LocalTask | Text) -> list[dict[str, Any]]:
    """The rows that a local task or text has as a task of the harness."""
    return [{"text": task.text}] if isinstance(task, Text) else task.rows


def task_config(task: LocalTask | Text) -> dict[str, Any]:
    """The harness's config for a local task or text, without the place of its rows."""
    config: dict[str, Any] = {"task": task.name, "test_split": "test", "metadata": {"version": 1.0}}
    if isinstance(task, Text):
        metrics = ("word_perplexity", "byte_perplexity", "bits_per_byte")
        config |= {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "text",
            "num_fewshot": 0,
        }
        return config | {"metric_list": [{"metric": metric} for metric in metrics]}
    if "images" in task.rows[0]:
        return config | image_tasks.config_of_images() | task.fields
    config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    config["fewshot_split"] = "test"  # unless it is named, a question may be among its own examples
    config["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ]
    return config | task.fields


# --- files ------------------------------------------------------------------------------------------------


def read_tasks(folder: Path, names: Collection[str] | None = None) -> dict[str, LocalTask | Text]:
    """Read tasks and texts of a folder, by name, in alphabetical order: those that are named, or all.

    Raises:
        LayerPruneError: The folder has none, or one is invalid; the message names the line.
    """
    return {
        name: read_task(path) if path.suffix == ".jsonl" else read_text(path)
        for name, path in task_files(folder).items()
        if names is None or name in names
    }


def task_files(folder: Path) -> dict[str, Path]:
    """The files of tasks (`.jsonl`) and texts (`.txt`) in a folder, by name, in alphabetical order.

    Raises:
        LayerPruneError: The folder has none, or two of the same name.
    """
    if not folder.is_dir():
        raise LayerPruneError(f"{folder} is not a folder; specify one with .jsonl files (tasks) or .txt files (texts)")
    files: dict[str, Path] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*.txt")]):
        if path.stem in files:
            raise LayerPruneError(f"{path} and {path.with_suffix('.jsonl')} have the same name; rename one")
        files[path.stem] = path
    if not files:
        raise LayerPruneError(f"{folder} has no .jsonl file (a task) and no .txt file (a text); choose another folder")
    return files


def read_task(path: Path) -> LocalTask:
    """Read a `.jsonl` file of questions.

    Raises:
        LayerPruneError: A line is not a valid question.
    """
    rows: list[dict[str, Any]] = []
    about_images = False
    for where, row in read_rows(path, text_file.MAX_TEXT):
        about_images = about_images or (not rows and image_tasks.has_images(row))
        if (problem := image_tasks.problem_of(row) if about_images else _problem_of(row)) is not None:
            raise LayerPruneError(f"{where}: {problem}")
        if about_images:
            rows.append(image_tasks.to_row(row, path.parent, where))
        else:
            rows.append({name: row[name] for name in ("query", "choices", "gold")})
    if not rows:
        raise LayerPruneError(f"{path} has no questions; put one on each line")
    hashed = image_tasks.files_hash(path, rows if about_images else [])
    return LocalTask(path.stem, rows, _prompt(path, rows), hashed)


def _problem_of(row: Any) -> str | None:
    if image_tasks.has_images(row):
        return "this question has an image, and those before it have none; put them into files of their own"
    if not isinstance(row, dict) or not {"query", "choices", "gold"} <= row.keys():
        return 'a question is {"query": "...", "choices": ["...", "..."], "gold": 0}'
    if blank := image_tasks.blank_text(row, "query"):
        return blank
    choices, gold = row["choices"], row["gold"]
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
    fields |= text_file.read_yaml(sidecar)
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
