r"""Run rows of the paper's tables: prune, train, evaluate, and compare the results with the paper's numbers.

    python recipes/reproduce_paper/run.py --list
    python recipes/reproduce_paper/run.py table1/llama-taylor table7
    python recipes/reproduce_paper/run.py 'table1/llama-*' --mistakes all
    python recipes/reproduce_paper/run.py table1 --model ./SmolLM2-135M-Instruct --data rows.json --max-steps 8 \
        --tasks-from my-tasks --limit 100 --calibration text.txt

A row is an entry of its table's file in rows/. To resume after an interruption, start the same command again. Results
are written to results.json and results.md in the output folder after each row.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from plans import (
    HERE,
    ROW_SETTINGS,
    Options,
    Plan,
    Row,
    choose_rows,
    defaults,
    make_plan,
    read_rows,
    relevant_mistakes,
)
from results import NOT_RUN, Results, format_line, make_lines, markdown, mistakes_text

from hf_layerprune.errors import CutError, LayerPruneError, explain, wants_traceback
from hf_layerprune.files.copy import write_text
from hf_layerprune.files.locks import lock_folder
from hf_layerprune.options import pluralize

logger = logging.getLogger("hf_layerprune.reproduce_paper")
OUTPUT = Path("reproduce_paper_output")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = parser.add_argument_group("which rows")
    rows.add_argument("rows", nargs="*", metavar="ROW", help="names, tables or patterns: table7, 'table1/llama-*'")
    rows.add_argument("--rows", nargs="+", default=[], dest="more_rows", metavar="ROW", help="the same")
    rows.add_argument(
        "--rows-matching", type=_pattern, metavar="REGEX", help="rows whose name matches a regular expression"
    )
    rows.add_argument("--all", action="store_true", help="every row")
    what = parser.add_argument_group("what to do")
    what.add_argument("--list", action="store_true", help="show rows, their status, and the paper's numbers")
    what.add_argument("--plan", action="store_true", help="only show all settings of the rows")
    what.add_argument("--table", action="store_true", help="only print the table of results")
    what.add_argument("--list-mistakes", action="store_true", help="show the mistakes of the paper's code")
    how = parser.add_argument_group("how")
    how.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER", help=f"output folder ({OUTPUT})")
    how.add_argument("--accelerate-config", type=_path, metavar="FILE", help="config file for accelerate launch")
    how.add_argument("--device", default="auto", help="device for evaluation (auto)")
    how.add_argument("--keep-models", action="store_true", help="keep the weights of finished rows")
    how.add_argument(
        "--mistakes",
        default="",
        metavar="NAMES",
        help="mistakes of the paper's code to repeat, separated by commas, or all (none)",
    )
    small = parser.add_argument_group("at another size", "Such results are marked: they are not comparable.")
    small.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="MODEL",
        help="a folder or Hub id for all rows; llama-3.1-8b=FOLDER is the location of one of the paper's models",
    )
    small.add_argument("--limit", type=_count, metavar="N", help="number of questions per task")
    small.add_argument(
        "--tasks-from", type=_path, metavar="FOLDER", help="task files that replace the paper's eight tasks"
    )
    small.add_argument("--text", action="append", default=[], metavar="[NAME=]FILE", help="a text for perplexity")
    small.add_argument("--windows", type=_count, metavar="N", help="number of windows per text")
    small.add_argument(
        "--calibration", metavar="TEXT", help="calibration text: self, a file, or a data set on the Hub"
    )
    small.add_argument("--data", type=_path, metavar="FILE", help="training rows that replace each row's own")
    small.add_argument("--max-steps", type=_count, metavar="N", help="number of training steps")
    small.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="another setting of recipes/sft_tail.py"
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a regular expression: {error}") from error


def _path(text: str) -> str:
    if not os.path.exists(text):
        raise argparse.ArgumentTypeError(f"{text} does not exist")
    return os.path.realpath(text)


def read_options(args: argparse.Namespace) -> Options:
    """The changes to all rows that the arguments ask for.

    Raises:
        CutError: A text does not exist, or an argument is invalid.
    """
    models: dict[str, str] = {}
    for word in args.model:
        name, mark, source = word.partition("=")
        name, source = (name, source) if mark else ("*", name)
        models[name] = os.path.abspath(source) if os.path.isdir(source) else source
    texts = {}
    for word in args.text:
        name, mark, source = word.partition("=")
        source = source if mark else name
        if not os.path.isfile(source):
            raise CutError(f"the text {source} does not exist")
        texts[name if mark else Path(source).stem] = os.path.realpath(source)
    settings: dict[str, Any] = {}
    for word in args.set:
        name, mark, value = word.partition("=")
        if not mark:
            raise CutError(f"--set {word} must be NAME=VALUE, such as max_length=128")
        settings[name] = yaml.safe_load(value)
    if settings:
        sys.path.append(str(HERE.parent))
        from sft_tail import make_parser

        parser = make_parser()
        if unknown := settings.keys() - {option.dest for option in parser._actions}:
            raise CutError(f"--set {min(unknown)}: recipes/sft_tail.py has no such setting")
        if fixed := settings.keys() & ROW_SETTINGS:
            raise CutError(f"--set {min(fixed)}: each row has its own; name other rows, or use the options of run.py")
        parser.set_defaults_with_config(**settings)
        parser.parse_args([])  # refuses values of another kind
    named = tuple(name.strip() for name in args.mistakes.split(",") if name.strip())
    plain = {
        name: getattr(args, name) for name in ("limit", "tasks_from", "windows", "calibration", "data", "max_steps")
    }
    return Options(
        models=models,
        mistakes=tuple(defaults()["mistakes"]) if named == ("all",) else named,
        texts=texts,
        settings=settings,
        **plain,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        `int`: 0; 1 if a row failed; 2 for an invalid command line.
    """
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("hf_layerprune").setLevel(logging.INFO)
    try:
        return _run_command(args)
    except (Exception, KeyboardInterrupt) as error:
        if wants_traceback():
            traceback.print_exc()
        message, code = explain(error)
        return _fail(message, code)


def _run_command(args: argparse.Namespace) -> int:
    if args.list_mistakes:
        print(mistakes_text())
        return 0
    patterns, options = [*args.rows, *args.more_rows], read_options(args)
    rows = choose_rows(read_rows(), patterns, args.rows_matching)
    plans = {name: make_plan(row, options) for name, row in rows.items()}
    results = Results.read(args.output / "results.json")
    if args.list:
        print(_format_rows(rows, plans, results, args.output))
    elif args.plan:
        plain = {name: json.loads(json.dumps(asdict(plan))) for name, plan in plans.items()}  # without tuples
        print(yaml.safe_dump(plain, sort_keys=False), end="")
    elif args.table:
        print(markdown(rows, results), end="")
    elif not patterns and args.rows_matching is None and not args.all:
        raise CutError("name rows, or give --all; --list shows what there is")
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        with _lock_output(args.output) as lock_fd:
            return _run(args, rows, plans, lock_fd)
    return 0


def _run(args: argparse.Namespace, rows: dict[str, Row], plans: dict[str, Plan], lock_fd: int | None) -> int:
    failed = {}
    results = Results.read(args.output / "results.json")
    left = {name: plan for name, plan in plans.items() if not results.has(rows[name], plan)}
    logger.info("%s: %d done, %d left", pluralize(len(rows), "row"), len(rows) - len(left), len(left))
    if left:
        from stages import Runner

        engine = args.accelerate_config and Path(args.accelerate_config)
        runner = Runner(args.output, engine=engine, device=args.device, keep_models=args.keep_models, lock_fd=lock_fd)
    while left:
        name, plan = next(iter(left.items()))
        del left[name]
        if not results.has(rows[name], plan):
            logger.info("\n%s", name)
            try:
                results.add(rows[name], plan, runner.run(plan))
            except Exception as error:  # one row must not keep the others from being run
                failed[name] = explain(error)[0]
                logger.error("%s failed: %s", name, failed[name], exc_info=wants_traceback())
                continue
        runner.clean(plan, {other.cut_name for other in left.values() if other.cut is not None})
        write_text(args.output / "results.md", markdown(read_rows(), results))
        print(_report(rows[name], results), flush=True)
    write_text(args.output / "results.md", markdown(read_rows(), results))
    for name, why in failed.items():
        _fail(f"{name} failed: {why}", 1)
    return 1 if failed else 0


def _report(row: Row, results: Results) -> str:
    outcome: Any = results.outcome_of(row)
    cells = [format_line(line, outcome) for line in make_lines(row, outcome)]
    width = max(len(one[0]) for one in cells)
    lines = [f"{row.name}: layers {outcome['removed']} dropped" if outcome.get("removed") else row.name]
    for figure, paper, ours, difference, verdict in cells:
        columns = f"  {figure:{width}}", f"ours {ours or 'none':18}", paper and f"paper {paper}", difference
        lines.append("  ".join(filter(None, (*columns, verdict and f"({verdict})"))).rstrip())
    return "\n".join(lines)


def _format_rows(rows: dict[str, Row], plans: dict[str, Plan], results: Results, output: Path) -> str:
    width = max(map(len, rows))
    lines = []
    for name, row in rows.items():
        plan, outcome = plans[name], results.outcome_of(row)
        if plan.key in results.runs:
            status, outcome = "done", results.runs[plan.key]
        elif (output / "runs" / plan.folder_name).is_dir():
            status, outcome = "unfinished", None
        else:
            status = NOT_RUN if outcome is None else "done, with other settings"
        figure, paper, ours, difference, verdict = format_line(make_lines(row, outcome)[0], outcome)
        told = f"{figure} {paper}" + (f", ours {ours} ({difference})" if outcome else "")
        mistakes = ", ".join(relevant_mistakes(row))
        cells = f"{name:{width}}", f"{status:10}", told, verdict, mistakes and f"[{mistakes}]"
        lines.append("  ".join(filter(None, cells)))
    note = "mistakes of the paper's code that concern a row are in brackets"
    return "\n".join([*lines, "", f"{pluralize(len(rows), 'row')}; {note}"])


@contextmanager
def _lock_output(output: Path) -> Iterator[int | None]:
    """Lock an output folder for as long as this process and its child processes run."""
    try:
        descriptor = lock_folder(output)
    except BlockingIOError:
        raise LayerPruneError(f"another run is using {output}; wait for it, or choose another --output") from None
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _fail(error: object, code: int) -> int:
    print(f"run.py: {' '.join(str(error).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends child processes too, as Ctrl-C does
    sys.exit(main())
