"""The notebooks run from top to bottom in a kernel, each with names and a folder of its own, against a stand-in Hub."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from .docs_blocks import ROOT
from .hub_server import HubServer, client_env
from .measure_datasets import write_datasets
from .test_docs import MODEL, write_base

pytestmark = pytest.mark.processes
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# A kernel, and a process for each command, would take a minute to import the same again.
COMMANDS_IN_THE_KERNEL = """
from IPython.core.magic import register_cell_magic

@register_cell_magic
def bash(line, cell):
    from tests.docs_blocks import commands, run_command

    for words in commands(cell):
        run_command(words)
"""


def test_the_notebooks_run(tmp_path: Path) -> None:
    rows = tmp_path / "alpaca"
    rows.mkdir()
    one = {"instruction": "Say where the river runs.", "input": "", "output": "Down the hill."}
    (rows / "alpaca.json").write_text(json.dumps([one] * 200))
    repos = {MODEL: write_base(tmp_path / "base"), "datasets/yahma/alpaca-cleaned": rows}
    repos |= write_datasets(tmp_path / "datasets", questions=2)
    cells = [nbformat.v4.new_code_cell(COMMANDS_IN_THE_KERNEL)]
    for path in NOTEBOOKS:
        (tmp_path / path.stem).mkdir()
        begin = f"%reset -f\n%cd -q {tmp_path / path.stem}\nimport gc\ngc.freeze()"  # collecting garbage is slow
        cells.append(nbformat.v4.new_code_cell(begin))
        found = (cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
        cells += [nbformat.v4.new_code_cell(cell.source, metadata=cell.metadata) for cell in found]  # with other ids
    with HubServer(repos) as server:
        env = client_env(server, tmp_path / "home") | {"PYTHONPATH": str(ROOT)}
        client = NotebookClient(nbformat.v4.new_notebook(cells=cells), timeout=600, kernel_name="python3")
        client.execute(env=env)  # a cell that fails raises


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_stored(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
