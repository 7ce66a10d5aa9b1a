"""The checkpoints of an interrupted run, and what they say of its settings."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

from transformers import TrainerCallback
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from ..cut.header import read_header
from ..errors import CheckpointError

logger = logging.getLogger(__name__)

_STATE = "hf_layerprune"  # in a checkpoint's trainer_state.json, beside the state of callbacks


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in the output folder of a run; those that were not written to the end are skipped."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*"))
    for _, path in sorted(((int(match[1]), path) for match, path in named if match), reverse=True):
        # transformers writes this file last
        if (path / TRAINER_STATE_NAME).is_file() and find_damaged_file(path) is None:
            return str(path)
        logger.warning("%s is incomplete and is skipped", path)
    return None


def find_damaged_file(checkpoint: Path) -> Path | None:
    """A file that was cut off, as by a full disk or a power failure, if there is one. Only ends and headers are read."""
    for path in sorted(checkpoint.iterdir()):
        try:
            if path.suffix == ".safetensors":
                read_header(path)
            elif path.name == TRAINER_STATE_NAME:
                json.loads(path.read_text())
            elif path.suffix in (".pt", ".pth") and not is_zipfile(path):  # as torch writes it
                return path
        except (OSError, ValueError, CheckpointError):
            return path
    return None


def checkpoint_to_resume(named: str | bool | None, folder: str) -> str | None:
    """The checkpoint from which training goes on; `None` if it starts from the beginning.

    Args:
        named (`str` or `bool`, *optional*): A checkpoint; or `True`, also as a word, for the last complete one.
        folder (`str`): The output folder of the run.

    Raises:
        CheckpointError: It is not a checkpoint, is damaged, or has no state of the optimizer.
    """
    word = str(named).lower()  # from a command line
    if word in ("none", "false", ""):
        return None
    path = last_checkpoint(folder) if word == "true" else os.path.expanduser(str(named))
    if path is None:
        logger.info("no checkpoint in %s yet: training starts from the beginning", folder)
    elif not (Path(path) / TRAINER_STATE_NAME).is_file():
        raise CheckpointError(
            f"{path} is not a checkpoint; specify a folder checkpoint-N, or use --resume_from_checkpoint true for the last one"
        )
    elif (damaged := find_damaged_file(Path(path))) is not None:
        raise CheckpointError(f"{damaged} is damaged; specify an earlier checkpoint, or start in another --output_dir")
    elif not any((Path(path) / name).is_file() for name in (SCHEDULER_NAME, "latest")):  # DeepSpeed's own, too
        raise CheckpointError(
            f"{path} has no state of the optimizer and the schedule, as with --save_only_model, so training can't go on "
            "from it; start in another --output_dir"
        )
    return path


class RunSettings(TrainerCallback):
    """Records a run's settings and data in its checkpoints, so that a resumed run can tell what has changed."""

    def __init__(self, settings: dict[str, Any], data: list[dict[str, Any]]) -> None:
        self.settings, self.data, self.resumed = settings, data, list[dict[str, Any]]()

    def changed_settings(self, settings: dict[str, Any], data: Any) -> dict[str, Any]:
        """The earlier values of the settings, and of the data, that have changed; `None` for one that was not recorded."""
        before, now = settings | {"data": data}, self.settings | {"data": self.data}
        return {name: before.get(name) for name in sorted(before | now) if before.get(name) != now.get(name)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        known = state.stateful_callbacks.get(_STATE) or {"settings": self.settings, "data": self.data, "resumed": []}
        self.resumed = [*known["resumed"]]
        if others := self.changed_settings(known["settings"], known["data"]):
            logger.warning("training goes on with settings that have changed: %s", ", ".join(others))
            self.resumed.append({"after_step": state.global_step, "settings_before": others})
        state.stateful_callbacks[_STATE] = {"settings": self.settings, "data": self.data, "resumed": self.resumed}
