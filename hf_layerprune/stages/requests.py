"""The options of `prune`, `rank`, `advise`, `inspect` and `recipes`. This module does not import torch."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import CutError
from ..options import (
    AMOUNTS,
    DROP,
    DTYPES,
    LAYERS,
    MODEL,
    MODEL_HELP,
    PATH,
    AmountOptions,
    CalibrationOptions,
    CutOptions,
    Kind,
    Options,
    SelectionOptions,
    TuningOptions,
    check_choice,
    documented,
    integer,
    join_words,
    option,
    option_fields,
    refuse_unused,
)
from ..options.quantities import NATS, RATIO, SHARE, number_between
from ..select.registry import CRITERIA, find_criterion

TEXT_OPTIONS = ("calibration", "calibration_samples", "calibration_length")


def _curve_option(name: str) -> Any:
    """A calibration option whose default depends on `from_curve`; see `PruneRequest.with_calibration`."""
    known = option_fields(CalibrationOptions)[name]
    return option(None, f"{known.help}; by default {known.default}, or as for the curve with from_curve", known.kind)


def _parse_criteria(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _check_criteria(names: object) -> list[str]:
    names = _parse_criteria(names) if isinstance(names, str) else names
    if not isinstance(names, list | tuple) or not names:
        raise CutError("specify one criterion or more, such as kl,taylor, or all")
    scores = [name for name, criterion in CRITERIA.items() if criterion.kind != "choice"]
    expanded = [each for name in names for each in (scores if name == "all" else [find_criterion(name).name])]
    return list(dict.fromkeys(expanded))


def _check_option_names(request: type[Options], options: Iterable[str], own: Collection[str]) -> None:
    """Refuse keyword arguments that are no options, or that a call has arguments of its `own` for."""
    for name in options:
        check_choice("option", name, [known for known in option_fields(request) if known not in own])


@documented
@dataclass
class PruneRequest(TuningOptions, CutOptions):
    """What to prune, and how."""

    base: str = option(MISSING, MODEL_HELP, MODEL)
    output: str = option(MISSING, "Folder to write, or a .gguf file if BASE is one", MODEL)
    dtype: str = option(
        "auto",
        "Data type of the weights to write; auto keeps the base's, or uses bfloat16 if a GGUF file becomes a folder",
        choices=DTYPES,
    )
    from_curve: Path | None = option(
        None,
        "Folder of a curve of BASE made by rank --curve: the number, target or budget (by default the curve's own) picks a "
        "point of it, which determines the layers and, unless they are given, the repair and its calibration",
        PATH,
    )
    adapter: bool = option(False, "Write a PEFT adapter (the plan and the tuned layers) instead of a whole model")
    revision: str | None = option(None, "Branch, tag or commit of BASE on the Hub", revision_of="base")
    link: bool = option(False, "Hard-link weight files that do not change, instead of copying them")
    check: bool = option(
        False,
        "Load both BASE and the pruned model, and compare their logits on a few tokens, with the dropped layers of BASE "
        "bypassed",
    )
    force: bool = option(False, "Replace OUTPUT if it exists")
    _: KW_ONLY
    calibration: str = _curve_option("calibration")
    calibration_samples: int = _curve_option("calibration_samples")
    calibration_length: int = _curve_option("calibration_length")
    seed: int = _curve_option("seed")

    @classmethod
    def from_call(cls, base: str, output: str | os.PathLike[str], options: Mapping[str, Any]) -> PruneRequest:
        """The request that a call in Python makes, with its keyword arguments as options."""
        _check_option_names(cls, options, ("base", "output"))
        request = cls(base, os.fspath(output), **options)
        request.refuse_unused()
        return request

    @property
    def default_drop(self) -> float | None:
        """A curve says itself how many layers were asked for."""
        return super().default_drop if self.from_curve is None else None

    def refuse_unused(self) -> None:
        """Refuse options that would have no effect. Recipes don't: their files may hold options for several kinds of run.

        Raises:
            CutError: One of them is set.
        """
        criterion = find_criterion(self.criterion)
        criterion_option = ("criterion",) if self.criterion != self.default_criterion else ()
        which = (*criterion_option, "variant", "protect_first", "protect_last", "contiguous", "steps")
        if self.drop_layers is not None:
            refuse_unused(self, ("from_curve", *AMOUNTS, *which), "with drop_layers, which names the layers to drop")
        elif self.from_curve is not None:
            sizes = ("context", "batch", "target_dtype")
            refuse_unused(self, (*which, *sizes), "with from_curve, whose points say which layers go")
        elif criterion.needs == "count" or criterion.kind == "choice":
            refuse_unused(self, ("steps",), f"with criterion {criterion.name}, which chooses all layers at once")
        if not criterion.has_variant:
            refuse_unused(self, ("variant",), f"with criterion {criterion.name}, of which there is one definition")
        if not self.adapter:
            refuse_unused(self, ("tune_layers", "tune_lm_head"), "without adapter=True")
        super().refuse_unused()
        by_text = self.drop_layers is None and (self.budget or self.from_curve or criterion.needs == "text")
        if not (by_text or self.repair):
            of_choice = f"with criterion {criterion.name} and without a repair or a budget"
            refuse_unused(self, TEXT_OPTIONS, of_choice if self.drop_layers is None else "without a repair")

    def with_calibration(self, measured: Mapping[str, Any] | None = None) -> PruneRequest:
        """With the calibration options that are not given as a curve was `measured`, or at their defaults."""
        options = {
            name: (measured or {}).get(name, known.default)
            for name, known in option_fields(CalibrationOptions).items()
        }
        return replace(self, **{name: value for name, value in options.items() if getattr(self, name) is None})


@dataclass(kw_only=True)
class WalkOptions(Options):
    """Where the layers of a base run, one at a time."""

    dtype: str = option(
        "auto",
        "Data type of the weights; auto keeps the base's, or uses float32 on a CPU without fast 16-bit multiplication",
        choices=DTYPES,
    )
    device: str = option(
        "auto", "Device that runs the layers: cpu, cuda, cuda:1, mps, or auto, which uses a GPU if there is one"
    )
    revision: str | None = option(None, "Branch, tag or commit of BASE on the Hub", revision_of="base")


@documented
@dataclass
class RankRequest(WalkOptions, CalibrationOptions, SelectionOptions):
    """What to rank, and how."""

    base: str = option(MISSING, MODEL_HELP, MODEL)
    output: Path | None = option(None, "Folder for scores.json and the plots", PATH, positional=True)
    criteria: list[str] | tuple[str, ...] = option(
        ("all",),
        "Criteria to compute, separated by commas; all means every one but auto, without those that the model has no scores for",
        Kind(_parse_criteria, _check_criteria, "C"),
        choices="criterion",
        flag="criterion",
    )
    lengths: list[int] | None = option(
        None, "Lengths of the blocks to score, in layers, such as 1-8; by default the number of layers to drop", LAYERS
    )
    curve: bool = option(
        False,
        "Instead of scoring layers, find the best cut for each number of layers, with its parameters, bytes, speed-up, and "
        "quality with and without repair. With the same OUTPUT, an interrupted curve resumes",
    )
    curve_up_to: int | None = option(
        None, "Maximum number of layers to drop on the curve; by default half of them", integer(1, 10_000)
    )
    force: bool = option(False, "Replace the ranking or the curve in OUTPUT")

    @classmethod
    def from_call(
        cls, base: str, output: str | os.PathLike[str] | None, curve: bool, options: Mapping[str, Any]
    ) -> RankRequest:
        """The request that a call in Python makes, with its keyword arguments as options."""
        _check_option_names(cls, options, ("base", "output", "curve"))
        return cls(base, output=None if output is None else Path(output), curve=curve, **options)

    def check_combination(self) -> None:
        """Refuse what only a curve, or only a ranking, uses."""
        super().check_combination()
        if self.curve:
            unused = ("criteria", "variant", "target_dtype", "lengths")
            refuse_unused(self, unused, "on a curve, whose cuts are searched for")
        else:
            refuse_unused(self, ("curve_up_to",), "without curve=True")
            self.refuse_unused()
            criteria = [find_criterion(name) for name in self.criteria]
            why = f"with criterion {join_words(self.criteria)}"
            if not any(criterion.scores_blocks(True) for criterion in criteria):
                refuse_unused(self, ("lengths",), why)
            if not any(criterion.needs == "text" for criterion in criteria):
                refuse_unused(self, TEXT_OPTIONS, why)
            if not any(criterion.has_variant for criterion in criteria):
                refuse_unused(self, ("variant",), f"{why}, of which there is one definition")
            if "auto" not in self.criteria:
                refuse_unused(self, ("repair",), "on scores, unlike on a curve and with criterion auto")


@documented
@dataclass
class AdviseRequest(WalkOptions, AmountOptions):
    """The model, and the time available for it."""

    base: str = option(MISSING, MODEL_HELP, MODEL)
    output: Path | None = option(
        None, "YAML file to write, with the settings for recipes/sft_tail.py", PATH, positional=True
    )
    _: KW_ONLY
    drop: float | int | None = option(
        None,
        "Fraction (rounded down to whole layers) or number of layers to drop; by default as many as are expected to keep the "
        "perplexity within 1.25 times the dense model's, or 0.25 for models with 5 billion parameters or more",
        DROP,
    )
    minutes: float = option(
        60,
        "Minutes available on this machine for repair and training; ignored for models with 5 billion parameters or more",
        number_between(0, 1e6, "a number of minutes above 0 and below 1,000,000", "MIN"),
    )
    from_curve: Path | None = option(
        None,
        "Folder of a curve of BASE made by rank --curve, whose losses before training replace the estimates; refused for "
        "models with 5 billion parameters or more",
        PATH,
    )
    max_perplexity_ratio: float | None = option(
        None,
        "Drop as many layers as possible while the perplexity expected after healing is at most this multiple of the dense "
        "model's, such as 1.1",
        RATIO,
    )
    max_kl: float | None = option(
        None,
        "Drop as many layers as possible while the KL divergence from the dense model that is expected after healing is at "
        "most this many nats per token, such as 0.2",
        NATS,
    )
    min_top1_agreement: float | None = option(None, "Not available here: it was not measured after healing", SHARE)
    force: bool = option(False, "Replace OUTPUT if it exists")

    @property
    def default_drop(self) -> None:
        """The number of layers is left open."""

    def check_combination(self) -> None:
        """Refuse what was not measured."""
        super().check_combination()
        self.refuse_unused()
        if self.min_top1_agreement is not None:
            raise CutError(
                "min_top1_agreement is not available here, since it was not measured after healing; use max_kl or "
                "max_perplexity_ratio"
            )


@documented
@dataclass
class InspectRequest(Options):
    """What to inspect."""

    model: str = option(MISSING, MODEL_HELP, MODEL)
    drop: float | int = option(0.25, "Cut to try out: a fraction or a number of layers, the last ones", DROP)
    drop_layers: list[int] | None = option(None, "Cut to try out: these layers, counted from 0, such as 12-18", LAYERS)
    revision: str | None = option(None, "Branch, tag or commit of MODEL on the Hub", revision_of="model")


@documented
@dataclass
class RecipesRequest(Options):
    """Where to copy the recipes."""

    output: Path = option(Path("recipes"), "Folder to write", PATH, positional=True)
