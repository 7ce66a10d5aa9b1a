"""`HealConfig`: TRL's `SFTConfig` with the settings of healing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import CutError, LayerPruneError
from ..options import check_options, documented, refuse_unused
from ..runtime.precision import is_slow_in_16_bits
from ..versions import trl_pads_by_itself
from .methods import parse_method
from .options import HealOptions

try:
    from trl import SFTConfig
except ImportError as error:
    raise LayerPruneError('training needs TRL: pip install "hf-layerprune[train]"') from error

# On a CPU, each new shape costs a set-up of the matrix product that takes longer than multiplying some padding.
_CPU_MULTIPLE = 64


def _trl_field(name: str, default: Any) -> Any:
    """A field of TRL's with another default. Older versions of TRL lack some of these fields."""
    known = SFTConfig.__dataclass_fields__.get(name)
    return field(default=default, metadata={} if known is None else known.metadata)


@documented
@dataclass
class HealConfig(HealOptions, SFTConfig):  # type: ignore[misc]
    """Configuration of a [`HealTrainer`].

    It is TRL's `SFTConfig` with other defaults: no gradient checkpointing, which TRL enables and which would force
    gradients through all frozen layers; a learning rate that depends on the method; a short warm-up; on a CPU, rows
    padded to a multiple of 64; and float32 instead of mixed precision on a CPU without fast bfloat16 multiplication.

    The recipe prepares the model for `method`; `HealTrainer` trains what requires gradients, and only takes its default
    learning rate from `method`.
    """

    gradient_checkpointing: bool | None = _trl_field("gradient_checkpointing", None)  # type: ignore[assignment]
    warmup_steps: float = _trl_field("warmup_steps", 0.03)
    # TRL's newest defaults, for every version: older defaults would leave the loss to TRL, or the field is missing.
    loss_type: str = _trl_field("loss_type", "nll")
    router_aux_loss_coef: float | None = _trl_field("router_aux_loss_coef", None)
    pad_to_multiple_of: int | str | None = _trl_field("pad_to_multiple_of", "auto")

    def __post_init__(self) -> None:
        self.hides_progress = bool(self.disable_tqdm)  # before TrainingArguments make it follow the level of their log
        self.use_cpu = on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.fp16 and on_cpu:  # accelerate would train in float32, and the history would say float16
            raise CutError(
                "fp16=True needs a GPU, and training would run on the CPU; use fp16=False, and bf16=True or bf16=False"
            )
        if self.bf16 is None and not self.fp16 and on_cpu and is_slow_in_16_bits():
            self.bf16 = False
        # NEFTune scales its noise by the length of the batch, padding included.
        unpadded = self.packing or self.padding_free or self.neftune_noise_alpha is not None
        pads_here = self.pad_to_multiple_of == "auto" and not unpadded
        if self.pad_to_multiple_of == "auto" and not trl_pads_by_itself():
            self.pad_to_multiple_of = None
        SFTConfig.__post_init__(self)
        if pads_here and self.pad_to_multiple_of is None and self.device.type == "cpu":
            self.pad_to_multiple_of = _CPU_MULTIPLE
        check_options(self)
        if self.method != "auto":
            parse_method(self.method)
        if self.loss != "ce+kd":
            refuse_unused(self, ("kd_share", "kd_alone"), f"with loss={self.loss}, unlike with ce+kd")
        if self.loss == "ce":
            refuse_unused(
                self, ("kd_temperature", "kd_direction", "kd_tokens"), "with loss=ce, unlike with kd and ce+kd"
            )
        if self.cache == "off" and not self.distils:
            refuse_unused(self, ("cache_dir", "keep_cache"), "with cache=off, unless the dense model teaches")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """The steps of the warm-up; one that is a share of the steps leaves the last, so that a single step trains."""
        steps: int = SFTConfig.get_warmup_steps(self, num_training_steps)
        return min(steps, max(num_training_steps - 1, 0)) if self.warmup_steps < 1 else steps

    @property
    def row_seed(self) -> int:
        """The seed of everything that is drawn for the rows."""
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def distils(self) -> bool:
        """Whether the dense model teaches: its distribution, its hidden states, or both."""
        return "kd" in self.loss or self.features > 0

    @property
    def teacher_setting(self) -> str:
        """The setting that needs the dense model, as errors name it."""
        return f"loss={self.loss}" if "kd" in self.loss else f"features={self.features:g}"
