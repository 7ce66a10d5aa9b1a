"""`hf-layerprune verify MODEL`."""

from __future__ import annotations

from ..publish.requests import VerifyRequest as Request
from . import Result

HELP = "check that a model can be reproduced from its base and its records"
DESCRIPTION = """Repeat the cut of the base that MODEL's lineage.json names, and compare hashes: weights, config,
tokenizer, chat template and every other file that affects how MODEL behaves. Tensors that a repair or training changed
cannot be derived again; the verdict counts them. The exit code is 0 if everything is accounted for, and 1 if not."""


def run(request: Request) -> Result:
    from dataclasses import asdict

    from ..publish.verify.verdict import verify

    outcome = verify(request)
    marks = {True: "ok", False: "NO", None: "?"}
    lines = [f"{marks[line.good]:<4} {line.what:<8}  {line.text}" for line in outcome.lines]
    data = {"good": outcome.good, "verdict": outcome.verdict, "checks": [asdict(line) for line in outcome.lines]}
    return Result(outcome.verdict, "\n".join(lines), data, exit_code=0 if outcome.good else 1)
