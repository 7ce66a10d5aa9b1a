"""Which type a processor should compute in: many CPUs multiply numbers of 16 bits several times slower than float32."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import psutil
import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def slow_in_16_bits() -> bool:
    """Whether the CPU has no fast products of bfloat16, as x86 has from AVX-512 on.

    torch then multiplies in loops of its own, which take 4 to 9 times as long as float32 does.
    """
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # torch was built without oneDNN
        return True


def warn_if_slow(model: PreTrainedModel, instead: str) -> None:
    """Say that a model will be slow in its type, where it is on a CPU that has no fast products of it; once.

    Args:
        model (`PreTrainedModel`): The model.
        instead (`str`): What to do about it.
    """
    if model.dtype in (torch.bfloat16, torch.float16) and model.device.type == "cpu" and slow_in_16_bits():
        _warn_once(f"this CPU has no fast products of {_name(model.dtype)}, so this is slow; {instead}")


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def in_fast_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Bring a model that will compute on a CPU to the type in which that is fast.

    Args:
        model (`PreTrainedModel`): Of 16 bits, on a CPU without fast products of those, it is changed to float32, which
            holds every value that it has; where memory is short, that is said, and nothing is changed. Any other model
            stays as it is.

    Returns:
        `PreTrainedModel`: The same.
    """
    weights = [weight for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16)]
    if (
        not weights
        or weights[0].device.type != "cpu"
        or getattr(model, "is_quantized", False)
        or not slow_in_16_bits()
    ):
        return model
    name = _name(weights[0].dtype)
    if 4 * sum(weight.numel() for weight in weights) > psutil.virtual_memory().available // 2:
        logger.warning(
            "this CPU has no fast products of %s, and there is not enough memory for the model in float32: it will be slow",
            name,
        )
        return model
    logger.info("this CPU has no fast products of %s: computing in float32", name)
    model.float()
    model.config.dtype = torch.float32
    return model
