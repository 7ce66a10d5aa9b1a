"""`HealConfig`: TRL's `SFTConfig` with the settings of healing."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..errors import LayerPruneError
from ..runtime.precision import slow_in_16_bits
from ..versions import trl_pads_by_itself

try:
    from trl import SFTConfig
except ImportError as error:
    raise LayerPruneError('training needs TRL: pip install "hf-layerprune[train]"') from error

from .losses import DIRECTIONS
from .methods import method_help

LOSSES = ("ce", "kd", "ce+kd")
CACHE_MODES = ("auto", "on", "off")
# On a CPU, each new shape costs a set-up of the matrix product that takes longer than multiplying some padding.
_CPU_MULTIPLE = 64


@dataclass
class HealConfig(SFTConfig):
    """
    Configuration of a [`HealTrainer`].

    It is TRL's `SFTConfig` with other defaults: no gradient checkpointing, which TRL enables and which would force
    gradients through all frozen layers; a learning rate that depends on the method; a short warm-up; on a CPU, rows
    padded to a multiple of 64; and float32 instead of mixed precision on a CPU without fast bfloat16 multiplication.

    Args:
        method (`str`, defaults to `"auto"`):
            What is trained, such as `"lm_head+last3"`, `"cut2"`, `"lora"` or `"full"`; by default it depends on where
            the cut is. `hf_layerprune.heal.methods` lists all methods.
        learning_rate (`float`, *optional*):
            Peak learning rate of AdamW. By default the method's own, see `hf_layerprune.heal.methods`.
        loss (`str`, defaults to `"ce"`):
            `"ce"` for cross-entropy on the data, `"kd"` for distillation from the dense model, `"ce+kd"` for both.
        kd_share (`float`, defaults to 0.5):
            Weight of distillation in `"ce+kd"`; cross-entropy has the rest.
        kd_temperature (`float`, defaults to 1.0):
            Temperature of both distributions in distillation.
        kd_direction (`str`, defaults to `"forward"`):
            `"forward"` for KL(teacher || student), `"reverse"` for KL(student || teacher).
        kd_tokens (`str`, defaults to `"all"`):
            `"all"` to distil on every token, prompts included; `"completion"` to distil only on tokens with a label.
        teacher (`str`, *optional*):
            The dense model. By default the one that the model was pruned from.
        cache (`str`, defaults to `"auto"`):
            Whether to compute the frozen layers' output once and keep it on disk: `"auto"` if that is exact, `"on"` to
            raise an error if it is not, `"off"`.
        cache_dir (`str`, *optional*):
            Folder of the cache. By default `cache` in the output folder. Processes on several machines must share it.
        cache_batch_tokens (`int`, *optional*):
            How many tokens go through the frozen layers at a time. By default 4096 on a CPU and 32768 elsewhere.
        keep_cache (`bool`, defaults to `False`):
            Whether to keep the cache after training.
        float32_weights (`bool`, defaults to `True`):
            Whether to hold trained weights in float32 in mixed-precision training, since a small step on a bfloat16
            weight is lost to rounding. Without mixed precision, on a CPU without fast bfloat16 multiplication, the
            whole model is held in float32.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate of AdamW. By default one that suits the method."}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Recompute the trained layers' activations to save memory. Frozen layers store none."},
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of linear warm-up; a value below 1 is a share of all steps."}
    )
    # TRL's newest defaults, for every version: older defaults would leave the loss to TRL, or the field is missing.
    loss_type: str = field(default="nll", metadata={"help": "TRL's loss: nll or dft."})
    router_aux_loss_coef: float | None = field(
        default=None, metadata={"help": "Weight of a mixture of experts' load-balancing loss. By default 0."}
    )
    pad_to_multiple_of: int | str | None = field(
        default="auto", metadata={"help": "Pad rows to a multiple of this; by default 64 on a CPU."}
    )
    method: str = field(
        default="auto",
        metadata={"help": method_help()},
    )
    loss: str = field(
        default="ce",
        metadata={"help": "ce (the data), kd (distillation from the dense model) or ce+kd.", "choices": list(LOSSES)},
    )
    kd_share: float = field(default=0.5, metadata={"help": "Weight of distillation in ce+kd."})
    kd_temperature: float = field(default=1.0, metadata={"help": "Temperature of distillation."})
    kd_direction: str = field(
        default="forward",
        metadata={
            "help": "forward: KL(teacher || student); reverse: KL(student || teacher).",
            "choices": list(DIRECTIONS),
        },
    )
    kd_tokens: str = field(
        default="all",
        metadata={"help": "Tokens to distil on: all or completion.", "choices": ["all", "completion"]},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "The dense model. By default the one that the model was pruned from."}
    )
    cache: str = field(
        default="auto",
        metadata={
            "help": "Compute the frozen layers' output once: auto (if that is exact), on or off.",
            "choices": list(CACHE_MODES),
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder of the cache. By default `cache` in the output folder."}
    )
    cache_batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that go through the frozen layers at a time."}
    )
    keep_cache: bool = field(default=False, metadata={"help": "Keep the cache after training."})
    float32_weights: bool = field(
        default=True, metadata={"help": "Hold trained weights in float32 in mixed-precision training."}
    )

    def __post_init__(self) -> None:
        on_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 is None and not self.fp16 and on_cpu and slow_in_16_bits():
            self.bf16 = False
        left_to_us = self.pad_to_multiple_of == "auto" and not (self.packing or self.padding_free)
        if self.pad_to_multiple_of == "auto" and not trl_pads_by_itself():
            self.pad_to_multiple_of = None
        super().__post_init__()
        if left_to_us and self.pad_to_multiple_of is None and self.device.type == "cpu":
            self.pad_to_multiple_of = _CPU_MULTIPLE
        for name, choices in (
            ("loss", LOSSES),
            ("cache", CACHE_MODES),
            ("kd_direction", DIRECTIONS),
            ("kd_tokens", ("all", "completion")),
        ):
            if getattr(self, name) not in choices:
                raise LayerPruneError(f"{name}={getattr(self, name)!r} is unknown; it may be {', '.join(choices)}")
        if not 0 < self.kd_share <= 1:
            raise LayerPruneError(f"kd_share={self.kd_share} must be above 0 and at most 1; use loss=ce for none")
        if self.kd_temperature <= 0:
            raise LayerPruneError(f"kd_temperature={self.kd_temperature} must be above 0")

    @property
    def distils(self) -> bool:
        """Whether the loss includes distillation from the dense model."""
        return "kd" in self.loss
