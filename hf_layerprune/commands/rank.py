"""`hf-layerprune rank BASE [OUTPUT]`."""

from __future__ import annotations

from ..layer_ranges import format_layers
from ..options import AMOUNTS, CalibrationOptions, copy_fields, option_flags, spell_options, to_arguments
from ..records.names import is_gguf_name
from ..stages.requests import RankRequest as Request, WalkOptions
from . import Result, suggest

HELP = "score every layer, and show what each criterion would drop"
DESCRIPTION = """Score the decoder layers of BASE by one criterion or by all of them at once, and show which layers each
would drop; with --curve, find the best cut for each number of layers and what it costs. With OUTPUT, write scores.json
(or curve.json) and the plots there. Nothing is pruned."""
EXCLUSIVE = AMOUNTS


def run(request: Request) -> Result:
    rows = to_arguments(copy_fields(CalibrationOptions, request))  # those that the repair is to be fitted to
    if request.curve:
        from ..stages.curve import make_curve

        curve = make_curve(request)
        summary = f"the curve is in {request.output}" if request.output else ""
        count = curve.chosen or curve.knee or len(curve.points)
        if (limit := request.budget or request.target) and curve.chosen is None:
            # Without a point that meets it, the end of the curve on which a budget or a target would be met.
            count, end = (1, "shallowest") if request.budget else (len(curve.points), "deepest")
            missed = f"no cut on it meets --{limit.replace('_', '-')}, and the command is for the {end}"
            summary = f"{summary or 'a curve was measured'}; {missed}"
        point = curve.points[count - 1]
        repair = curve.record["repair"] if "repaired" in point else None
        choice = ("--drop-layers", point["layers"], "--repair", repair, *(rows if repair else ()))
        if request.output is not None:
            choice = ("--from-curve", request.output, "--drop", count)
        follow_up = suggest("prune", request.base, "pruned", *choice, *_base_arguments(request, repair))
        return Result(summary, str(curve), curve.record, follow_up)
    from ..stages.rank import rank

    ranking = rank(request)
    summary = f"the scores are in {request.output}" if request.output else ""
    others = ("criteria", "variant", "lengths", "repair", "target_dtype", "force")  # not of a curve
    follow_up = (
        suggest("rank", request.base, "curve", "--curve", *to_arguments(request, *AMOUNTS, *others))
        if ranking.on_text
        else ()
    )
    if "auto" in ranking.drops or (len(ranking.drops) == 1 and ranking.on_text):
        layers = format_layers(ranking.drops.get("auto") or next(iter(ranking.drops.values())))
        choice = ("--drop-layers", layers, "--repair", request.repair)
        choice += (*(rows if request.repair else ()), *_base_arguments(request, request.repair))
        stays_gguf = is_gguf_name(request.base) and not request.repair
        follow_up = suggest("prune", request.base, "pruned.gguf" if stays_gguf else "pruned", *choice)
    text = spell_options(str(ranking), option_flags(Request))
    return Result(summary, text, ranking.record, follow_up)


def _base_arguments(request: Request, repair: str | None) -> list[str]:
    """The options for a cut of the base as it was scored."""
    from ..stages.opening import dtype_of_cut

    return to_arguments(copy_fields(WalkOptions, request, dtype=dtype_of_cut(request, repair)), "device")
