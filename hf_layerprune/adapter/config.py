"""`LayerDropConfig`: which layers to drop, how to choose them, and what to tune afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import PeftConfig, TaskType
from peft.utils.constants import DUMMY_TARGET_MODULES

from ..errors import CutError
from ..layer_ranges import MAX_LAYERS
from ..options import (
    CalibrationOptions,
    CutOptions,
    TuningOptions,
    check_options,
    documented,
    integer,
    join_words,
    option,
    option_fields,
    tuple_of,
)
from ..options.kinds import FLAG, TEXT, check_value, quoted
from ..select import registry

_NAMES = tuple_of(TEXT)
# The fields that are not options, and may be unset.
_CHECKED = {
    "modules_to_save": _NAMES,
    "num_base_layers": integer(1, MAX_LAYERS),
    "own_modules_to_save": _NAMES,
    "repaired_modules": _NAMES,
}


class LayerDropPeftType(str, Enum):  # noqa: UP042 (get_model_status() reads what follows the dot in str() of it)
    """The name of the method in PEFT's mappings, which are looked up by value. PEFT's own enum can't be extended."""

    LAYER_DROP = "LAYER_DROP"


@documented
@dataclass
class LayerDropConfig(TuningOptions, CutOptions, PeftConfig):
    """Configuration of a [`LayerDropModel`]: drop whole decoder layers, then tune some of the rest.

    The defaults are the recipe of arXiv:2411.15558: drop the last 25 % of the layers, then tune `lm_head`, the norm
    before it and the last three remaining layers. An `lm_head` tied to the embeddings stays tied and is not tuned
    unless `tune_lm_head=True`, because untying it adds its parameters. Once a model is pruned, `drop_layers` holds the
    dropped layers, so a saved config makes the same cut again; to choose again, set it to `None`. Everything else is
    recorded in the model's own copy, `model.peft_config["default"]`, so one config can prune several models of the same
    depth. Sizes such as `target_size` may be numbers or strings (`"12GB"`).
    """

    tune_final_norm: bool = option(
        True, "Let the adapter tune the norm before lm_head, as in the code of arXiv:2411.15558"
    )
    keep_dropped: bool = option(
        False, "Keep the dropped layers in memory, so that disable_adapter() restores the dense model"
    )
    check_cut: bool = option(
        True,
        "After a cut in memory, compare its logits on a few tokens with those of the dense model with the dropped layers "
        "bypassed",
    )
    target_modules: str | None = field(
        default=None, metadata={"help": "Set by the method for PEFT to read; leave it out."}
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Further modules to tune, by full name; after pruning, the list of all tuned modules."},
    )
    num_base_layers: int | None = field(default=None, metadata={"help": "Recorded: the base's number of layers."})
    base_commit: str | None = field(default=None, metadata={"help": "Recorded: the base's commit on the Hub."})
    own_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Recorded: `modules_to_save` as the user set it."}
    )
    untied_lm_head: bool = field(
        default=False, metadata={"help": "Recorded: whether lm_head was tied in the base and no longer is."}
    )
    repaired_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Recorded: modules whose weights a repair changed. They are saved with the adapter."},
    )

    def __post_init__(self) -> None:
        PeftConfig.__post_init__(self)
        self.peft_type = LayerDropPeftType.LAYER_DROP
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        if self.task_type != TaskType.CAUSAL_LM:
            raise CutError(
                f"task_type={quoted(self.task_type)}: only causal language models can be tuned; leave it out, or drop the layers "
                "of another model with drop_layers(model, [...]), and tune it by other means"
            )
        if isinstance(self.base_model_name_or_path, os.PathLike):
            self.base_model_name_or_path = os.fspath(self.base_model_name_or_path)
        # A saved config says that it is for inference. PEFT sets this again only where it loads the weights as well.
        self.is_saved = self.inference_mode is not False
        if self.is_saved:
            self.inference_mode = None  # type: ignore[assignment]
        self._chosen_with: dict[str, Any] = {}
        check_options(self)

    def check_combination(self) -> None:
        super().check_combination()
        if self.target_modules and self.target_modules != DUMMY_TARGET_MODULES:
            raise CutError(
                f"target_modules={quoted(self.target_modules)} has no effect: this method tunes whole modules, which tune_layers, "
                "tune_lm_head, tune_final_norm and modules_to_save name; leave it out"
            )
        for name, kind in _CHECKED.items():
            if (value := getattr(self, name)) is not None:
                value = check_value(name, value, kind)
                setattr(self, name, list(value) if isinstance(value, tuple) else value)
        check_value("untied_lm_head", self.untied_lm_head, FLAG)
        self._check_choice()

    def check_again(self) -> None:
        """Check fields that were set since this was made, and remember those by which layers will be chosen, if they will.

        Raises:
            CutError: A field is not accepted.
        """
        if self._chosen_with.get("drop_layers") not in (None, self.drop_layers):  # other layers were set since
            self._chosen_with = {}
        check_options(self)
        if self.drop_layers is None:
            self._chosen_with = {name: getattr(self, name) for name in self._deciding_options()}

    def take_cut(self, used: LayerDropConfig) -> None:
        """Take over the cut from a copy of this config that has pruned a model."""
        self.drop_layers, self.num_base_layers = used.drop_layers, used.num_base_layers
        self._chosen_with = used._chosen_with and used._chosen_with | {"drop_layers": used.drop_layers}

    def _deciding_options(self) -> list[str]:
        """The options that decide which layers are chosen."""
        unused = {"repair"}
        if self.budget is None and registry.find_criterion(self.criterion).needs != "text":
            unused |= option_fields(CalibrationOptions).keys()
        if self.criterion == "random":
            unused.discard("seed")
        return [name for name in option_fields(CutOptions) if name not in unused]

    def _check_choice(self) -> None:
        changed = [
            f"{name}={quoted(getattr(self, name))}"
            for name, value in self._chosen_with.items()
            if name != "drop_layers" and getattr(self, name) != value
        ]
        if changed and self.drop_layers is not None:
            raise CutError(
                f"{join_words(changed)} would have no effect: this config was used before, and now holds the layers that were "
                f"chosen then, drop_layers={quoted(self.drop_layers)}; set drop_layers=None to choose again, or make a new config"
            )

    @property
    def is_new(self) -> bool:
        """Whether the config is for a new adapter, and not for one whose weights are about to be loaded."""
        return self.inference_mode is None or not (self.inference_mode or self.is_saved)

    def clear_records(self, *, repair: bool = True) -> None:
        """Forget what was recorded for another adapter, except its cut and, unless `repair`, its repair."""
        self.inference_mode = self.is_saved = False
        if self.own_modules_to_save is not None:
            self.modules_to_save, self.own_modules_to_save = self.own_modules_to_save or None, None
            self.untied_lm_head, self.base_commit = False, None
            if repair:
                self.repaired_modules = None
