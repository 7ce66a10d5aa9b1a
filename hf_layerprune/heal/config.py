"""`HealConfig`: TRL's `SFTConfig`, and what healing adds to it."""

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
# A CPU's matrix products are prepared again for each new shape, which takes longer than multiplying some padding.
_CPU_MULTIPLE = 64


@dataclass
class HealConfig(SFTConfig):
    """
    Configuration of a [`HealTrainer`].

    It is TRL's `SFTConfig` with other defaults: no gradient checkpointing, which TRL switches on and which would force
    gradients through all frozen layers; a learning rate that depends on what is trained; a short warm-up; on a CPU, rows
    padded to a multiple of 64; and float32 in place of mixed precision on a CPU without fast products of bfloat16.

    Args:
        method (`str`, defaults to `"auto"`):
            What is trained, such as `"lm_head+last3"`, `"cut2"`, `"lora"` or `"full"`; by default it goes by where the
            cut is. `hf_layerprune.heal.methods` lists them all.
        learning_rate (`float`, *optional*):
            AdamW's, at its peak. By default the method's own, see `hf_layerprune.heal.methods`.
        loss (`str`, defaults to `"ce"`):
            `"ce"` for cross-entropy on the data, `"kd"` for distillation from the dense model, `"ce+kd"` for both.
        kd_share (`float`, defaults to 0.5):
            Of `"ce+kd"`, what distillation counts; cross-entropy counts the rest.
        kd_temperature (`float`, defaults to 1.0):
            Temperature of both distributions in distillation.
        kd_direction (`str`, defaults to `"forward"`):
            `"forward"` for KL(teacher || student), `"reverse"` for KL(student || teacher).
        kd_tokens (`str`, defaults to `"all"`):
            `"all"` to learn from the teacher on every token, prompts included; `"completion"` only where
            cross-entropy would count.
        teacher (`str`, *optional*):
            The dense model. By default what the model was pruned from.
        cache (`str`, defaults to `"auto"`):
            Whether the frozen layers' output is computed once and kept on disk: `"auto"` where that is exact, `"on"`
            to be told if it is not, `"off"`.
        cache_dir (`str`, *optional*):
            Where. By default `cache` in the output folder. Processes on several machines must share it.
        cache_batch_tokens (`int`, *optional*):
            How many tokens go through the frozen layers at once. By default 4096 on a CPU and 32768 elsewhere.
        keep_cache (`bool`, defaults to `False`):
            Whether it stays there when training has ended.
        float32_weights (`bool`, defaults to `True`):
            Whether what is trained is held in float32 while it is trained in mixed precision: a small step on a
            bfloat16 weight rounds to nothing. Without mixed precision, on a CPU without fast products of bfloat16, the
            whole model is.
    """

    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate of AdamW. By default one that suits the method."}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Recompute the trained layers' activations, for memory. Frozen layers have none to keep."},
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Steps of linear warm-up, or below 1 the share of all steps."}
    )
    # TRL's newest defaults, for every version: others would leave the loss to TRL, or don't know the field.
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
    kd_share: float = field(default=0.5, metadata={"help": "Of ce+kd, what distillation counts."})
    kd_temperature: float = field(default=1.0, metadata={"help": "Temperature of distillation."})
    kd_direction: str = field(
        default="forward",
        metadata={"help": "forward: KL(teacher || student); reverse.", "choices": list(DIRECTIONS)},
    )
    kd_tokens: str = field(
        default="all",
        metadata={"help": "Tokens that the teacher is heard on: all or completion.", "choices": ["all", "completion"]},
    )
    teacher: str | None = field(
        default=None, metadata={"help": "The dense model. By default what the model was pruned from."}
    )
    cache: str = field(
        default="auto",
        metadata={
            "help": "Compute the frozen layers once: auto (where that is exact), on or off.",
            "choices": list(CACHE_MODES),
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for it. By default `cache` in the output folder."}
    )
    cache_batch_tokens: int | None = field(
        default=None, metadata={"help": "Tokens that go through the frozen layers at once."}
    )
    keep_cache: bool = field(default=False, metadata={"help": "Keep the cache when training has ended."})
    float32_weights: bool = field(
        default=True, metadata={"help": "Hold what is trained in float32 in mixed-precision training."}
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
        """Whether the dense model teaches."""
        return "kd" in self.loss
