"""`hf-layerprune push MODEL REPO_ID`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import CutError, shown

if TYPE_CHECKING:
    from ..publish.hub.push import Plan

HELP = "publish a model on the Hub"
DESCRIPTION = (
    "Check MODEL, write its card, and upload both to REPO_ID in one commit. Pushing the same model again changes "
    "nothing, and an interrupted push resumes where it stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="a model folder written by prune")
    parser.add_argument("repo_id", metavar="REPO_ID", help="NAMESPACE/NAME on the Hub")
    parser.add_argument(
        "--private", action="store_true", help="make a new repository private, and refuse a public one"
    )
    parser.add_argument("--adapter-only", action="store_true", help="push only the adapter in MODEL or MODEL/adapter")
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="NAME",
        help="also publish this file of MODEL; repeatable",
    )
    parser.add_argument("--revision", metavar="R", help="push to this branch, created if missing, or to refs/pr/N")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--overwrite-card", action="store_true", help="overwrite changes made to the card on the Hub")
    parser.add_argument("--space", metavar="REPO_ID", help="also publish a chat with the model as this Space")
    parser.add_argument(
        "--space-secret",
        metavar="VARIABLE",
        help="give the Space the token in this environment variable, to read a private model",
    )
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes and checks, but push nothing")


def run(args: argparse.Namespace) -> int:
    """Push."""
    from pathlib import Path

    from ..publish.hub.push import PushRequest, plan, push
    from ..publish.space import check_id, secret_from

    request = PushRequest(
        folder=Path(args.model),
        repo_id=args.repo_id,
        private=args.private,
        adapter_only=args.adapter_only,
        include=tuple(args.include),
        revision=args.revision,
        create_pr=args.create_pr,
        overwrite_card=args.overwrite_card,
        space=args.space,
    )
    if args.space and (args.revision or args.create_pr):
        raise CutError("--space shows the model's main branch; omit --revision and --create-pr, or --space")
    if args.space:
        check_id(args.space)
    secret = secret_from(args.space_secret)
    if args.dry_run:
        made = plan(request)
        print(_report(made))
        return 1 if made.refusals else 0
    made, done = push(request)
    for check in made.checks:
        if check.level == "warning":
            print(_line(f"{check.name}: {check.text}"))
    if not done.added and not done.removed:
        print(_line(f"nothing has changed: {done.pull_request or done.url} is already at {done.commit[:12]}"))
    else:
        gone = f", removed {', '.join(done.removed)}" if done.removed else ""
        count = f"{len(done.added)} file{'s' * (len(done.added) != 1)}"
        print(_line(f"pushed {count}{gone}: {done.pull_request or done.url} ({done.commit[:12]})"))
    if args.space:
        _push_space(args, made, secret)
    return 0


def _push_space(args: argparse.Namespace, made: Plan, secret: str | None) -> None:
    import tempfile
    from pathlib import Path

    from ..publish.hub.contents import find_model
    from ..publish.space import build_space, push_space

    model = find_model(Path(args.model).expanduser(), adapter_only=args.adapter_only)
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        space = build_space(
            Path(place, "space"), model_repo_id=args.repo_id, model=model, adapter=made.contents.is_adapter
        )
        done = push_space(space, args.space, private=args.private, secret=secret)
    print(_line(f"{'published' if done.added else 'unchanged'}: the Space {done.url}"))
    if args.private and secret is None:
        print("the Space can't read a private model yet: add a token as its secret HF_TOKEN, or use --space-secret")


def _report(made: Plan) -> str:
    from ..records.figures.numbers import size

    lines = [f"{size(count):>10}  {name}" for name, count in made.contents.files.items()]
    lines.append(f"{size(made.contents.size):>10}  in {len(made.contents.files)} files")
    lines += [f"  left out  {name}: {reason}" for name, reason in made.contents.left_out.items()]
    lines += ["", *(f"{check.level:>10}  {check.name}: {check.text}" for check in made.checks)]
    lines.append("nothing would be pushed" if made.refusals else "ready to push; nothing was pushed")
    return "\n".join(map(_line, lines))


def _line(text: str) -> str:
    """One line of output: file names and words of the user can't start another, or show a token."""
    return shown(text).replace("\n", "\\n")
