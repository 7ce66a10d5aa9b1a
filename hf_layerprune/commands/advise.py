"""`hf-layerprune advise BASE [OUTPUT]`."""

from __future__ import annotations

from ..options import AMOUNTS, to_arguments
from ..stages.requests import AdviseRequest as Request
from . import Result, suggest

HELP = "recommend what to drop and how to heal it in the time available"
DESCRIPTION = """Say how many layers of BASE to drop, and how to repair and heal it within --minutes on this machine, with
the loss to expect. The advice is based on the speed of a layer on this machine and on the measured gain of healing;
with --from-curve, also on the losses of BASE itself. All measurements were made on one small model, SmolLM2-135M.
--target-speedup is refused for models with fewer than 5 billion parameters; for larger ones, nothing was measured at
all, and the advice is the paper's recipe, whatever the time and the machine. With OUTPUT, write the settings for
recipes/sft_tail.py there."""
EXCLUSIVE = AMOUNTS


def run(request: Request) -> Result:
    from ..stages.advise import advise

    advice = advise(request)
    summary = ""
    if request.output is not None:
        summary = f"the settings are in {request.output}, for recipes/sft_tail.py (hf-layerprune recipes)"
        if not advice.settings:
            summary = f"{request.output} is not written, since nothing is trained"
    follow_up = advice.command
    if advice.settings and request.output is None:  # the command needs the file
        follow_up = suggest("advise", request.base, "advice.yaml", *to_arguments(request, "force"))
    return Result(summary, advice.text, advice.record | {"command": list(advice.command)}, follow_up)
