"""`hf-layerprune push MODEL REPO_ID`."""

from __future__ import annotations

import tempfile
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

<<<<<<< HEAD
from ..errors import CutError, shown
from ..options import PATH, TEXT, Options, many, option, take
=======
from ..errors import shown
from ..options import add, gather
from ..publish.requests import PushRequest
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)

if TYPE_CHECKING:
    from ..publish.hub.push import Plan

HELP = "publish a model on the Hub"
DESCRIPTION = """Check MODEL, write its card, and upload both to REPO_ID in one commit. Pushing the same model again
changes nothing, and an interrupted push resumes where it stopped."""


<<<<<<< HEAD
@dataclass
class Request(Options):
    """What to push, and where."""

    model: Path = option(MISSING, "A model folder written by prune", PATH)
    repo_id: str = option(MISSING, "NAMESPACE/NAME on the Hub")
    private: bool = option(False, "Make a new repository private, and refuse a public one")
    adapter_only: bool = option(False, "Push only the adapter in MODEL or MODEL/adapter")
    include: tuple[str, ...] = option((), "Also publish this file of MODEL; repeatable", many(TEXT))
    revision: str | None = option(None, "Push to this branch, created if missing, or to refs/pr/N")
    create_pr: bool = option(False, "Open a pull request instead of committing")
    overwrite_card: bool = option(False, "Overwrite changes made to the card on the Hub")
    space: str | None = option(None, "Also publish a chat with the model as this Space")
    space_secret: str | None = option(
        None, "Give the Space the token in this environment variable, to read a private model"
    )
    dry_run: bool = option(False, "List files, sizes and checks, but push nothing")


def run(request: Request) -> int:
    from ..publish.hub.push import PushRequest, plan, push
    from ..publish.space import check_id, secret_from

    if request.space and (request.revision or request.create_pr):
        raise CutError("--space shows the model's main branch; omit --revision and --create-pr, or --space")
    if request.space:
        check_id(request.space)
    secret = secret_from(request.space_secret)
    job = take(PushRequest, request, folder=request.model)
    if request.dry_run:
        made = plan(job)
        print(_report(made))
        return 1 if made.refusals else 0
    made, done = push(job)
    for check in made.checks:
        if check.level == "warning":
            print(_line(f"{check.name}: {check.text}"))
=======
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, PushRequest)


def run(args: argparse.Namespace) -> int:
    """Push."""
    from ..publish.hub.push import plan, push
    from ..publish.space import publish_space, secret_from

    request = gather(args, PushRequest)
    secret = secret_from(request.space_secret)
    if request.dry_run:
        made = plan(request)
        _print(*_report(made))
        return 1 if made.refusals else 0
    made, done = push(request)
    _print(*(f"{check.name}: {check.text}" for check in made.checks if check.level == "warning"))
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)
    if not done.added and not done.removed:
        _print(f"nothing has changed: {done.pull_request or done.url} is already at {done.commit[:12]}")
    else:
        gone = f", removed {', '.join(done.removed)}" if done.removed else ""
        count = f"{len(done.added)} file{'s' * (len(done.added) != 1)}"
<<<<<<< HEAD
        print(_line(f"pushed {count}{gone}: {done.pull_request or done.url} ({done.commit[:12]})"))
    if request.space:
        _push_space(request, request.space, made, secret)
    return 0


def _push_space(request: Request, repo_id: str, made: Plan, secret: str | None) -> None:
    from ..publish.hub.contents import find_model
    from ..publish.space import build_space, push_space

    model = find_model(request.model.expanduser(), adapter_only=request.adapter_only)
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        space = build_space(
            Path(place, "space"), model_repo_id=request.repo_id, model=model, adapter=made.contents.is_adapter
        )
        done = push_space(space, repo_id, private=request.private, secret=secret)
    print(_line(f"{'published' if done.added else 'unchanged'}: the Space {done.url}"))
    if request.private and secret is None:
        print("the Space can't read a private model yet: add a token as its secret HF_TOKEN, or use --space-secret")


def _report(made: Plan) -> str:
=======
        _print(f"pushed {count}{gone}: {done.pull_request or done.url} ({done.commit[:12]})")
    if request.space:
        space = publish_space(request, adapter=made.contents.is_adapter, secret=secret)
        _print(f"{'published' if space.added else 'unchanged'}: the Space {space.url}")
        if request.private and secret is None:
            _print("the Space can't read a private model yet: give it a secret HF_TOKEN, or use --space-secret")
    return 0


def _report(made: Plan) -> list[str]:
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)
    from ..records.figures.numbers import size

    files = made.contents.files
    lines = [f"{size(count):>10}  {name}" for name, count in files.items()]
    lines.append(f"{size(sum(files.values())):>10}  in {len(files)} files")
    lines += [f"  left out  {name}: {reason}" for name, reason in made.contents.left_out.items()]
    lines += ["", *(f"{check.level:>10}  {check.name}: {check.text}" for check in made.checks)]
    return [*lines, "nothing would be pushed" if made.refusals else "ready to push; nothing was pushed"]


def _print(*lines: str) -> None:
    """Print lines; what a file name holds can't start another line, or show a token."""
    for line in lines:
        print(shown(line).replace("\n", "\\n"))
