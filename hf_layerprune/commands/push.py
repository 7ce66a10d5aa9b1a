"""`hf-layerprune push MODEL REPO_ID`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..publish.hub import Plan

HELP = "publish a model on the Hub"
DESCRIPTION = (
    "Check MODEL, write its card, and bring both to REPO_ID in one commit. A second push of the same model changes "
    "nothing, and one that broke off goes on where it stopped."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The words of the command."""
    parser.add_argument("model", metavar="MODEL", help="a model folder that prune has written")
    parser.add_argument("repo_id", metavar="REPO_ID", help="NAMESPACE/NAME on the Hub")
    parser.add_argument("--private", action="store_true", help="make it private, and refuse a public repository")
    parser.add_argument("--adapter-only", action="store_true", help="only the adapter, in MODEL or in MODEL/adapter")
    parser.add_argument("--revision", metavar="R", help="to this branch, made where it is missing, or to refs/pr/N")
    parser.add_argument("--create-pr", action="store_true", help="propose the change instead of making it")
    parser.add_argument("--overwrite-card", action="store_true", help="write over what was changed in the Hub's card")
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes and checks, and push nothing")


def run(args: argparse.Namespace) -> int:
    """Push."""
    from pathlib import Path

    from ..publish.hub import PushRequest, plan, push

    request = PushRequest(
        folder=Path(args.model),
        repo_id=args.repo_id,
        private=args.private,
        adapter_only=args.adapter_only,
        revision=args.revision,
        create_pr=args.create_pr,
        overwrite_card=args.overwrite_card,
    )
    if args.dry_run:
        made = plan(request)
        print(_report(made))
        return 1 if made.refusals else 0
    made, done = push(request)
    for check in made.checks:
        if check.level == "warning":
            print(f"{check.name}: {check.text}")
    if not done.added and not done.removed:
        print(f"nothing has changed: {done.pull_request or done.url} is at {done.commit[:12]} already")
    else:
        gone = f", removed {', '.join(done.removed)}" if done.removed else ""
        print(f"pushed {len(done.added)} files{gone}: {done.pull_request or done.url} ({done.commit[:12]})")
    return 0


def _report(made: Plan) -> str:
    from ..publish.numbers import size

    lines = [f"{size(count):>10}  {name}" for name, count in made.contents.files.items()]
    lines.append(f"{size(made.contents.size):>10}  in {len(made.contents.files)} files")
    lines += [f"  left out  {name}: {reason}" for name, reason in made.contents.left_out.items()]
    lines += ["", *(f"{check.level:>10}  {check.name}: {check.text}" for check in made.checks)]
    lines.append("nothing would be pushed" if made.refusals else "ready to push; nothing was pushed")
    return "\n".join(lines)
