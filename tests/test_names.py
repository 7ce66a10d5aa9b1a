"""Every name that is taken from a library exists in its installed version.

`python -m tests.compat --smoke` runs this at the floors, where a name that came later is missing. What is called on
objects, such as `HfApi().x()`, can't be seen so.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARIES = "accelerate datasets gguf huggingface_hub peft safetensors torch transformers trl".split()


def _runs(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those only for type checkers, and those in a `try` that takes a missing name into account."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Try) and any("Error" in ast.unparse(h.type) for h in node.handlers if h.type):
            caught = {ast.unparse(handler.type) for handler in node.handlers if handler.type}
            if any(name in one for one in caught for name in ("ImportError", "AttributeError")):
                continue
        yield node
        yield from _runs(node)


def taken(tree: ast.AST) -> set[str]:
    """The dotted names that a file takes from the libraries."""
    names, modules = set(), {}
    nodes = list(_runs(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in LIBRARIES:
                    names.add(alias.name)
                    modules[alias.asname or alias.name.split(".")[0]] = (
                        alias.name if alias.asname else alias.name.split(".")[0]
                    )
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in LIBRARIES:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            modules |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.Attribute):
            first, *rest = ast.unparse(node).split(".")
            if first in modules and all(part.isidentifier() for part in rest):
                names.add(".".join([modules[first], *rest]))
    return names


def exists(name: str) -> bool:
    """Whether a dotted name leads to something; what lies inside an instance is left alone."""
    parts = name.split(".")
    value = import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(value, part):
            try:
                value = import_module(".".join(parts[:i]))
            except ImportError:
                return not isinstance(value, type(ast) | type)
        else:
            value = getattr(value, part)
    return True


@pytest.mark.parametrize("folder", ["hf_layerprune", "recipes", "spaces"])
def test_names_of_libraries_exist(folder: str) -> None:
    where = {
        name: str(path.relative_to(ROOT))
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in taken(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(where) > 3
    missing = {name: path for name, path in where.items() if not exists(name)}
    assert not missing


def test_a_missing_name_is_seen() -> None:
    tree = ast.parse(
        "import torch.nn as nn\nfrom transformers import Nothing\ndef f():\n    return nn.functional.nothing(nn.Linear.no)\n"
    )
    assert {name for name in taken(tree) if not exists(name)} == {
        "transformers.Nothing", "torch.nn.functional.nothing", "torch.nn.Linear.no",
    }  # fmt: skip
