"""`benchmarks/gpu.py` in its dry run on the CPU: steps that leave results, are not repeated, and become a page."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import gpu

from gpu_parts import expected, report  # isort: skip (benchmarks/gpu.py puts its folder on the path)

ROOT = Path(__file__).parents[1]


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    command += ["--results", str(folder / "results"), "--work", str(folder / "work")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def test_two_steps_of_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, "--tiny", "--part", "c", "f", "--only", "c-cut", "f-fsdp2")
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "results" / "c-cut.json"
    found = json.loads(path.read_text())
    assert found["tiny"]
    assert found["machine"]["torch"] == torch.__version__
    assert found["result"]["cold_seconds"] > 0
    assert 0 < found["result"]["kept_bytes"] < 2e6
    assert "f-fsdp2: " in done.stdout
    assert "needs CUDA GPUs" in done.stdout
    assert [one.name for one in path.parent.glob("*.json")] == ["c-cut.json"]
    page = (tmp_path / "results" / "gpu.md").read_text()
    assert "the numbers mean nothing" in page
    assert "| cut, cold |" in page
    assert "Computed, not measured" in page

    before = path.stat().st_mtime_ns
    words = ["--tiny", "--part", "c", "--only", "c-cut", "--results", str(path.parent), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    capsys.readouterr()
    gpu.main()
    assert "c-cut: done before" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--part", "c", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit, match="torch finds no CUDA GPU here; --tiny is a dry run on the CPU"):
        gpu.main()


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--work", str(tmp_path)])
    start = time.monotonic()
    found = gpu.in_a_process(gpu.Step("c-drive", lambda setting: {}, 1, "it goes on later"), 0.2)
    assert found["unfinished"] == "not done after 0 s; it goes on later"
    assert time.monotonic() - start < 20
    assert not [child for child in psutil.Process().children(recursive=True) if "c-drive" in child.cmdline()]


def test_the_page_as_it_is_without_results(tmp_path: Path) -> None:
    """docs/gpu.md is what the command writes from the results that there are: none yet."""
    written = report.PAGE.read_text()
    page = tmp_path / "gpu.md"
    report.write(tmp_path, page)
    if report.NOT_RUN in written:
        assert page.read_text() == written


def test_steps_fit_into_a_part() -> None:
    names = [step.name for make in gpu.PARTS.values() for step in make(10)]
    assert len(names) == len(set(names))
    for part, make in gpu.PARTS.items():
        assert all(step.name.startswith(part) and step.minutes < 8 for step in make(10))


def test_expected_hours_and_memory() -> None:
    """By hand for lm_head+last3 of Llama-3.1-8B: 21 layers once, 3 layers and the head three times in two epochs."""
    llama = expected.MODELS[-1]
    hours, memory = expected.expected(llama, "lm_head+last3", 0.5, 1e15)
    a_token = 2e6 * (21 * 218.1 + 2 * 3 * (3 * 218.1 + 525.3 * expected.LABELLED))
    assert hours == pytest.approx(a_token * expected.ROWS * expected.LENGTH / 0.5e15 / 3600)
    frozen_pass = 2 * (21 * 218.1 + 525.3) + 4 * (3 * 218.1 + 525.3)
    training = 16 * (3 * 218.1 + 525.3) + 2 * 525.3
    assert memory == pytest.approx(max(frozen_pass, training) / 1e3 + 6)
    figures: list[Any] = [expected.expected(llama, method, 0.5) for method in expected.METHODS[:4]]
    assert figures == sorted(figures)
