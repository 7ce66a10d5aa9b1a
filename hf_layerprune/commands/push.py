"""`hf-layerprune push MODEL REPO_ID`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import CutError

if TYPE_CHECKING:
    from ..publish.hub.push import Plan

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
    parser.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="NAME",
        help="publish this file of MODEL, too, although no library writes it (again for each)",
    )
    parser.add_argument("--revision", metavar="R", help="to this branch, made where it is missing, or to refs/pr/N")
    parser.add_argument("--create-pr", action="store_true", help="propose the change instead of making it")
    parser.add_argument("--overwrite-card", action="store_true", help="replace what was changed in the Hub's card")
    parser.add_argument("--space", metavar="REPO_ID", help="then publish a chat with the model as this Space")
    parser.add_argument(
        "--space-secret",
        metavar="VARIABLE",
        help="give the Space the token in this environment variable, to read a private model",
    )
    parser.add_argument("--dry-run", action="store_true", help="list files, sizes and checks, and push nothing")


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
        raise CutError("--space shows what is on the model's main; leave out --revision and --create-pr, or --space")
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
            print(f"{check.name}: {check.text}")
    if not done.added and not done.removed:
        print(f"nothing has changed: {done.pull_request or done.url} is at {done.commit[:12]} already")
    else:
        gone = f", removed {', '.join(done.removed)}" if done.removed else ""
        print(
            f"pushed {len(done.added)} file{'s' * (len(done.added) != 1)}{gone}: {done.pull_request or done.url} ({done.commit[:12]})"
        )
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
    print(f"{'published' if done.added else 'unchanged'}: the Space {done.url}")
    if args.private and secret is None:
        print("the Space can't read a private model yet: add a token as its secret HF_TOKEN, or use --space-secret")


def _report(made: Plan) -> str:
    from ..records.figures.numbers import size

    lines = [f"{size(count):>10}  {name}" for name, count in made.contents.files.items()]
    lines.append(f"{size(made.contents.size):>10}  in {len(made.contents.files)} files")
    lines += [f"  left out  {name}: {reason}" for name, reason in made.contents.left_out.items()]
    lines += ["", *(f"{check.level:>10}  {check.name}: {check.text}" for check in made.checks)]
    lines.append("nothing would be pushed" if made.refusals else "ready to push; nothing was pushed")
    return "\n".join(lines)
