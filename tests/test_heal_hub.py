"""`recipes/sft_tail.py` with models on the Hub: every stage reads the revision that was named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hf_layerprune.cli import main
from hf_layerprune.records.lineage import Lineage

from .heal_makers import RECIPE, ROOT
from .hub_repo import Commit, Repo, RepoFile
from .hub_server import HubServer, client_env
from .measure_models import write_model, write_tasks

pytestmark = pytest.mark.processes
SETTINGS = {
    "model_name_or_path": "org/m", "model_revision": "v2", "drop_layers": "3,4", "method": "last2", "loss": "kd",
    "dataset_name": "self", "self_rows": 4, "self_length": 12, "max_steps": 1, "per_device_train_batch_size": 2,
    "use_cpu": "true", "bf16": "false", "report_to": "none", "eval_tasks": "asked", "eval_limit": 2,
}  # fmt: skip


class Branches(Repo):
    """A folder for each branch."""

    def __init__(self, main: Path, **others: Path) -> None:
        super().__init__(main)
        self.others = {name: Repo(folder) for name, folder in others.items()}

    def at(self, revision: str) -> Commit | None:
        named = [repo.at("main" if revision == name else revision) for name, repo in self.others.items()]
        return super().at(revision) or next(filter(None, named), None)

    def large(self, sha256: str, name: str) -> RepoFile | None:
        found = [repo.large(sha256, name) for repo in self.others.values()]
        return super().large(sha256, name) or next(filter(None, found), None)


# One process, since each would import the same for longer than it works.
BOTH = """
import runpy, sys
from hf_layerprune.errors import CheckpointError
from hf_layerprune.heal.student import Student
student = Student.load("org/cut")
print(len(student.cut.keep), *sorted(path.name for path in student.folder.iterdir()))
try:
    Student.load("org/none")
except CheckpointError as error:
    print(error)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_models_on_the_hub(tmp_path: Path) -> None:
    """The teacher and the base of the evaluation are at the student's revision, and nothing but its format is fetched."""
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "README.md").write_text("The model is on another branch.\n")
    base, tasks, run = write_model(tmp_path / "v2"), write_tasks(tmp_path / "tasks", 4), tmp_path / "run"
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "3-4"]) == 0
    (tmp_path / "cut" / "pytorch_model.bin").write_bytes(b"pickled")
    settings = SETTINGS | {"output_dir": run, "eval_from": tasks, "eval_texts": "none"}
    words = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    code = f"import sys; sys.argv[0] = {str(RECIPE)!r}\n{BOTH}"
    with HubServer({"org/cut": tmp_path / "cut"}) as server:
        server.repos["org/m"] = Branches(tmp_path / "main", v2=base)
        env = client_env(server, tmp_path / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", code, *words], env=env, capture_output=True, text=True, timeout=900
        )
        commit = server.repos["org/m"].at("v2").id
    assert done.returncode == 0, done.stderr[-3000:]
    assert Lineage.load(run / "model").base["commit"] == commit
    assert f"--base org/m --base-revision {commit}" in done.stderr
    assert (run / "model" / "metrics.json").is_file()
    found, refused = done.stdout.splitlines()[:2]
    assert found.startswith("6 ")
    assert {"config.json", "lineage.json", "model.safetensors", "tokenizer.json"} <= set(found.split())
    assert "pytorch_model.bin" not in found
    assert refused.startswith("org/none is neither a folder here nor on the Hub, unless it is private")
