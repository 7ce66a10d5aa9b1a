"""`hf-layerprune recipes [OUTPUT]`."""

from __future__ import annotations

from ..stages.requests import RecipesRequest as Request
from . import Result

HELP = "copy the healing recipe and its settings, to run with accelerate launch"
DESCRIPTION = """Copy the recipes of this version, which the documentation and the cards run as recipes/...: the script that
heals a model (sft_tail.py), its settings (configs), those of accelerate for one device or many (accelerate), and the
tables of the paper (reproduce_paper). A checkout has the same folder."""


def run(request: Request) -> Result:
    from ..stages.recipes import copy_recipes

    folder = copy_recipes(request)
    data = {"output": str(folder), "files": sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.*"))}
    settings = ("--config", str(folder / "configs" / "heal.yaml"), "--output_dir", "healed")
    follow_up = ("accelerate", "launch", str(folder / "sft_tail.py"), *settings)
    return Result(f"the recipes are in {folder}", data=data, follow_up=follow_up)
