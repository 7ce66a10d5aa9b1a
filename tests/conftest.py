from __future__ import annotations

import gc
import logging
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports transformers: no network, no progress bars, no telemetry.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests run in one process per core, so neither they nor their subprocesses need more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import pytest
import torch
import transformers
from filelock import FileLock
from hypothesis import settings

from . import gguf_makers, tiny_models

torch.set_num_threads(1)
gguf_makers.read_once()
# Where a stream of Parquet rows ends, datasets waits for 5 seconds, lest the interpreter end before PyArrow's threads.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# A shell's background jobs ignore Ctrl-C and hand that on to what they start, which some tests stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)
# A test must not fail because the machine is busy.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
tiny_models.on_unusable = pytest.skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="prove each type at every stage; otherwise those that are not representative are proven at the cut and one stage",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("whole_matrix"):
        items[:] = [item for item in items if item.get_closest_marker("whole_matrix") is None]


@pytest.fixture(scope="session")
def whole_matrix(request: pytest.FixtureRequest) -> bool:
    """Whether each type is proven at every stage."""
    return bool(request.config.getoption("whole_matrix"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*words: object) -> str:
        raise AssertionError(f"the terminal was asked: {words}")

    monkeypatch.setattr("builtins.input", refuse)


@pytest.fixture(autouse=True)
def _quiet_ends_with_the_test() -> Iterator[None]:
    logger = logging.getLogger("hf_layerprune")
    level = logger.level
    yield
    if logger.level == logging.ERROR:  # a command with --quiet in this process
        logger.setLevel(level)


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as published, a bfloat16 checkpoint with its tokenizer. Tests must not write to it.

    Unpacking takes a while, so the workers of a run share the folder.
    """
    here = tmp_path_factory.getbasetemp()
    shared = here.parent if "PYTEST_XDIST_WORKER" in os.environ else here
    folder = shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not folder.exists():
            gguf_makers.unpack_smollm2(shared / "smollm2.part").rename(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with its tokenizer. Tests that need another base define their own."""
    from .measure_models import write_model

    return write_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def cut_once(base: Path) -> Path:
    """`base` without layers 3 and 4. Tests must not write to it."""
    from hf_layerprune.cli import main

    folder = base.with_name("cut-once")
    assert main(["prune", str(base), str(folder), "--drop-layers", "3-4"]) == 0
    return folder


@pytest.fixture
def cut(cut_once: Path, tmp_path: Path) -> Path:
    """A copy of `cut_once` to write to."""
    return Path(shutil.copytree(cut_once, tmp_path / "cut"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small tasks and a text."""
    from .measure_models import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Makes trainers for a pruned tiny Llama: a `Bench`."""
    from .heal_makers import Bench

    return Bench(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module", autouse=True)
def _collect_quickly() -> None:
    """Training runs collect garbage again and again, which is faster if what was imported before is left out."""
    gc.collect()
    gc.freeze()
