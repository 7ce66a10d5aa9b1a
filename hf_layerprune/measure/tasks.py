r"""The tasks of an evaluation: the harness's own by name, and files in a folder, which become tasks of the harness.

    tasks = load_tasks(["piqa", "mmlu"])           # tasks of lm-evaluation-harness; "paper" means eight of them
    tasks = load_tasks(None, Path("my-tasks"))     # every *.jsonl in the folder

A line of a `.jsonl` file is one question: `{"query": "...", "choices": ["...", "..."], "gold": 0}`. The model scores
`query + " " + choice`; if every query of a file begins with "Question: ", "\nAnswer:" is appended to the query. A YAML
file of the same name may set the harness's `doc_to_text`, `target_delimiter`, `description` and `metadata`, and nothing
else. The first three are Jinja templates, which run in Jinja's sandbox: a folder of tasks can't run code. Questions
about images, whose answers the model writes, have the form that [`.image_tasks`] describes. A `.txt` file is a text, on
which perplexity and distance are measured.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.documents import refuse_postscript
from ..errors import CutError, LayerPruneError, boundary
from ..files import text_file
from ..files.json_file import check_schema
from ..files.json_rows import read_rows
from ..screen import progress_bar
from . import image_tasks

if TYPE_CHECKING:
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks.manager import TaskDict

# The eight tasks of arXiv:2411.15558: zero-shot, without a chat template.
PAPER = ("piqa", "hellaswag", "openbookqa", "arc_easy", "arc_challenge", "mmlu", "cmmlu", "winogrande")

SEED = 1234  # the harness's own default

_CHOICES = "at least two texts, none of them empty"
_QUESTION_SCHEMA = {
    "errorMessage": 'a question is {"query": "...", "choices": ["...", "..."], "gold": 0}',
    "type": "object",
    "required": ["query", "choices", "gold"],
    "properties": {
        "query": image_tasks.TEXT,
        "choices": {"type": "array", "minItems": 2, "items": image_tasks.TEXT | {"errorMessage": _CHOICES}}
        | {"errorMessage": _CHOICES},
        "gold": {"type": "integer", "minimum": 0, "errorMessage": "the index of the right choice, counted from 0"},
    },
}
_SIDECAR_SCHEMA = {
    "errorMessage": "only texts doc_to_text, target_delimiter and description, and a mapping metadata, can be set",
    "properties": {
        **{name: {"type": "string"} for name in ("doc_to_text", "target_delimiter", "description")},
        "metadata": {"type": "object"},
    },
    "additionalProperties": False,
}


@dataclass(frozen=True)
class LocalTask:
    """Questions in a file: multiple-choice, or about images.

    Args:
        name (`str`): The file's name without `.jsonl`.
        rows (`list[dict]`): `query`, `choices` and `gold` of each question; or `query`, `answer` and `images`.
        fields (`dict[str, Any]`): The fields of the harness's YAML that set the prompt.
        dataset (`str`): The sha256 of the file, and of the images of its questions that are asked.
    """

    name: str
    rows: list[dict[str, Any]]
    fields: dict[str, Any]
    dataset: str


def load_tasks(
    names: Sequence[str] | None, folder: Path | None = None, limit: int | None = None
) -> dict[str, TaskDict]:
    """Find and load tasks. Errors in them are reported here, before a model is loaded.

    Args:
        names (`Sequence[str]`, *optional*): Tasks, groups, tags or patterns of the harness, files of `folder` without
            their extension, or `"paper"`. By default every `.jsonl` file of `folder`.
        folder (`Path`, *optional*): A folder with task files.
        limit (`int`, *optional*): Number of questions of each task that will be asked; by default all. Images of others
            are not read.

    Returns:
        `dict[str, TaskDict]`: What the harness loaded, by name: a task, or a group with its tasks.

    Raises:
        CutError: A task is unknown.
        LayerPruneError: Its data is not available, or a file is not a valid task.
    """
    paths = task_files(folder, ".jsonl") if folder else {}
    if names is None:
        names = list(paths)
    wanted = list(dict.fromkeys(name for one in names for name in (PAPER if one == "paper" else (one,))))
    files = {name: read_task(paths[name], limit) for name in wanted if name in paths}
    if not wanted:
        return {}
    require_harness()
    refuse_postscript()  # the harness reads a first row when it loads a task
    loaded: dict[str, TaskDict] = {}
    theirs = [match for name in wanted if name not in files for match in _match_tasks(name, list(paths), folder)]
    for name in theirs:
        with boundary(
            f"can't load task {name}", "go online, or specify files with --tasks-from FOLDER", LayerPruneError
        ):
            found = _task_manager().load([name])
        alone = {one: _task_dict(task) for one, task in found["tasks"].items()}  # of a tag, each task on its own
        loaded |= {name: found} if name in found["groups"] else alone
    for name in (one for one in wanted if one in files):
        with boundary(f"can't load task {name}", kind=LayerPruneError):
            loaded[name] = _task_dict(_to_harness_task(files[name]))
    return loaded


def task_dataset(task: TaskDict) -> str:
    """The Hub id of a task's data, or the sha256 of its file."""
    return str(next((one.config.dataset_path for one in task["tasks"].values()), ""))


# --- the harness -------------------------------------------------------------------------------------------


def require_harness() -> None:
    """Check that lm-evaluation-harness is installed; make it use a sandbox for templates, our progress bars, and few words."""
    if importlib.util.find_spec("lm_eval") is None:
        raise LayerPruneError('tasks need lm-evaluation-harness: pip install "hf-layerprune[eval]"')
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.hf_vlms
    import lm_eval.models.huggingface
    import lm_eval.utils

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm_eval.utils.env = sandbox()
    lm_eval.utils.env.filters["regex_replace"] = lm_eval.utils.regex_replace
    for module in (lm_eval.api.model, lm_eval.api.task, lm_eval.models.hf_vlms, lm_eval.models.huggingface):
        module.tqdm = lambda *args, **words: progress_bar(*args, **words | {"disable": None})


def sandbox() -> SandboxedEnvironment:
    """A Jinja environment with the harness's settings, in which templates can't reach Python objects."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)


@cache
def _task_manager() -> TaskManager:
    """The harness's index of its tasks, which takes seconds to build."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _match_tasks(name: str, files: Sequence[str], folder: Path | None) -> list[str]:
    """The harness's tasks of a name or a pattern."""
    known = dict.fromkeys(_task_manager().all_tasks)
    if matches := [name] if name in known else _task_manager().match_tasks([name]):
        return matches
    near = difflib.get_close_matches(name, ["paper", *files, *known], n=3, cutoff=0.5)
    where = (
        f"neither a task of lm-evaluation-harness nor a .jsonl file in {folder}"
        if folder
        else "not a task of the harness"
    )
    way_out = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists all"
    raise CutError(f"{name!r} is {where}; {way_out}")


def _task_dict(task: Any) -> TaskDict:
    return {"tasks": {task.task_name: task}, "groups": {}, "group_map": {}}


def _to_harness_task(task: LocalTask) -> Any:
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    data = {"test": Dataset.from_list(task.rows)}
    place = {"custom_dataset": lambda **_: data, "dataset_path": task.dataset}
    return ConfigurableTask(config=task_config(task) | place)


def task_config(task: LocalTask) -> dict[str, Any]:
    """The harness's config for a local task, without the place of its rows."""
    config: dict[str, Any] = {"task": task.name, "test_split": "test", "metadata": {"version": 1.0}}
    if "images" in task.rows[0]:
        return config | image_tasks.image_task_config() | task.fields
    config |= {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
    config["fewshot_split"] = "test"  # unless it is named, a question may be among its own examples
    config["metric_list"] = [
        {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
    ]
    return config | task.fields


# --- files ------------------------------------------------------------------------------------------------


def task_files(folder: Path, suffix: str) -> dict[str, Path]:
    """The files of tasks (`.jsonl`) or texts (`.txt`) in a folder, by name, in alphabetical order.

    Raises:
        LayerPruneError: The folder has neither tasks nor texts, or two of the same name.
    """
    if not folder.is_dir():
        raise LayerPruneError(f"{folder} is not a folder; specify one with .jsonl files (tasks) or .txt files (texts)")
    paths = sorted([*folder.glob("*.jsonl"), *folder.glob("*.txt")], key=lambda path: path.stem)
    if not paths:
        raise LayerPruneError(f"{folder} has no .jsonl file (a task) and no .txt file (a text); choose another folder")
    for one, next_one in pairwise(paths):
        if one.stem == next_one.stem:
            raise LayerPruneError(f"{one} and {next_one} have the same name; rename one")
    return {path.stem: path for path in paths if path.suffix == suffix}


def read_task(path: Path, limit: int | None = None) -> LocalTask:
    """Read a `.jsonl` file of questions. Only the images of the first `limit` are read.

    Raises:
        LayerPruneError: A line is not a valid question.
    """
    from jsonschema import Draft202012Validator

    rows: list[dict[str, Any]] = []
    for where, row in read_rows(path, text_file.MAX_TEXT):
        if not rows:
            about_images = image_tasks.has_images(row)
            schema = Draft202012Validator(image_tasks.QUESTION if about_images else _QUESTION_SCHEMA)
        if image_tasks.has_images(row) != about_images:
            raise LayerPruneError(f"{where}: put questions with images and those without into files of their own")
        check_schema(row, schema, where)
        if about_images:
            is_asked = limit is None or len(rows) < limit
            rows.append(image_tasks.to_harness_row(row, path.parent, where, read_images=is_asked))
            continue
        if (last := len(row["choices"]) - 1) < row["gold"]:
            raise LayerPruneError(f"{where}: gold is {row['gold']}, but the choices are 0..{last}")
        rows.append({"query": row["query"], "choices": row["choices"], "gold": int(row["gold"])})
    if not rows:
        raise LayerPruneError(f"{path} has no questions; put one on each line")
    hashed = image_tasks.files_hash(path, rows[:limit] if about_images else [])
    return LocalTask(path.stem, rows, _prompt_fields(path, rows), hashed)


def _prompt_fields(path: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields of the harness's config that set the prompt: the defaults, and those of the YAML file beside it."""
    from jsonschema import Draft202012Validator

    asks = all(row["query"].startswith("Question: ") for row in rows)
    fields: dict[str, Any] = {"doc_to_text": "{{query}}\nAnswer:" if asks else "query"}
    sidecar = path.with_suffix(".yaml")
    if not sidecar.is_file():
        return fields
    fields |= text_file.read_yaml(sidecar)
    check_schema(fields, Draft202012Validator(_SIDECAR_SCHEMA), str(sidecar))
    for name, value in fields.items():
        if isinstance(value, str) and value not in rows[0]:
            with boundary(f"{sidecar}: the template {name} can't be used", kind=LayerPruneError):
                sandbox().from_string(value).render(**rows[0])
    return fields
