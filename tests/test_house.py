"""The house: no file imports itself in a circle, not even late.

`make lint` holds the order of the rooms (`[tool.importlinter]` in pyproject.toml).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "hf_layerprune"


def modules() -> dict[str, Path]:
    names = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


def runtime_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements anywhere in a file, those for a type checker alone left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            continue
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        yield from runtime_imports(child)


def import_graph() -> dict[str, set[str]]:
    known = modules()
    graph: dict[str, set[str]] = {name: set() for name in known}
    for name, path in known.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node in runtime_imports(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
                continue
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{target}.{alias.name}"
                graph[name] |= {full if full in known else target} & known.keys()
    return graph


def test_no_file_imports_itself_in_a_circle() -> None:
    with pytest.raises(CycleError):
        TopologicalSorter({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}).prepare()
    TopologicalSorter(import_graph()).prepare()  # raises a CycleError that lists the files
