"""Part a: the tests that need a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

from .steps import ROOT, Setting, Step, environment


def steps(rounds: int) -> list[Step]:
    return [Step("a-tests", run, 7.5)]


def run(setting: Setting) -> dict[str, Any]:
    """Run `pytest -m gpu`. A failure fails the step."""
    words = [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "gpu", "-vv"]
    env = environment()
    if setting.tiny:
        env["HF_LAYERPRUNE_GPU_TESTS_ON"] = "cpu"
        words += ["-k", "prune_with or fp16"]
    done = subprocess.run([*words, "tests/test_gpu.py"], cwd=ROOT, env=env, capture_output=True, text=True)
    outcomes = re.findall(r"(PASSED|FAILED|SKIPPED|ERROR)", done.stdout.partition("short test summary")[0])
    if done.returncode:
        raise RuntimeError(done.stdout[-3000:])
    return {name.lower(): outcomes.count(name) for name in sorted(set(outcomes))}
