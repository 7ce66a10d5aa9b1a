"""A cache of answers, so that no model is asked the same question twice.

The base of ten pruned models is evaluated once, and an interrupted run resumes where it stopped. A file holds the results
of one model on one task; another model (weights, config, tokenizer, ...), other prompts, other settings or other versions
have a file of their own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files.copy import write_text
from ..files.json_file import read_object

if TYPE_CHECKING:
    from .harness import TaskRun

logger = logging.getLogger(__name__)

_MAX_BYTES = 512 << 20


def answers_file(folder: Path, key: dict[str, Any]) -> Path:
    """The file for the answers that depend on everything in the key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / f"{key['task']}-{digest[:16]}.json"


def load_answers(path: Path) -> TaskRun | None:
    """Read earlier answers; `None` if there are none, or their file is damaged."""
    if not path.is_file():
        return None
    from .harness import Score, TaskRun

    try:
        run = read_object(path, max_bytes=_MAX_BYTES)
        scores = {metric: Score(**score) for metric, score in run["scores"].items()}
        answered = TaskRun(**run | {"scores": scores})
        numbers = [number for score in scores.values() for number in (score.value, *score.outcomes.values())]
        if not all(isinstance(one, int | float) for one in (run["seconds"], run["samples"], run["shots"], *numbers)):
            raise TypeError("expected a number, found text")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning("%s is damaged (%s), so the task is run again", path, error)
        return None
    logger.info("using the answers in %s", path)
    return answered


def save_answers(path: Path, run: TaskRun) -> None:
    """Save answers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(asdict(run)) + "\n")
