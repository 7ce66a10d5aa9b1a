"""The notebooks run from top to bottom, in kernels of their own, against a stand-in Hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .docs_blocks import ROOT
from .hub_server import HubServer, client_env
from .measure_datasets import write_datasets
from .test_docs import MODEL, write_base

pytestmark = pytest.mark.processes
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_the_notebooks_run(tmp_path: Path) -> None:
    rows = tmp_path / "alpaca"
    rows.mkdir()
    one = {"instruction": "Say where the river runs.", "input": "", "output": "Down the hill."}
    (rows / "alpaca.json").write_text(json.dumps([one] * 200))
    repos = {MODEL: write_base(tmp_path / "base"), "datasets/yahma/alpaca-cleaned": rows}
    repos |= write_datasets(tmp_path / "datasets", questions=2)
    copies = tmp_path / "notebooks"
    for path in NOTEBOOKS:  # each in a folder of its own, as whoever opens one
        (copies / path.stem).mkdir(parents=True)
        (copies / path.stem / path.name).write_bytes(path.read_bytes())
    with HubServer(repos) as server:
        env = client_env(server, tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        # Their first cell finds the package installed; what it needs is not looked up again.
        env |= {"PIP_NO_DEPS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env["PATH"]])
        command = [sys.executable, *"-m pytest -q -p no:xdist --nbmake --nbmake-timeout=600 -c".split(), os.devnull]
        done = subprocess.run([*command, str(copies)], cwd=copies, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"{len(NOTEBOOKS)} passed" in done.stdout


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_stored(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
