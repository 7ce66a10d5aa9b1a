"""Whatever a file holds, a command ends with exit code 0, 1 or 2 and one line: never a traceback, never a question.

A few cases of each kind of file run with the other tests; `make fuzz` (`pytest -m fuzz`) runs 2,000 of each.
"""

from __future__ import annotations

import os
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st

from hf_layerprune.cli import main

from .fuzz_kinds import KINDS, Sound

RECIPE = Path(__file__).parents[1] / "recipes" / "sft_tail.py"
MEMORY = 12 << 30  # bytes of address space for one process: what a file claims must not decide how much is taken
CASES = int(os.environ.get("HF_LAYERPRUNE_FUZZ_CASES", "2000"))
SECONDS = int(os.environ.get("HF_LAYERPRUNE_FUZZ_SECONDS", "120"))  # for one case on a busy machine


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    return Sound(tmp_path_factory.mktemp("sound"))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"a command took more than {SECONDS} s")


def _run_recipe(words: list[str]) -> int:
    """Run the recipe as Python does, in this process."""
    before = sys.argv
    sys.argv = [str(RECIPE), *words]
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    finally:
        sys.argv = before
    return 0


def check(sound: Sound, kind: str, data: st.DataObject, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One damaged file, one command."""
    where, damage, commands = KINDS[kind]
    path = where(sound)
    content = data.draw(damage(path.read_bytes()))
    words = data.draw(st.sampled_from(commands(sound)))
    shutil.rmtree(work, ignore_errors=True)
    if path.parent == sound.root:
        (work / "in").mkdir(parents=True)
    else:
        shutil.copytree(path.parent, work / "in")
    (work / "in" / path.name).write_bytes(content)
    words = [word.replace("{}", str(work / "in")).replace("{out}", str(work / "out")) for word in words]
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        code = _run_recipe(words[1:]) if words[0] == "recipe" else main(words)
    except SystemExit as end:
        code = end.code
    finally:
        signal.alarm(0)
    out, err = capsys.readouterr()
    said = [
        line for line in err.splitlines() if line.startswith(("hf-layerprune: ", "error: ", "sft_tail.py: error: "))
    ]
    assert code in (0, 1, 2), err
    assert "Traceback" not in err
    assert "internal error" not in err, err[-500:]
    assert "took more than" not in err, err[-500:]
    assert "out of memory" not in err, err[-500:]
    assert len(said) == 1 if code and words[0] not in ("verify", "push") else len(said) <= 1, (code, err)
    assert "\x1b" not in out + err.replace("\x1b[1m", "").replace("\x1b[0m", "")


@pytest.fixture(autouse=True)
def _memory_ends() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


# Training takes a second, so fewer of what only the recipe reads run with the other tests.
SLOW = {"settings of the recipe", "training rows", "training chats"}


def run(sound: Sound, kind: str, cases: int, work: Path, capsys: pytest.CaptureFixture[str], *, same: bool) -> None:
    """Try out many damaged files; with `same`, those that every run tries out. Otherwise say how many there were."""
    done, start = 0, time.monotonic()

    @settings(
        max_examples=cases, derandomize=same, database=None, report_multiple_bugs=False, deadline=None,
        suppress_health_check=list(HealthCheck), phases=[Phase.generate],  # to shrink a case takes longer than to find it
    )  # fmt: skip
    @given(st.data())
    def one(data: st.DataObject) -> None:
        nonlocal done
        check(sound, kind, data, work, capsys)
        done += 1
        if not same and (done % 200 == 0 or done == cases):
            with capsys.disabled():
                print(f"{kind}: {done} cases in {time.monotonic() - start:.0f} s", flush=True)

    one()


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_breaks_a_command(sound: Sound, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(sound, kind, 3 if kind in SLOW else 8, tmp_path / "work", capsys, same=True)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_no_file_breaks_a_command_at_length(
    sound: Sound, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(sound, kind, CASES, tmp_path / "work", capsys, same=False)
