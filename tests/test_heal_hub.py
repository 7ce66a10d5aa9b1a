"""`recipes/sft_tail.py` with a model on the Hub: every stage reads the revision that was named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_layerprune.cli import main
from hf_layerprune.records.lineage import Lineage

from .hub_repo import Commit, Repo, RepoFile
from .hub_server import HubServer, client_env
from .measure_models import write_model, write_tasks

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[1]
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


def heal(server: HubServer, folder: Path, **settings: Any) -> str:
    words = [part for name, value in (SETTINGS | settings).items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(ROOT / "recipes" / "sft_tail.py"), *words]
    env = client_env(server, folder / "home") | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_the_teacher_and_the_base_of_the_evaluation_are_at_the_students_revision(tmp_path: Path) -> None:
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "README.md").write_text("The model is on another branch.\n")
    tasks = write_tasks(tmp_path / "tasks", 4)
    with HubServer() as server:
        server.repos["org/m"] = Branches(tmp_path / "main", v2=write_model(tmp_path / "v2"))
        said = heal(server, tmp_path, output_dir=tmp_path / "run", eval_from=tasks, eval_texts="none")
        commit = server.repos["org/m"].at("v2").id
    assert Lineage.of(tmp_path / "run" / "model").base["commit"] == commit
    assert f"--base org/m --base-revision {commit}" in said
    assert (tmp_path / "run" / "model" / "metrics.json").is_file()


def test_a_pruned_model_is_downloaded_without_other_formats(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    assert main(["prune", str(base), str(tmp_path / "cut"), "--drop-layers", "3-4"]) == 0
    (tmp_path / "cut" / "pytorch_model.bin").write_bytes(b"pickled")
    code = """
from hf_layerprune.errors import CheckpointError
from hf_layerprune.heal.student import Student
student = Student.at("org/cut")
print(len(student.cut.keep), *sorted(path.name for path in student.folder.iterdir()))
try:
    Student.at("org/none")
except CheckpointError as error:
    print(error)
"""
    with HubServer({"org/cut": tmp_path / "cut"}) as server:
        env = client_env(server, tmp_path / "home")
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found, refused = done.stdout.splitlines()[-2:]
    assert found.startswith("6 ")
    assert {"config.json", "lineage.json", "model.safetensors", "tokenizer.json"} <= set(found.split())
    assert "pytorch_model.bin" not in found
    assert refused.startswith("org/none is not on the Hub, or it is private")
