"""Files that come with the package and are not modules: the recipes and the Space."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError


def bundled_folder(name: str) -> Path:
    """Find a folder that comes with the package: in an installed package inside it, in a checkout beside it.

    Raises:
        CheckpointError: This installation lacks it.
    """
    package = Path(__file__).parents[1]
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise CheckpointError(f"this installation of hf-layerprune has no {name}; install it again, from PyPI or git")
