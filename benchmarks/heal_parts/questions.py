"""Accuracy on multiple-choice questions, by `hf-layerprune eval`, and how much of the dense model's margin is left."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TASKS = ("piqa", "arc_easy", "openbook_qa")  # the questions are `NAME.jsonl` in the data folder


def accuracy(folder: Path, dense: Path, data: Path, limit: int, answers: Path) -> dict[str, float]:
    """Length-normalised accuracy by task, and the share of the dense model's margin over guessing that is left.

    Args:
        folder: The model.
        dense: The dense model, to which the same questions are put.
        data: The folder of tasks.
        limit: How many questions of each.
        answers: A folder for answers, so that the dense model answers once.
    """
    from hf_layerprune.cli import main

    output = folder.with_name(f"{folder.name}-questions.json")  # a model is only read
    output.unlink(missing_ok=True)  # of an earlier model in the same folder
    words = ["eval", str(folder), "--base", str(dense), "--tasks-from", str(data), "--tasks", ",".join(TASKS)]
    words += ["--limit", str(limit), "--text", "none", "--answers", str(answers), "--output", str(output), "--quiet"]
    if main(words):
        raise SystemExit(f"the questions could not be put to {folder}")
    metrics = json.loads(output.read_text())
    scores = [one for one in metrics["results"] if one["metric"] == "acc_norm"]
    differences = [one for one in metrics["comparisons"] if one["metric"] == "acc_norm"]
    found = {one["task"]: one["value"] for one in scores if one["weights"] == metrics["weights"]}
    dense_margins = {
        one["task"]: one["value"] - one["chance"] for one in scores if one["weights"] != metrics["weights"]
    }
    return found | margins_left(differences, dense_margins)


def margins_left(differences: list[dict[str, Any]], dense_margins: dict[str, float]) -> dict[str, float]:
    """The share of the dense model's margin over guessing that is left, with standard errors from paired answers.

    Args:
        differences: For each task, the accuracy minus the dense model's, and the standard error.
        dense_margins: The dense model's accuracy minus that of guessing, by task.

    Returns:
        `margin`: the mean of the tasks' shares. `pooled_margin`: the share of the sum over tasks, on which a task that
        the dense model hardly solves has little influence. Each with its `_stderr`, which takes the dense model's margin
        as exact. Empty if the dense model is no better than guessing on some task: then it has no margin.
    """
    if min(dense_margins.values()) <= 0:
        return {}
    tasks, total = len(dense_margins), sum(dense_margins.values())
    lost = {one["task"]: one["difference"] for one in differences}
    errors = {one["task"]: one["stderr"] for one in differences}
    return {
        "margin": 1 + sum(lost[task] / margin for task, margin in dense_margins.items()) / tasks,
        "margin_stderr": math.hypot(*(errors[task] / margin for task, margin in dense_margins.items())) / tasks,
        "pooled_margin": 1 + sum(lost.values()) / total,
        "pooled_margin_stderr": math.hypot(*errors.values()) / total,
    }
