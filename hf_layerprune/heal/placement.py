"""On which device, and in which type, a trainer's weights are held."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CutError
from ..runtime.devices import is_offloaded
from ..runtime.memory import free_memory, is_out_of_memory
from ..runtime.prefix import Prefix

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from .config import HealConfig

logger = logging.getLogger(__name__)

# Part of the name of every kind of attention that runs on GPUs alone.
_GPU_ATTENTION = "flash"


def use_one_gpu(model: Any, args: HealConfig) -> None:
    """Train on the first GPU if a single process sees several.

    The Trainer would use `nn.DataParallel`, whose replicas run the original model's forward method. A model that is
    already split over the GPUs is left as it is.
    """
    if args.n_gpu > 1 and not is_on_several_devices(model):
        logger.warning(
            "one process has %d GPUs and trains on the first alone; start one process for each with accelerate launch "
            "--multi_gpu, or show it a single one with CUDA_VISIBLE_DEVICES",
            args.n_gpu,
        )
        args._n_gpu = 1


def disable_weight_repacking(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in a pass without gradients, which it does on some CPUs.

    Later passes would give no gradients to the layers below, without an error (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def is_on_several_devices(model: Any) -> bool:
    """Whether a model was loaded onto several devices."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def check_not_offloaded(model: Any) -> None:
    """Refuse to train offloaded weights: accelerate loads them again before each run, so what is learnt is lost."""
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        if parameter.requires_grad and parameter.is_meta and is_offloaded(owner):
            raise CutError(
                f"{name} is offloaded, so it can't be trained; load the model without device_map, or with one that offloads "
                "only frozen layers"
            )


def cast_trained_to_float32(model: Any) -> None:
    """Keep trained weights in float32, including those of a quantised model, which TRL casts to bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()


def autocast_on_model_device(model: PreTrainedModel, accelerator: Accelerator) -> torch.autocast:
    """The accelerator's mixed precision, on the device that a model is on: before FSDP shards it, that is the CPU."""
    dtype = torch.float16 if accelerator.mixed_precision == "fp16" else torch.bfloat16
    return torch.autocast(model.device.type, dtype, enabled=accelerator.native_amp)


@contextmanager
def eager_attention_on_cpu(model: PreTrainedModel) -> Iterator[None]:
    """Let a model on the CPU run inside a `with` block, even if its attention is for GPUs alone, as FlashAttention is."""
    own: Any = {"": model.config._attn_implementation}
    if model.device.type != "cpu" or _GPU_ATTENTION not in str(own[""]):
        yield
        return
    parts = {name: getattr(model.config, name, None) for name in model.config.sub_configs}
    own |= {name: part._attn_implementation for name, part in parts.items() if part is not None}
    model.set_attn_implementation("eager")  # which every model has
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def restore_prefix(prefix: Prefix, model: PreTrainedModel) -> None:
    """Restore the frozen layers; where the device has no room for them, move the whole model to the CPU."""
    try:
        prefix.restore()
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    logger.warning(
        "%s has no room for the frozen layers during training: the model was moved to the CPU, where it can be saved",
        model.device,
    )
    prefix.restore("cpu")
    model.to("cpu")  # type: ignore[arg-type]
    free_memory()
