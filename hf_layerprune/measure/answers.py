"""Answers by question, kept in a folder, so that no model is asked the same question twice.

The base of ten pruned models answers once, and a run that was broken off goes on. A file holds what one model got in one
task, with everything that the answers depend on: another model (weights, config, tokenizer, ...), other prompts, settings
or versions find no such file.
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


class Answers:
    """The answers in a folder.

    Args:
        folder (`Path`, *optional*): The folder, made if need be; without one nothing is kept.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def find(self, key: dict[str, Any]) -> TaskRun | None:
        """What was answered before.

        Args:
            key (`dict[str, Any]`): Everything that the answers depend on.

        Returns:
            `TaskRun`, *optional*: `None` where there is nothing, or it is damaged.
        """
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        from .harness import Score, TaskRun

        try:
            data = read_object(path, max_bytes=_MAX_BYTES)
            if data["key"] != key:
                return None
            run = data["run"]
            scores = {metric: Score(**score) for metric, score in run.pop("scores").items()}
            answered = TaskRun(**run, scores=scores)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is damaged (%s) and is measured again", path, error)
            return None
        logger.info("%s: answered before, in %s", key["task"], path)
        return answered

    def keep(self, key: dict[str, Any], run: TaskRun) -> None:
        """Keep answers.

        Args:
            key (`dict[str, Any]`): Everything that they depend on.
            run (`TaskRun`): The answers.
        """
        path = self._path(key)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, json.dumps({"key": key, "run": asdict(run)}) + "\n")

    def _path(self, key: dict[str, Any]) -> Path | None:
        if self._folder is None:
            return None
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self._folder / f"{key['task']}-{digest[:16]}.json"
