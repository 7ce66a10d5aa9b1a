"""What is imported is declared, and the other way round."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from .compat import STACKS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Installed by whoever serves the chat on the Hub, and by nobody else.
ON_THE_HUB_ONLY = {"spaces"}
# An engine that users bring, which `bench --engine` names with its install command where it is missing.
BROUGHT_ALONG = {"vllm"}
# What transformers, PEFT and lm-eval ask for without our importing it.
NOT_IMPORTED = {"accelerate", "bitsandbytes", "torchao"}


def imported(folder: Path) -> dict[str, Path]:
    """Top-level modules that are imported anywhere in a folder, those of scripts beside each other left out, and where."""
    modules: dict[str, Path] = {}
    own = set() if folder.name == "hf_layerprune" else {path.stem for path in folder.rglob("*.py")}
    for path in sorted(folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            else:
                continue
            modules |= {name.split(".")[0]: path for name in names}
    return {name: path for name, path in modules.items() if name not in own | set(sys.stdlib_module_names)}


def names(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=~! ;]", one)[0]) for one in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    extras = [one for group, listed in PROJECT["optional-dependencies"].items() if group != "dev" for one in listed]
    return names([*PROJECT["dependencies"], *extras])


@pytest.mark.parametrize("folder", ["hf_layerprune", "spaces", "recipes"])
def test_what_is_imported_is_declared(folder: str) -> None:
    providers = packages_distributions()
    undeclared = {
        module: str(path.relative_to(ROOT))
        for module, path in imported(ROOT / folder).items()
        if module not in ON_THE_HUB_ONLY | BROUGHT_ALONG | {"hf_layerprune"}
        and not {normal(one) for one in providers.get(module, [module])} & declared()
    }
    assert not undeclared


def test_what_is_declared_is_imported() -> None:
    providers = packages_distributions()
    modules = {name for folder in ("hf_layerprune", "spaces", "recipes") for name in imported(ROOT / folder)}
    used = {normal(one) for module in modules for one in providers.get(module, [module])}
    assert declared() - used - NOT_IMPORTED == set()


def test_the_oldest_versions_that_are_declared_are_those_that_are_tested() -> None:
    tested = [Requirement(pin) for name in ("floor", "floors", "torch-2.8") for pin in STACKS[name].packages]
    pinned = {one.name: Version(next(iter(one.specifier)).version) for one in tested}
    wanted = map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"]])
    floors = {one.name: Version(min(s.version for s in one.specifier if s.operator == ">=")) for one in wanted}
    both = pinned.keys() & floors.keys()
    assert both >= {"torch", "transformers", "peft", "huggingface-hub", "accelerate", "trl"}
    assert {name: pinned[name] for name in both} == {name: floors[name] for name in both}
