"""`hf-layerprune advise BASE [OUTPUT]`."""

from __future__ import annotations

from ..options import AMOUNTS
from ..stages.requests import AdviseRequest as Request
from . import Answer, hint

HELP = "say what to drop and how to heal it in the time that there is"
DESCRIPTION = """Say how many layers of BASE to drop, and how to repair and heal it in --minutes on this machine, with the quality to
expect: from the speed of a layer here, and from what healing was measured to bring; with --from-curve, from the losses of
BASE itself. With OUTPUT, write the settings of recipes/sft_tail.py there."""
EXCLUSIVE = AMOUNTS


def run(request: Request) -> Answer:
    from ..stages.advise import advise

    advice = advise(request)
    made = f"the settings are in {request.output}" if request.output and advice.settings else ""
    then = advice.command
    if advice.settings and request.output is None:  # the command needs the file
        then = hint("advise", request.base, "advice.yaml", "--minutes", f"{request.minutes:g}")
    return Answer(made, advice.text, advice.record | {"command": list(advice.command)}, then)
