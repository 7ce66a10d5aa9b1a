"""`benchmarks/gpu.py` in its dry run on the CPU: steps that leave results, are not repeated, and become a page."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from benchmarks import gpu
from hf_layerprune.runtime.parts import cache_of

from .measure_models import write_tasks

from gpu_parts import decoding, expected, report  # isort: skip (benchmarks/gpu.py puts its folder on the path)
from gpu_parts.steps import ROOT, Setting, environment  # isort: skip


def run(folder: Path, *words: str, seconds: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words]
    command += ["--results", str(folder / "results"), "--work", str(folder / "work")]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds)


def test_two_steps_of_a_dry_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run(tmp_path, "--tiny", "--part", "c", "e", "--only", "c-cut", "e-tenth-2")
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "results" / "dry_run" / "c-cut.json"  # where a real run does not look
    found = json.loads(path.read_text())
    assert found["tiny"]
    assert found["machine"]["torch"] == version("torch")
    assert 0 < found["result"]["cold_seconds"] < 2 * found["result"]["warm_seconds"] + 2, "imports were timed"
    assert 0 < found["result"]["kept_bytes"] < 2e6
    assert 'e-tenth-2: {"not here": "round 1 is not there yet"' in done.stdout
    assert [one.name for one in path.parent.glob("*.json")] == ["c-cut.json"]
    page = path.with_name("gpu.md").read_text()
    assert "the numbers mean nothing" in page
    assert "| cut, cold |" in page
    assert "Computed, not measured" in page

    before = path.stat().st_mtime_ns
    folders = ["--results", str(tmp_path / "results"), "--work", str(tmp_path)]
    words = ["--tiny", "--part", "c", "--only", "c-cut", *folders]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    capsys.readouterr()
    gpu.main()
    assert "c-cut: done before" in capsys.readouterr().out
    assert path.stat().st_mtime_ns == before


@pytest.mark.parametrize("part", ["b", "c", "d"])
def test_the_steps_of_a_part(part: str, tmp_path: Path) -> None:
    """In this process, as `gpu.py` runs them in processes of their own."""
    setting = Setting(tiny=True, work=tmp_path)
    steps = gpu.PARTS[part](1)
    for step in steps[:2] if part == "d" else steps:  # the others of d differ in the batch alone
        found = step.run(setting)
        assert json.loads(json.dumps(found)) == found, step.name
        assert found.get("peak_bytes", 1) > 0, step.name


def test_compiled_decoding_has_one_static_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` compiles nothing without; for a new one in each call, CUDA graphs would be recorded while it is timed."""
    seen: list[Any] = []
    plain = decoding.random_model

    def watched(*args: Any) -> Any:
        model = plain(*args)
        model.register_forward_hook(lambda model, _, output: seen.append((model, cache_of(output))))
        return model

    monkeypatch.setattr(decoding, "random_model", watched)
    decoding.run(True, (1,), Setting(tiny=True, work=tmp_path))
    found = {(id(model), id(cache)) for model, cache in seen if type(cache).__name__ == "StaticCache"}
    assert len(found) == len({model for model, _ in found}) == len({cache for _, cache in found}) == 2


def test_processes_find_what_this_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "carried")
    assert environment()["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "carried"]
    monkeypatch.delenv("PYTHONPATH")
    assert environment()["PYTHONPATH"] == str(ROOT)


@pytest.mark.processes
def test_steps_that_start_processes(tmp_path: Path) -> None:
    setting = Setting(tiny=True, work=tmp_path, data=write_tasks(tmp_path / "data", 4), rounds=1)
    steps = {step.name: step for part in "ae" for step in gpu.PARTS[part](1)}
    names = ["a-tests", "e-quarter-1", "e-quarter-1-measured"]
    found = {name: json.loads(json.dumps(steps[name].run(setting))) for name in names}
    assert found["a-tests"]["passed"] > 0
    assert "failed" not in found["a-tests"]
    assert found["e-quarter-1"]["tokens"] == 8 * 16
    assert any({"cut", "dense"} <= sides.keys() for sides in found["e-quarter-1-measured"].values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--part", "c", "--results", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit, match="torch finds no CUDA GPU here; --tiny is a dry run on the CPU"):
        gpu.main()


def test_a_step_that_takes_too_long_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--tiny", "--work", str(tmp_path)])
    start = time.monotonic()
    found = gpu.run_in_subprocess(
        gpu.Step("c-drive", lambda setting: {}, 1, "it goes on later"), 0.02
    )  # before Python is up
    assert found["unfinished"] == "not done after 0 s; it goes on later"
    assert time.monotonic() - start < 20
    assert not [child for child in psutil.Process().children(recursive=True) if "c-drive" in child.cmdline()]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_step_ends_with_the_command(sent: signal.Signals, tmp_path: Path) -> None:
    words = ["--tiny", "--part", "c", "--only", "c-cut", "--results", str(tmp_path), "--work", str(tmp_path)]
    command = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words], stderr=subprocess.DEVNULL
    )
    process, end = psutil.Process(command.pid), time.monotonic() + 60
    while not (steps := process.children()):
        assert time.monotonic() < end
        time.sleep(0.01)
    command.send_signal(sent)
    assert command.wait(20)
    assert not psutil.wait_procs(steps, timeout=2)[1]  # the step itself takes longer


def test_workers_in_sessions_of_their_own_are_ended_too() -> None:
    worker = "import subprocess, sys, time\n{}print('up', flush=True)\ntime.sleep(600)"
    words = [sys.executable, "-c", worker.format("")]
    code = worker.format(f"subprocess.Popen({words}, start_new_session=True, stdout=sys.stderr)\n")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    gpu.kill_tree(process)
    process.wait(20)
    assert not psutil.wait_procs(started, timeout=20)[1]


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
