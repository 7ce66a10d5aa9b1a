"""What stands around the package works as it stands: workflows, the site, versions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_layerprune import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_what_exists(workflow: Path) -> None:
    commands = "\n".join(step.get("run", "") for step in steps(workflow))
    for target in re.findall(r"\bmake ([a-z-]+)", commands):
        assert target in TARGETS
    for module in re.findall(r"python -m (tests\.\w+)", commands):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    for file in re.findall(r"tests/\w+\.py", commands):
        assert (ROOT / file).is_file()
    for extra in re.findall(r'-e "\.\[([\w,]+)\]"', commands):
        assert set(extra.split(",")) <= set(PROJECT["optional-dependencies"])


def test_versions_of_python_are_the_same_everywhere() -> None:
    tested = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["strategy"]["matrix"][
        "python"
    ]
    listed = [re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", one) for one in PROJECT["classifiers"]]
    assert [match[1] for match in listed if match] == tested
    assert PROJECT["requires-python"] == f">={tested[0]}"


def test_hooks_run_what_lint_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    lint = (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\nformat:")[0]
    assert {Path(hook["entry"].split()[0]).name for hook in hooks} == set(re.findall(r"\$\(BIN\)/([\w-]+)", lint))


def test_the_version_stands_in_one_place() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assigned = re.compile(rf"^(__)?version(__)?\s*[=:]\s*[\"']?{re.escape(__version__)}", re.M)
    texts = {name: (ROOT / name).read_bytes().decode("utf-8", "ignore") for name in files}
    assert [name for name, text in texts.items() if assigned.search(text)] == ["hf_layerprune/versions.py"]


def test_what_runs_leave_behind_is_not_in_the_repository() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    folders = {name.partition("/")[0] for name in files if "/" in name}
    hidden = {name for name in folders if name.startswith(".")}
    assert hidden == {".ci", ".github"}
    known = "benchmarks docs hf_layerprune model_cards notebooks recipes spaces tests"  # the map in CONTRIBUTING.md
    assert folders - hidden == set(known.split())


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    # Not with --quiet, under which --strict counts no warnings.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "LayerDropConfig" in (tmp_path / "site" / "reference" / "index.html").read_text(encoding="utf-8")
