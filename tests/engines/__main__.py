"""python -m tests.engines [ENGINE ...] [--models MODEL ...] [--page]."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from . import asking, gguf_files, models, page
from .environments import ENGINES, CannotBuild, build

NAMES = (*models.BOTH, *models.FAMILIES)


def routes(engine: str) -> dict[str, Callable[[str, str], Path]]:
    """How a model gets to an engine: from its name and `"dense"` or `"cut"` to a path.

    Args:
        engine (`str`): Of `ENGINES`.

    Returns:
        `dict[str, Callable[[str, str], Path]]`: By the name of the route.
    """
    if not ENGINES[engine].gguf:
        return {"folder": lambda name, which: models.make(name)[which]}

    def as_file(name: str, which: str) -> Path:
        source = gguf_files.converted(name, "dense")
        drop = models.FAMILIES[name].drop
        return (
            source if which == "dense" else gguf_files.cut_as_file(source, source.with_name("cut-as-file.gguf"), drop)
        )

    return {"converted": gguf_files.converted, "GGUF cut": as_file}


def run(engine: str, names: list[str]) -> Iterator[list[dict[str, Any]]]:
    """Try an engine on models.

    Args:
        engine (`str`): Of `ENGINES`.
        names (`list[str]`): Of the models.

    Yields:
        `list[dict[str, Any]]`: A row for each model, route by route.
    """
    for route, path_of in routes(engine).items():
        rows = []
        # The repaired and the healed model are folders; their base is no GGUF file of the same weights.
        here = [name for name in names if not (route == "GGUF cut" and name in models.BOTH)]
        answers, refusals = _answers(engine, path_of, here, "cut")
        off = [name for name in here if not asking.matches(models.reference(name, "cut"), answers[name])]
        dense, _ = _answers(engine, path_of, off, "dense")
        for name in here:
            both = {"cut": answers.get(name), "dense": dense.get(name)}
            pairs = {which: (models.reference(name, which), one) for which, one in both.items() if one}
            outcome, nats, note = asking.judge(pairs["cut"], pairs.get("dense"))
            if outcome == asking.WRONG and name in refusals:
                outcome = asking.REFUSED
            rows.append({"engine": engine, "route": route, "model": name} | _row(outcome, nats, note))
            print(f"{engine}, {route}, {name}: {outcome} {nats or ''} {note}", flush=True)
        yield rows
    if engine == "vllm" and models.REAL in names:
        cut = _by_server("cut")
        dense = None if asking.matches(*cut) else _by_server("dense")
        yield [{"engine": engine, "route": "server", "model": models.REAL} | _row(*asking.judge(cut, dense))]


def _by_server(which: str) -> tuple[dict[str, Any], dict[str, Any]]:
    return models.reference(models.REAL, which), asking.ask_server(models.REAL, which)


def _row(outcome: str, nats: float | None, note: str) -> dict[str, Any]:
    return {
        "outcome": outcome,
        "nats": None if nats is None else float(f"{nats:.1g}"),
        "note": re.sub(r"/\S+/", "", note)[:300],
    }


def _answers(
    engine: str, path_of: Callable[[str, str], Path], names: list[str], which: str
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    jobs, failed, refused = [], {}, set()
    for name in names:
        try:
            path = path_of(name, which)
        except gguf_files.CannotConvert as error:
            failed[name] = {"error": str(error)}
            refused.add(name)
            continue
        jobs.append({"name": name, "path": str(path), "prompt": models.prompt_of(name), "count": models.COUNT})
    return asking.ask(engine, jobs) | failed, refused


def main() -> int:
    """Build, make, ask, write what came out."""
    parser = argparse.ArgumentParser(prog="python -m tests.engines", description=sys.modules[__package__].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"of {', '.join(ENGINES)}; all by default")
    parser.add_argument("--models", nargs="*", default=list(NAMES), help="only these; the others' rows stay")
    parser.add_argument("--page", action="store_true", help="only write docs/engines.md from results.json")
    args = parser.parse_args()
    if unknown := [one for one in args.engines if one not in ENGINES]:
        parser.error(f"no engine {unknown[0]}; there are {', '.join(ENGINES)}")
    if unknown := [one for one in args.models if one not in NAMES]:
        parser.error(f"no model {unknown[0]}; there are {'; '.join(NAMES)}")
    failed = False
    if not args.page:
        for name in args.models:
            if (moved := models.ignores_pattern(name)) is not None and moved < 10 * asking.TOLERANCE:
                parser.error(f"{name}: an engine that ignores the pattern would be {moved:.2g} nats off: not noticed")
        for engine in args.engines or ENGINES:
            try:
                build(engine)
            except CannotBuild as error:
                print(error, file=sys.stderr)
                failed = True
                continue
            for rows in run(engine, args.models):
                failed |= any(row["outcome"] == asking.WRONG and not page.is_known(row) for row in rows)
                page.record(rows)
    page.write()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
