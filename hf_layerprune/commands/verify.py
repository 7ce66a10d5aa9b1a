"""`hf-layerprune verify MODEL`."""

from __future__ import annotations

from ..errors import shown
from ..publish.requests import VerifyRequest as Request

HELP = "prove that a model is what its base and its records make it"
DESCRIPTION = """Repeat the cut of the base that MODEL's lineage.json names, and compare hashes: weights, config,
tokenizer, chat template and every other file that affects how MODEL behaves. Tensors that a repair or training changed
cannot be derived again; the verdict counts them. Exit code 0: everything is accounted for; 1: it is not."""


def run(request: Request) -> int:
    from ..publish.verify.verdict import verify

    outcome = verify(request)
    for line in outcome.lines:
        print(shown(f"{'ok' if line.good else 'NO':<4} {line.what:<8}  {line.text}"))
    print(shown(outcome.verdict))
    return 0 if outcome.good else 1
