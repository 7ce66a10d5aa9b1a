"""What every engine's script does with its jobs: `SCRIPT JOBS.json ANSWERS.jsonl`. Runs in the engine's own environment."""

import json
import sys
from collections.abc import Callable
from pathlib import Path


def answer(ask: Callable[[dict], dict]) -> None:
    """Ask for every job, and write a line for each as soon as it is there."""
    jobs, answers = sys.argv[1:]

    def say(line: dict) -> None:
        with open(answers, "a") as file:
            file.write(json.dumps(line) + "\n")

    for job in json.loads(Path(jobs).read_text()):
        say({"name": job["name"], "started": True})
        try:
            say({"name": job["name"], **ask(job)})
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            say({"name": job["name"], "error": f"{type(error).__name__}: {lines[0]}"})
