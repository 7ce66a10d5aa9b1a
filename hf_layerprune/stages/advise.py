"""What to drop, and how to repair and heal it, in the time available.

The time is turned into tokens by running a layer and the head of the model on this machine, and tokens into a loss by
the frontier that was measured on a small model (`heal/frontier.py`), which a curve of the model itself brings to its
scale. For models of the paper's size, nothing of the kind was measured; there the advice is the paper's recipe, with the
paper's figures.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .. import families
from ..errors import CutError
from ..files.copy import check_file_target, write_text
from ..heal.frontier import ExpectedLoss, Frontier
from ..layer_ranges import parse_layers
from ..options import (
    TARGET_SETTINGS,
    CutOptions,
    copy_fields,
    format_count,
    format_percent,
    option_fields,
    refuse_unused,
    to_arguments,
)
from ..records.curve import final_quality
from ..records.figures.numbers import format_number
from ..runtime.loading import load_config
from ..runtime.windows import max_positions
from ..select.reverse_order import PAPER_SIZE
from ..select.sets import drop_count, free_layers
from .requests import AdviseRequest, PruneRequest

_DEFAULT_MAX_RATIO = 1.25  # the perplexity ratio that decides how many layers go unless an option does
_LENGTH = 512  # tokens in a row
_FEW_TOKENS = 8 * _LENGTH  # with less, only the closed-form repair is worth the time
# A shard of a web corpus; how many tokens a document has, roughly.
_TEXT = {"path": "allenai/c4", "data_files": "en/c4-train.00000-of-01024.json.gz"}
_DOCUMENT = 400
_PAPER = """For models of this size we measured nothing. The paper (arXiv:2411.15558, tables 3 and 8) did, on two A100 GPUs: without
the last 8 of 32 layers, and with lm_head and the last 3 that remain tuned for 2 epochs on Alpaca, Llama-3.1-8B-Instruct
has a mean accuracy of 0.581 in 8 tasks (dense: 0.630); tuned on Dolly, 0.598. On small models, a block in the middle does far
better; to find out which it is here, make a curve: COMMAND. Nothing was timed here, so
--minutes, --dtype and --device have no effect on this advice."""


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    `settings` are those of a YAML file for `sft_tail.py`; empty if the time is too short to train. `command` is the
    command line, split into words. `text` is the advice in words, and `record` the same as JSON.
    """

    settings: dict[str, Any]
    command: tuple[str, ...]
    text: str
    record: dict[str, Any] = field(repr=False)


def advise(request: AdviseRequest) -> Advice:
    """Say what to drop, and how to repair and heal it.

    Raises:
        CutError: An option is not accepted or can't be met, or the model is pruned already.
        CheckpointError: The model or the curve can't be read, or the output exists.
        UnsupportedModelError: The architecture is not proven, or can't be healed, or its layers can't be timed.
    """
    if request.output is not None:  # at once: before torch is imported
        check_file_target(request.output, force=request.force)
    from ..cut.sizes import Sizes
    from ..heal.student import recorded_cut

    config = load_config(request.base, revision=request.revision)
    families.check_supported(config)
    families.check_stage(config, "heal")
    families.check_trainable(config)
    if recorded_cut(config) is not None:
        raise CutError(
            f"{request.base} is pruned already, and the advice is for the model before the cut; pass its base, or heal it as it "
            "is: recipes/sft_tail.py --config recipes/configs/heal.yaml"
        )
    if request.drop is not None:
        drop_count(request.drop, families.layer_count(config))
    parameters = Sizes(config, request.base, revision=request.revision).parameters()
    is_paper_size = parameters >= PAPER_SIZE
    if is_paper_size:
        refuse_unused(
            request, ("from_curve",), "for 5 billion parameters or more, where the advice is the paper's recipe"
        )
    advice = _advise_paper_recipe(request, config) if is_paper_size else _advise_from_frontier(request, config)
    advice.record["parameters"] = parameters
    if request.output is not None and advice.settings:
        import yaml

        remarks = "".join(f"# {line}".rstrip() + "\n" for line in advice.text.splitlines())
        write_text(request.output, remarks + yaml.safe_dump(advice.settings, sort_keys=False, allow_unicode=True))
    return advice


def _amount_settings(request: AdviseRequest, otherwise: float) -> dict[str, Any]:
    """The settings that say how many layers go: the request's own, with what its target is counted by, or a number."""
    amount = request.target or request.budget
    if amount is None:
        return {"drop": otherwise}
    plain, names = option_fields(AdviseRequest), (amount, *TARGET_SETTINGS.get(amount, ()))
    return {name: value for name in names if (value := getattr(request, name)) != plain[name].default}


def _advise_paper_recipe(request: AdviseRequest, config: Any) -> Advice:
    where = ("--revision", request.revision) if request.revision else ()
    text = _PAPER.replace("COMMAND", shlex.join(("hf-layerprune", "rank", request.base, "curve", "--curve", *where)))
    if request.target not in (None, "target_speedup"):  # whose layers would have to be timed
        text += f"\n\nTo meet {request.target}, the last {_count_for_target(request, config)} of {families.layer_count(config)} layers go."
    settings = {
        **_model_settings(request),
        **_amount_settings(request, 0.25 if request.drop is None else request.drop),
        "criterion": "reverse_order",
        "method": "lm_head+last3",
        "loss": "ce",
        "datasets": [{"path": "yahma/alpaca-cleaned"}],
        "max_length": 256,
        "completion_only_loss": True,
        "num_train_epochs": 2,
        "output_dir": "pruned",
    }
    record = {"by": "the paper", "measured": False, "settings": settings}
    return Advice(settings, _launch_command(request), text, record)


def _model_settings(request: AdviseRequest) -> dict[str, Any]:
    revision = {"model_revision": request.revision} if request.revision else {}
    return {"model_name_or_path": request.base} | revision


def _launch_command(request: AdviseRequest) -> tuple[str, ...]:
    return ("accelerate", "launch", "recipes/sft_tail.py", "--config", str(request.output or "advice.yaml"))


def _advise_from_frontier(request: AdviseRequest, config: Any) -> Advice:
    from ..repair.fit import can_repair_every_cut
    from ..select.cost import forward_seconds
    from .curve_file import load_curve
    from .opening import open_base, open_walk

    if request.target == "target_speedup":
        raise CutError(
            "target_speedup is not available here; find the number of layers with hf-layerprune rank --curve, and pass it as "
            "drop=N"
        )
    families.check_stage(config, "rank")  # for the criterion, and to be timed layer by layer
    n, length = families.layer_count(config), min(_LENGTH, max_positions(config) or _LENGTH)
    curve = load_curve(request.from_curve, request).points if request.from_curve is not None else None
    walk = open_walk(request, *open_base(request))
    seconds = forward_seconds(walk, length)  # to read a token on this machine
    counts = _candidate_counts(config, curve)
    repairable = [one for one in Frontier.load_all() if can_repair_every_cut(walk, one.source["heal"]["repair"])]
    frontier, tokens = _best_frontier(repairable or Frontier.load_all(), request.minutes * 60, seconds, counts[-1] / n)
    expected = {count: _expected_loss(frontier, curve, count, n, tokens) for count in counts}
    count = _choose_count(request, config, expected)
    chosen_loss = expected.setdefault(count, _expected_loss(frontier, curve, count, n, tokens))
    heal = frontier.source["heal"]
    point = curve[count - 1] if curve and count <= len(curve) else None
    by_distance: dict[str, Any] = {"criterion": "angular_distance", "contiguous": True}
    requested = {"drop": count} if request.budget else _amount_settings(request, count)
    amount = {"drop_layers": point["layers"]} if point else requested | by_distance
    method = heal["repair"] if repairable else "linear"  # which mixtures of experts can have as well
    repair: dict[str, Any] = {"repair": method} if repairable or can_repair_every_cut(walk, method) else {}
    settings: dict[str, Any] = {**_model_settings(request), **amount, **repair}
    record = {
        "by": "the frontier",
        "tokens_per_second": round(1 / seconds / frontier.cost_per_token, 1),
        "tokens": tokens,
        "drop": count,
        "criterion": None if point else by_distance["criterion"],
        "repair": repair.get("repair"),
        "perplexity_ratio": None if chosen_loss.is_lower_bound else round(chosen_loss.perplexity_ratio, 4),
        "kl": None if chosen_loss.is_lower_bound else round(chosen_loss.kl, 4),
        "beyond_what_was_measured": chosen_loss.is_extrapolated,
        "measured_on": frontier.source["model"],
        "curve": curve is not None,
    }
    if tokens:
        settings |= {
            "method": heal["method"],
            "loss": heal["loss"],
            "datasets": [_TEXT | {"split": f"train[:{math.ceil(1.1 * tokens / _DOCUMENT)}]", "columns": ["text"]}],
            "max_length": length,
            "num_train_epochs": 1,
            "output_dir": "pruned",
            **heal["settings"],
        }
        command = _launch_command(request)
    else:
        chosen = {"drop_layers": parse_layers(point["layers"])} if point else amount
        cut = PruneRequest(request.base, "pruned", revision=request.revision, **repair, **chosen)
        command = ("hf-layerprune", "prune", request.base, "pruned", *to_arguments(cut))
        settings = {}
    record["settings"] = settings
    text = _format_advice(request, frontier, expected, n, record)
    return Advice(settings, command, text, record)


def _best_frontier(
    frontiers: Sequence[Frontier], available: float, forward_seconds: float, share: float
) -> tuple[Frontier, int]:
    """The frontier that loses least of a share of the layers in a time in seconds, and how many tokens it heals on then."""
    every = [(frontier, frontier.affordable_tokens(available, forward_seconds)) for frontier in frontiers]
    in_time = [one for one in every if one[1] >= 0] or [max(every, key=lambda one: one[1])]
    healed = [(frontier, tokens if tokens >= _FEW_TOKENS else 0) for frontier, tokens in in_time]
    return min(healed, key=lambda one: one[0].expected_loss(share, one[1]).kl)


def _expected_loss(
    frontier: Frontier, curve: list[dict[str, Any]] | None, count: int, n: int, tokens: int
) -> ExpectedLoss:
    """What a cut loses; where a curve says what it loses before training, healing takes the share that it took there."""
    found = frontier.expected_loss(count / n, tokens)
    if not curve or count > len(curve):
        return found
    best = final_quality(curve[count - 1])
    before = frontier.expected_loss(count / n, 0)
    return replace(
        found,
        ln_ratio=math.log(best["perplexity_ratio"]) * found.ln_ratio / before.ln_ratio,
        kl=best["kl"] * found.kl / before.kl,
        is_lower_bound=False,
    )


def _free_layers(config: Any) -> list[int]:
    """The layers that the architecture lets go, at least one."""
    n = families.layer_count(config)
    return sorted(free_layers(n, drop_count(1, n), 0, 0, families.protected_layers(config)))


def _candidate_counts(config: Any, curve: list[dict[str, Any]] | None) -> range:
    """The numbers of layers that are considered: up to a quarter, or as far as the curve goes."""
    n = families.layer_count(config)
    return range(1, min(len(_free_layers(config)), n - 1, len(curve) if curve else max(1, n // 4)) + 1)


def _choose_count(request: AdviseRequest, config: Any, expected: dict[int, ExpectedLoss]) -> int:
    """How many layers go."""
    n = families.layer_count(config)
    if request.drop is not None:
        return drop_count(request.drop, n)
    if request.target is not None:
        return _count_for_target(request, config)
    name, limit = "perplexity_ratio", request.max_perplexity_ratio or _DEFAULT_MAX_RATIO
    if request.max_kl is not None:
        name, limit = "kl", request.max_kl
    inside = [count for count, one in expected.items() if not one.is_lower_bound and getattr(one, name) <= limit]
    if not inside and request.budget:
        least = getattr(expected[1], name)
        raise CutError(
            f"{request.budget}={limit} is less than the {least:.3g} expected after dropping one layer and healing for "
            f"{request.minutes:g} minutes; allow more loss or more time"
        )
    return max(inside, default=1)


def _count_for_target(request: AdviseRequest, config: Any) -> int:
    from ..select.targets import Target

    target = Target.from_options(copy_fields(CutOptions, request), config, request.base, revision=request.revision)
    assert target is not None, "there is a target"
    free = _free_layers(config)
    return target.choose_count(families.layer_count(config), free, lambda count: free[-count:])


def _describe_epochs(settings: dict[str, Any]) -> str:
    """How often the text is trained on, and on what first."""
    if "features" not in settings:
        return "each once"
    return f"in {settings['num_train_epochs']} epochs, with the first {format_percent(settings['features'])} of the steps on hidden states"


def _format_advice(
    request: AdviseRequest, frontier: Frontier, expected: dict[int, ExpectedLoss], n: int, record: Any
) -> str:
    count, tokens = record["drop"], record["tokens"]
    minutes = f"{request.minutes:g} minute{'' if request.minutes == 1 else 's'} on this machine"
    lines = ["dropped  perplexity     KL"]
    for each, one in sorted(expected.items()):
        mark = "  <- advised" if each == count else ""
        sign = ">" if one.is_lower_bound else " "
        lines.append(f"{each:>3} of {n:<3}{sign}x{one.perplexity_ratio:<8.3g} {sign}{one.kl:>6.3g}{mark}")
    chosen_loss = expected[count]
    if tokens:
        lines.append(
            f"\n{minutes} is enough to heal on about {format_count(float(f'{tokens:.2g}'))} tokens of text "
            f"({format_number(record['tokens_per_second'])} tokens a second), {_describe_epochs(record['settings'])}."
        )
    else:
        lines.append(
            f"\n{minutes} is too little to run a teacher and train, so only "
            + ("the closed-form repair is advised." if record["repair"] else "the cut is advised.")
        )
    scale = "the curve of this model, and the gain of healing" if record["curve"] else "losses"
    lines.append(
        f"Expected from {scale} measured on {frontier.source['model']}, as a mean over three kinds of text; larger models "
        "lose less of the same share of their layers."
    )
    measured = frontier.source["heal"]["repair"]
    if record["repair"] != measured:
        lines.append(
            f"They were measured with the repair {measured}, which not every cut of this model can have, so expect to lose more."
        )
    if record["criterion"]:
        lines.append(
            "The block is chosen by angular distance, in one pass over the calibration rows; criterion: auto takes longer, and "
            "tries several."
        )
    if chosen_loss.is_lower_bound:
        lines.append(
            "No cut of this many layers was measured. The loss shown is that of the largest cut measured, so expect a higher one."
        )
    elif chosen_loss.is_extrapolated:
        lines.append(
            "No run on this much text was measured. The loss shown is that of the longest run measured, so expect a lower one."
        )
    return "\n".join(lines)
