"""The options that several commands, configs and recipes share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import CutError
from ..layer_ranges import MAX_LAYERS
from .amount import AmountOptions
from .declare import check_options, option
from .kinds import FLAG, LAYERS, TUNE_LAYERS, integer


@dataclass(kw_only=True)
class Options:
    """Options that are validated when an instance is created."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(kw_only=True)
class DisplayOptions(Options):
    """What a command shows. Every command has these options, before or after its name."""

    quiet: bool = option(False, "Show only errors and the result")
    debug: bool = option(False, "Print the traceback of an error (also HF_LAYERPRUNE_DEBUG=1)")


@dataclass(kw_only=True)
class ResultOptions(DisplayOptions):
    """What a command with a result shows."""

    json: bool = option(False, "Print the result as one JSON object")


@dataclass(kw_only=True)
class CalibrationOptions(Options):
    """The text that criteria and repairs look at."""

    help_group = "calibration"

    calibration: str = option(
        "self",
        "Calibration text for criteria and repairs: self (the dense model writes it); a .txt, .jsonl or .parquet file "
        "(rows.jsonl:column); or a folder or Hub id of a data set (id:split:column). For a model that reads images, a "
        "column image or images next to the text is used as well",
    )
    calibration_samples: int = option(128, "Number of calibration rows", integer(1))
    calibration_length: int = option(512, "Number of tokens in each calibration row", integer(2))
    seed: int = option(42, "Random seed for the choice of layers, rows and text", integer(0, 2**63 - 1, "SEED"))


@dataclass(kw_only=True)
class SelectionOptions(AmountOptions, Options):
    """How many layers are dropped, and which may be."""

    help_group = "cut and repair"

    variant: str = option(
        "original",
        "Definition of the criterion: that of its own source (original), or that of the code of arXiv:2411.15558 (paper)",
        choices="variant",
    )
    protect_first: int | None = option(
        None, "Number of initial layers to protect from dropping; the default depends on the criterion",
        integer(0, MAX_LAYERS)
    )  # fmt: skip
    protect_last: int | None = option(
        None, "Number of final layers to protect from dropping; the default depends on the criterion",
        integer(0, MAX_LAYERS)
    )  # fmt: skip
    contiguous: bool = option(False, "Drop a single block of adjacent layers")
    repair: str | None = option(
        None, "Closed-form compensation for the dropped layers, before any training", choices="repair"
    )


@dataclass(kw_only=True)
class CutOptions(CalibrationOptions, SelectionOptions):
    """Which layers are dropped, and how the model is repaired before training."""

    help_group = "cut and repair"

    drop_layers: Sequence[int] | None = option(
        None,
        "Layers to drop, as indices in the base counted from 0, such as 20-26,29; replaces drop, targets, budgets and "
        "criterion",
        LAYERS,
    )
    criterion: str | None = option(
        None,
        "How the layers are chosen; by default reverse_order, or auto if a budget decides how many to drop",
        choices="criterion",
    )
    steps: int = option(
        1,
        "Number of rounds in which the layers are chosen; each round scores the layers that the previous one left",
        integer(1, 10_000),
    )

    def check_combination(self) -> None:
        super().check_combination()
        self.criterion = self.criterion or self.default_criterion
        if self.drop_layers is None and self.contiguous and self.steps > 1:
            raise CutError(
                f"steps={self.steps} and contiguous=True exclude each other, since a block is chosen in one step; leave one of "
                "them out"
            )

    @property
    def default_criterion(self) -> str:
        """The criterion, if none is specified."""
        return "auto" if self.budget else "reverse_order"


@dataclass(kw_only=True)
class TuningOptions(Options):
    """What an adapter tunes."""

    help_group = "adapter"

    tune_layers: int | str | list[int] = option(
        3,
        "Layers that the adapter tunes: a number of last layers, cut (the layers next to each cut), or base indices such "
        "as 20-22",
        TUNE_LAYERS,
    )
    tune_lm_head: bool | None = option(
        None,
        "Let the adapter tune lm_head; by default, it does unless lm_head is tied to the embeddings, since tuning unties it, "
        "which adds its parameters",
        FLAG,
    )
