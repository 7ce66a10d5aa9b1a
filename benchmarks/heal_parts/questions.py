"""Accuracy on multiple-choice questions, by `hf-layerprune eval`, and how much of the dense model's margin is left."""

from __future__ import annotations

import json
from pathlib import Path

# Accuracy of guessing. The questions are `NAME.jsonl` in the data folder.
CHANCE = {"piqa": 0.5, "arc_easy": 0.25, "openbook_qa": 0.25}


def accuracy(folder: Path, data: Path, limit: int) -> dict[str, float]:
    """Length-normalised accuracy by task.

    Args:
        folder: The model.
        data: The folder of tasks.
        limit: How many questions of each.
    """
    from hf_layerprune.cli import main

    output = folder.with_name(f"{folder.name}-questions.json")  # a model is only read
    output.unlink(missing_ok=True)  # of an earlier model in the same folder
    words = ["eval", str(folder), "--tasks-from", str(data), "--tasks", ",".join(CHANCE), "--limit", str(limit)]
    if main([*words, "--text", "none", "--output", str(output), "--quiet"]):
        raise SystemExit(f"the questions could not be put to {folder}")
    results = json.loads(output.read_text())["results"]
    return {one["task"]: one["value"] for one in results if one["metric"] == "acc_norm"}


def margin_left(found: dict[str, float], dense: dict[str, float]) -> float:
    """The mean over tasks of (accuracy - chance) / (the dense model's - chance)."""
    shares = [(found[task] - chance) / (dense[task] - chance) for task, chance in CHANCE.items()]
    return sum(shares) / len(shares)
