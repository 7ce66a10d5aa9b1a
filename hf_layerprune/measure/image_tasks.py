"""Tasks that ask about images: which of them can be run, on which models, and the user's own in files.

A line of a `.jsonl` file about images is `{"query": "...", "answer": "...", "image": "a.png"}`, or `"images": [...]`;
paths are relative to the file. The model writes a line, which is right if it equals the answer but for case and
punctuation. The harness's `hf-multimodal` runs such tasks, and those of its own that ask for a text, such as `mmmu_val`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration.documents import IMAGE_COLUMNS, open_image
from ..errors import CutError, LayerPruneError, boundary
from ..options import pluralize
from ..runtime.model_class import auto_class_of

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict

    from .subject import Subject

# Where an image stands in a prompt; the harness puts the model's own token there.
IMAGE_PLACEHOLDER = "<image>"
TEXT = {"type": "string", "pattern": r"\S", "errorMessage": "a text that is not empty"}
_PATHS = {"errorMessage": "image is the path of an image, and images a list of paths"}
_PATH = {"type": "string", "minLength": 1} | _PATHS
QUESTION = {
    "errorMessage": 'a question about an image is {"query": "...", "answer": "...", "image": "a.png"}',
    "type": "object",
    "required": ["query", "answer"],
    "properties": {
        "query": TEXT,
        "answer": TEXT,
        "image": _PATH,
        "images": {"type": "array", "minItems": 1, "items": _PATH} | _PATHS,
    },
}


# --- whose tasks, on which models ------------------------------------------------------------------------


def is_multimodal_task(task: TaskDict) -> bool:
    """Whether a task gives the model images or audio along with the text."""
    return any(getattr(one, "MULTIMODAL", False) for one in task["tasks"].values())


def check_media_tasks(tasks: Mapping[str, TaskDict], subjects: Sequence[Subject], shots: int | None) -> None:
    """Refuse tasks about images that can't be run, before a model is loaded.

    Raises:
        CutError: A model reads text alone, or few-shot examples are asked for.
        CheckpointError: A model has no processor that can be loaded.
    """
    first = next((name for name, task in tasks.items() if is_multimodal_task(task)), None)
    if first is None:
        return
    if shots:
        raise CutError(f"task {first} asks about images, but its few-shot examples have none; omit num_fewshot")
    for subject in subjects:
        config = subject.config()
        if image_token(config) is None:
            raise CutError(
                f"task {first} asks about images, and {subject.name} is a {config.model_type} model that reads none; omit "
                "the task, or specify a model that reads images"
            )
        subject.processor()


def image_token(config: Any) -> int | None:
    """The token in whose places the harness puts images; `None` for a model that is loaded without a tower."""
    from transformers import AutoModelForCausalLM

    if auto_class_of(config) is AutoModelForCausalLM:
        return None
    token: Any = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    return token if isinstance(token, int) else None


# --- the user's own --------------------------------------------------------------------------------------


def has_images(row: Any) -> bool:
    """Whether a line of a file of questions has a place for images."""
    return isinstance(row, dict) and any(name in row for name in IMAGE_COLUMNS)


def to_harness_row(row: dict[str, Any], folder: Path, where: str, *, read_images: bool = True) -> dict[str, Any]:
    """Turn a question about images into what the harness gets.

    That is a `query` with a place for each image, an `answer`, and the paths of `images`. The paths in the row are relative
    to the folder. Images of a question that will not be asked are not read.

    Raises:
        LayerPruneError: An image does not exist or can't be read, or the query does not have one placeholder for each.
    """
    paths = [folder / path for path in row.get("images") or [row["image"]]]
    places = row["query"].count(IMAGE_PLACEHOLDER)
    if places not in (0, len(paths)):
        raise LayerPruneError(f"{where}: query has {pluralize(places, 'place')} for {pluralize(len(paths), 'image')}")
    for path in paths if read_images else ():
        if not path.is_file():
            raise LayerPruneError(f"{where} names the image {path}, which is not a file")
        with boundary(f"{where}: the image {path} can't be read", kind=LayerPruneError):
            open_image(path)
    query = row["query"] if places else f"{IMAGE_PLACEHOLDER}\n" * len(paths) + row["query"]
    return {"query": query, "answer": row["answer"], "images": [str(path) for path in paths]}


def files_hash(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    """The sha256 over a file of questions and its images."""
    digest = hashlib.sha256(path.read_bytes())
    for image in (image for row in rows for image in row["images"]):
        digest.update(hashlib.sha256(Path(image).read_bytes()).digest())
    return digest.hexdigest()


def image_task_config() -> dict[str, Any]:
    """The fields of the harness's config for the user's questions about images."""
    return {
        "output_type": "generate_until",
        "doc_to_image": _open_images,
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 32, "do_sample": False},
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": True,
                "regexes_to_ignore": [r"^\s+", r"\s+$"],
            }
        ],
    }


def _open_images(row: dict[str, Any]) -> list[Any]:
    return [open_image(path) for path in row["images"]]


def replace_images(value: Any) -> Any:
    """The same value with each image replaced by the hash of its pixels, so that equal questions look equal."""
    if isinstance(value, dict):
        return {name: replace_images(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [replace_images(one) for one in value]
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        return (value.mode, value.size, hashlib.sha256(value.tobytes()).hexdigest())
    return value
