"""`hf-layerprune verify MODEL`."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

from ..errors import shown
<<<<<<< HEAD
from ..options import MODEL, MODEL_HELP, Options, option
=======
from ..options import add, gather
from ..publish.requests import VerifyRequest
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)

HELP = "prove that a model is what its base and its records make it"
DESCRIPTION = """Repeat the cut of the base that MODEL's lineage.json names, and compare hashes: weights, config,
tokenizer, chat template and every other file that affects how MODEL behaves. Tensors that a repair or training changed
cannot be derived again; the verdict counts them. Exit code 0: everything is accounted for; 1: it is not."""


<<<<<<< HEAD
@dataclass
class Request(Options):
    """What to verify."""

    model: str = option(MISSING, "A model folder, or a Hub id", MODEL)
    base: str | None = option(None, f"Where the base is, if not where lineage.json says: {MODEL_HELP}", MODEL)
    revision: str | None = option(None, "Branch, tag or commit of MODEL on the Hub")
    accept_trained: bool = option(False, "Take the records' word for the tensors that a repair or training changed")
=======
def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    add(parser, VerifyRequest)
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)


def run(request: Request) -> int:
    from ..publish.verify.verdict import verify

<<<<<<< HEAD
    outcome = verify(
        request.model, base=request.base, revision=request.revision, accept_trained=request.accept_trained
    )
=======
    outcome = verify(gather(args, VerifyRequest))
>>>>>>> 5bf331d (Card, push, verify and chat take requests declared as options; less machinery in publish, records and the chat)
    for line in outcome.lines:
        print(shown(f"{'ok' if line.good else 'NO':<4} {line.what:<8}  {line.text}"))
    print(shown(outcome.verdict))
    return 0 if outcome.good else 1
