"""Copies of the recipes, to run and to change."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..files.folders import new_folder
from ..files.shipped import bundled_folder
from .requests import RecipesRequest


def copy_recipes(request: RecipesRequest) -> Path:
    """Copy the recipes that come with this version of the package, scripts and their settings, to a new folder.

    Raises:
        CheckpointError: The folder exists or can't be written.
    """
    source = bundled_folder("recipes")
    with new_folder(request.output, source=source) as folder:
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    return request.output
