"""The checkpoints of an interrupted run."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest complete checkpoint in the output folder of a run; one whose writing was interrupted is skipped."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*"))
    for _, path in sorted(((int(match[1]), path) for match, path in named if match), reverse=True):
        try:  # transformers writes this file last
            json.loads((path / TRAINER_STATE_NAME).read_text())
        except (OSError, ValueError):
            logger.warning("%s is incomplete and is skipped", path)
        else:
            return str(path)
    return None
