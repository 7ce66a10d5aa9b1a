"""A cut on disk as `prune` makes it, without the command's other checks and records."""

from pathlib import Path
from typing import Any

from hf_layerprune.cut.base import Base
from hf_layerprune.cut.disk import execute_plan, plan_cut
from hf_layerprune.cut.plan import CheckpointPlan
from hf_layerprune.files.folders import check_target, new_folder


def cut_checkpoint(
    source: str | Path, target: str | Path, drop_layers: Any, *, force: bool = False, link: bool = False, **hub: Any
) -> CheckpointPlan:
    base, target = Base.open(source, **hub), Path(target)
    check_target(target, base.folder, force)
    plan = plan_cut(base, drop_layers)
    write_checkpoint(plan, target, force=force, link=link)
    return plan


def write_checkpoint(plan: CheckpointPlan, target: Path, *, force: bool = False, link: bool = False) -> None:
    with new_folder(target, force=force, source=plan.source) as folder:
        execute_plan(plan, folder, link=link, name=target.name)
