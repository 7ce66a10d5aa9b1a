"""`hf-layerprune rank BASE [OUTPUT]`."""

from __future__ import annotations

from ..layer_ranges import format_layers
from ..options import AMOUNTS, CalibrationOptions, take, words_of
from ..stages.requests import RankRequest as Request
from ..stages.requests import WalkOptions
from . import Answer, hint

HELP = "score every layer, and show what each criterion would drop"
DESCRIPTION = """Score the decoder layers of BASE by one criterion or by all of them at once, and show which layers each
would drop; with --curve, find the best cut for each number of layers and what it costs. With OUTPUT, write scores.json
(or curve.json) and the plots there. Nothing is pruned."""
EXCLUSIVE = AMOUNTS


def run(request: Request) -> Answer:
    rows = words_of(take(CalibrationOptions, request))  # those that the repair is to be fitted to
    if request.curve:
        from ..stages.curve import make_curve

        curve = make_curve(request)
        made = f"the curve is in {request.output}" if request.output else ""
        count = curve.chosen or curve.knee or len(curve.points)
        if (asked := request.budget or request.target) and curve.chosen is None:
            # Without a point that meets it, the end of the curve on which a budget or a target would be met.
            count, end = (1, "shallowest") if request.budget else (len(curve.points), "deepest")
            missed = f"no cut on it meets --{asked.replace('_', '-')}, and the command is for the {end}"
            made = f"{made or 'a curve was measured'}; {missed}"
        point = curve.points[count - 1]
        repair = curve.record["repair"] if "repaired" in point else None
        choice = ("--drop-layers", point["layers"], "--repair", repair, *(rows if repair else ()))
        if request.output is not None:
            choice = ("--from-curve", request.output, "--drop", count)
        then = hint("prune", request.base, "pruned", *choice, *_where(request))
        return Answer(made, str(curve), curve.record, then)
    from ..stages.rank import rank

    ranking = rank(request)
    made = f"the scores are in {request.output}" if request.output else ""
    others = ("criteria", "variant", "lengths", "repair", "target_dtype", "force")  # not of a curve
    then = (
        hint("rank", request.base, "curve", "--curve", *words_of(request, *AMOUNTS, *others))
        if ranking.on_text
        else ()
    )
    if "auto" in ranking.drops or (len(ranking.drops) == 1 and ranking.on_text):
        layers = format_layers(ranking.drops.get("auto") or next(iter(ranking.drops.values())))
        choice = ("--drop-layers", layers, "--repair", request.repair)
        then = hint("prune", request.base, "pruned", *choice, *(rows if request.repair else ()), *_where(request))
    return Answer(made, str(ranking), ranking.record, then)


def _where(request: Request) -> list[str]:
    """The base's options, with its type: the model in that type was looked at. A quantised one can't be converted."""
    from ..runtime.loading import load_config

    stays = request.dtype == "auto" or hasattr(
        load_config(request.base, revision=request.revision), "quantization_config"
    )
    return words_of(take(WalkOptions, request), "device", *(("dtype",) if stays else ()))
