"""`hf-layerprune push MODEL REPO_ID`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import pluralize, to_arguments
from ..publish.requests import PushRequest as Request
from . import Result, suggest

if TYPE_CHECKING:
    from ..publish.hub.push import Plan

HELP = "publish a model on the Hub"
DESCRIPTION = """Check MODEL, write its card, and upload both to REPO_ID in one commit. Pushing the same model again
changes nothing, and an interrupted push resumes where it stopped."""


def run(request: Request) -> Result:
    from dataclasses import asdict

    from ..publish.hub.push import PushRefusedError, plan_push, push

    if request.dry_run:
        plan = plan_push(request)
        data: dict[str, Any] = {"files": plan.contents.files, "left_out": plan.contents.left_out}
        data["checks"] = [asdict(check) for check in plan.checks]
        follow_up = (
            () if plan.refusals else suggest("push", request.model, request.repo_id, *to_arguments(request, "dry_run"))
        )
        summary = (
            "nothing would be pushed until the refusals are dealt with"
            if plan.refusals
            else "ready to push; nothing was pushed"
        )
        return Result(summary, _lines(*_report(plan)), data, follow_up, exit_code=1 if plan.refusals else 0)
    try:
        pushed = push(request)
    except PushRefusedError as error:
        return Result(data={"refusals": [asdict(check) for check in error.refusals]},
                      errors=tuple(check.text for check in error.refusals), exit_code=1)  # fmt: skip
    plan, done, space = pushed.plan, pushed.model, pushed.space
    data = asdict(done) | {"warnings": [asdict(check) for check in plan.checks if check.level == "warning"]}
    lines = [f"{check.name}: {check.text}" for check in plan.checks if check.level == "warning"]
    if not done.added and not done.removed:
        summary = f"nothing has changed: {done.pull_request or done.url} is already at {done.commit[:12]}"
    else:
        gone = f", removed {', '.join(done.removed)}" if done.removed else ""
        summary = (
            f"pushed {pluralize(len(done.added), 'file')}{gone}: {done.pull_request or done.url} ({done.commit[:12]})"
        )
    if space:
        data["space"] = asdict(space)
        stored = f", with the token of {request.space_secret} as its secret HF_TOKEN" if request.space_secret else ""
        lines.append(f"{'published' if space.added else 'unchanged'}: the Space {space.url}{stored}")
        if pushed.space_needs_secret:  # one that the Space has can't be seen
            lines.append(
                "the model is private or gated, so the Space needs a secret HF_TOKEN to read it; if it has none yet, add it on "
                "the Space's page, or use --space-secret"
            )
    revision = done.commit if done.pull_request else request.revision  # otherwise, `main` would be verified
    # A model's repository seldom has the GGUF files made of it.
    base = plan.history.lineage.base.get("id") if plan.history.from_gguf else None
    trust = ["--accept-trained"] if plan.history.changed() else []  # it is their publisher who verifies
    follow_up = suggest("verify", request.repo_id, "--revision", revision, "--base", base, *trust)
    return Result(summary, _lines(*lines), data, follow_up)


def _report(plan: Plan) -> list[str]:
    from ..records.figures.numbers import format_size

    files = plan.contents.files
    lines = [f"{format_size(count):>10}  {name}" for name, count in files.items()]
    lines.append(f"{format_size(sum(files.values())):>10}  in {len(files)} files")
    lines += [f"  left out  {name}: {reason}" for name, reason in plan.contents.left_out.items()]
    lines += ["", *(f"{check.level:>10}  {check.name}: {check.text}" for check in plan.checks)]
    return lines


def _lines(*lines: str) -> str:
    """Lines as a text; what a file name holds can't start another line."""
    return "\n".join(line.replace("\n", "\\n") for line in lines)
