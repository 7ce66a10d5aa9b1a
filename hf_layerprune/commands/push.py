"""`hf-layerprune push MODEL REPO_ID`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..options import plural, words_of
from ..publish.requests import PushRequest as Request
from . import Answer, hint

if TYPE_CHECKING:
    from ..publish.hub.push import Plan

HELP = "publish a model on the Hub"
DESCRIPTION = """Check MODEL, write its card, and upload both to REPO_ID in one commit. Pushing the same model again
changes nothing, and an interrupted push resumes where it stopped."""


def run(request: Request) -> Answer:
    from dataclasses import asdict

    from ..publish.hub.push import PushRefusedError, plan, push
    from ..publish.space import publish_space, secret_from

    secret = secret_from(request.space_secret)
    if request.dry_run:
        made = plan(request)
        data: dict[str, Any] = {"files": made.contents.files, "left_out": made.contents.left_out}
        data["checks"] = [asdict(check) for check in made.checks]
        then = () if made.refusals else hint("push", request.model, request.repo_id, *words_of(request, "dry_run"))
        said = (
            "nothing would be pushed until the refusals are dealt with"
            if made.refusals
            else "ready to push; nothing was pushed"
        )
        return Answer(said, _lines(*_report(made)), data, then, code=1 if made.refusals else 0)
    try:
        made, done = push(request)
    except PushRefusedError as error:
        return Answer(data={"refusals": [asdict(check) for check in error.refusals]},
                      errors=tuple(check.text for check in error.refusals), code=1)  # fmt: skip
    data = asdict(done) | {"warnings": [asdict(check) for check in made.checks if check.level == "warning"]}
    lines = [f"{check.name}: {check.text}" for check in made.checks if check.level == "warning"]
    if not done.added and not done.removed:
        said = f"nothing has changed: {done.pull_request or done.url} is already at {done.commit[:12]}"
    else:
        gone = f", removed {', '.join(done.removed)}" if done.removed else ""
        said = f"pushed {plural(len(done.added), 'file')}{gone}: {done.pull_request or done.url} ({done.commit[:12]})"
    if request.space:
        space = publish_space(request, adapter=made.contents.is_adapter, secret=secret)
        data["space"] = asdict(space)
        stored = f", with the token of {request.space_secret} as its secret HF_TOKEN" if secret is not None else ""
        lines.append(f"{'published' if space.added else 'unchanged'}: the Space {space.url}{stored}")
        if request.private and secret is None:
            lines.append("the Space can't read a private model yet: give it a secret HF_TOKEN, or use --space-secret")
    revision = done.commit if done.pull_request else request.revision  # otherwise, `main` would be verified
    return Answer(said, _lines(*lines), data, hint("verify", request.repo_id, "--revision", revision))


def _report(made: Plan) -> list[str]:
    from ..records.figures.numbers import size

    files = made.contents.files
    lines = [f"{size(count):>10}  {name}" for name, count in files.items()]
    lines.append(f"{size(sum(files.values())):>10}  in {len(files)} files")
    lines += [f"  left out  {name}: {reason}" for name, reason in made.contents.left_out.items()]
    lines += ["", *(f"{check.level:>10}  {check.name}: {check.text}" for check in made.checks)]
    return lines


def _lines(*lines: str) -> str:
    """Lines as a text; what a file name holds can't start another line."""
    return "\n".join(line.replace("\n", "\\n") for line in lines)
