"""`LayerDropConfig`: which layers to drop, how to choose them, and what to tune afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from peft import PeftConfig, TaskType

from ..errors import CutError
from .registration import register


class LayerDropPeftType(StrEnum):
    """The name of the method in PEFT's mappings, which are looked up by value. PEFT's own enum takes no newcomers."""

    LAYER_DROP = "LAYER_DROP"


@dataclass
class LayerDropConfig(PeftConfig):
    """
    Configuration of a [`LayerDropModel`]: drop whole decoder layers, then tune the tail of what is left.

    The defaults are the recipe of arXiv:2411.15558: drop the last 25 % of the layers, tune `lm_head` and the last
    three layers that remain.

    Args:
        drop (`float` or `int`, defaults to 0.25):
            How much to drop: a fraction of the layers, floored to whole ones (8 of 32, 6 of 26, 7 of 30), or a count.
        drop_layers (`list[int]`, *optional*):
            The very layers to drop, as indices in the base, `0` the first. Overrides `drop` and `criterion`. Once a
            model is pruned, this always holds what was dropped, so that a saved config makes the same cut again.
        criterion (`str`, defaults to `"reverse_order"`):
            How layers are chosen: `"reverse_order"`, `"random"`, `"magnitude_l1"`, `"magnitude_l2"`, `"taylor"`,
            `"perplexity"`, `"block_influence"`, `"angular_distance"`, `"kl"`, `"repairability"`, or `"auto"`, which
            short-lists, tries the best few, and says why it chose.
        variant (`str`, defaults to `"published"`):
            `"published"` computes a criterion as its own source defines it, `"paper"` as the code of arXiv:2411.15558
            did.
        steps (`int`, defaults to 1):
            In how many rounds the layers are chosen, each scored on what the rounds before left. One is one-shot.
        protect_first (`int`, *optional*):
            So many layers at the start are never chosen. By default 4 for `"taylor"` and the magnitudes as published,
            and 0 else.
        protect_last (`int`, *optional*):
            So many layers at the end are never chosen. By default 2 for `"taylor"` and the magnitudes as published, and
            0 else.
        contiguous (`bool`, defaults to `False`):
            Whether the chosen layers must lie side by side.
        calibration (`str`, defaults to `"self"`):
            The text that a criterion or a repair looks at: `"self"` for text that the dense model writes itself, a
            `.txt` or `.jsonl` file (`rows.jsonl:column`), or a data set on the Hub (`id:split:column`).
        calibration_samples (`int`, defaults to 128):
            So many rows of it.
        calibration_length (`int`, defaults to 512):
            So many tokens a row.
        seed (`int`, defaults to 42):
            For whatever is drawn: layers, rows, text.
        repair (`str`, *optional*):
            What makes up for the dropped layers before anything is trained: `"linear"` folds a linear map, fitted to
            the calibration set, into a weight in front of each cut; `"refit"` fits that weight itself anew, which
            explains more and wants more text; `"magnitude"` rescales.
        tune_layers (`int`, `"cut"` or `list[int]`, defaults to 3):
            Which layers are tuned: so many at the end of what remains, `"cut"` for the layers beside each cut, or
            indices in the base.
        tune_lm_head (`bool`, defaults to `True`):
            Whether `lm_head` is tuned. Where it is tied to the embeddings this unties it, which adds a matrix.
        tune_final_norm (`bool`, defaults to `True`):
            Whether the norm before `lm_head` is tuned, as the code of the paper does.
        keep_dropped (`bool`, defaults to `False`):
            Hold on to the dropped layers in memory, so that `disable_adapter()` gives the dense model.
        target_modules (`str`, *optional*):
            Set by the method; PEFT reads it. Leave it alone.
        exclude_modules (`list[str]`, *optional*):
            Set by nobody; PEFT reads it. Leave it alone.
        modules_to_save (`list[str]`, *optional*):
            Further modules to tune, by full name. After pruning it lists all that is tuned, by its name in the pruned
            model.
        num_base_layers (`int`, *optional*):
            Recorded when the model is pruned: how many layers the base has.
        base_commit (`str`, *optional*):
            Recorded when the model is pruned: the commit of the base on the Hub, where it came from there.
        untied_lm_head (`bool`, defaults to `False`):
            Recorded when the model is pruned: whether the head was tied in the base and is not any more.
        repaired_modules (`list[str]`, *optional*):
            Recorded when the model is repaired: the modules whose weights changed, by their name in the pruned model.
            They are saved with the adapter, and are not fitted again.
    """

    drop: float | int = field(
        default=0.25,
        metadata={"help": "Fraction of the layers to drop, floored to whole layers, or a number of them."},
    )
    drop_layers: list[int] | None = field(
        default=None, metadata={"help": "Indices in the base of the layers to drop; overrides drop and criterion."}
    )
    criterion: str = field(
        default="reverse_order", metadata={"help": "How layers are chosen, such as reverse_order, perplexity or auto."}
    )
    variant: str = field(
        default="published",
        metadata={"help": "published: a criterion as its source defines it; paper: as arXiv:2411.15558 computed it."},
    )
    steps: int = field(default=1, metadata={"help": "Rounds in which layers are chosen and scored anew."})
    protect_first: int | None = field(
        default=None, metadata={"help": "So many layers at the start are never chosen (the criterion's own default)."}
    )
    protect_last: int | None = field(
        default=None, metadata={"help": "So many layers at the end are never chosen (the criterion's own default)."}
    )
    contiguous: bool = field(default=False, metadata={"help": "Whether the chosen layers must lie side by side."})
    calibration: str = field(
        default="self",
        metadata={"help": "Text for criteria and repair: self, a .txt or .jsonl file, or id:split:column on the Hub."},
    )
    calibration_samples: int = field(default=128, metadata={"help": "Rows of the calibration set."})
    calibration_length: int = field(default=512, metadata={"help": "Tokens in each of its rows."})
    seed: int = field(default=42, metadata={"help": "Seed of whatever is drawn: layers, rows, text."})
    repair: str | None = field(
        default=None,
        metadata={"help": "What makes up for dropped layers before training: linear, refit, magnitude, or nothing."},
    )
    tune_layers: int | str | list[int] = field(
        default=3,
        metadata={"help": "So many last layers, 'cut' for the layers beside each cut, or indices in the base."},
    )
    tune_lm_head: bool = field(default=True, metadata={"help": "Whether lm_head is tuned (and untied, where tied)."})
    tune_final_norm: bool = field(default=True, metadata={"help": "Whether the norm before lm_head is tuned."})
    keep_dropped: bool = field(
        default=False, metadata={"help": "Hold the dropped layers, so that disable_adapter() gives the dense model."}
    )
    target_modules: str | None = field(default=None, metadata={"help": "Set by the method; PEFT reads it."})
    exclude_modules: list[str] | None = field(default=None, metadata={"help": "PEFT reads it."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to tune, by full name; after pruning, all that is tuned."}
    )
    num_base_layers: int | None = field(default=None, metadata={"help": "Recorded: layers of the base."})
    base_commit: str | None = field(default=None, metadata={"help": "Recorded: commit of the base on the Hub."})
    untied_lm_head: bool = field(default=False, metadata={"help": "Recorded: whether lm_head was untied."})
    repaired_modules: list[str] | None = field(
        default=None, metadata={"help": "Recorded: modules whose weights a repair changed, by name when pruned."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LayerDropPeftType.LAYER_DROP
        self.task_type = self.task_type or TaskType.CAUSAL_LM
        if self.task_type != TaskType.CAUSAL_LM:
            raise CutError(f"task_type={self.task_type!r}: only causal language models are pruned, so leave it out")
        if self.drop_layers is not None:
            self.drop_layers = sorted(int(i) for i in self.drop_layers)
        for name, choices in (("variant", ("published", "paper")), ("repair", (None, "linear", "refit", "magnitude"))):
            if getattr(self, name) not in choices:
                wanted = " or ".join(repr(choice) for choice in choices)
                raise CutError(f"{name}={getattr(self, name)!r} is unknown; it may be {wanted}")
        tune = self.tune_layers
        if isinstance(tune, str) and tune.isdigit():  # from a command line
            tune = self.tune_layers = int(tune)
        is_count = isinstance(tune, int) and not isinstance(tune, bool) and tune >= 0
        is_indices = isinstance(tune, list | tuple) and all(isinstance(i, int) for i in tune)
        if not (is_count or is_indices or tune == "cut"):
            raise CutError(f"tune_layers={tune!r} must be a number of last layers, 'cut', or a list of base indices")


register()
