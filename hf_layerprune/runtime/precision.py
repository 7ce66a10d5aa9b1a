"""The type to compute in: many CPUs multiply 16-bit numbers several times more slowly than float32."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch

from .memory import free_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def is_slow_in_16_bits() -> bool:
    """Whether the CPU lacks fast bfloat16 multiplication, which x86 has from AVX-512 on.

    Without it, torch falls back to plain loops, which take 4 to 9 times as long as float32.
    """
    try:
        return not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except AttributeError:  # torch was built without oneDNN
        return True


def warn_if_slow(model: PreTrainedModel) -> None:
    """Warn once about a 16-bit model on a CPU without fast 16-bit multiplication."""
    if model.dtype in (torch.bfloat16, torch.float16) and model.device.type == "cpu" and is_slow_in_16_bits():
        what = f"this CPU has no fast {_dtype_name(model.dtype)} multiplication, so this is slow"
        _warn_once(f"{what}; dtype float32 is faster but needs twice the memory")


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight is quantised; one of torchao's says that it has 16-bit numbers."""
    return not weight.is_floating_point() or weight.dtype.itemsize < 2 or type(weight).__module__.startswith("torchao")


def to_fast_precision(model: PreTrainedModel) -> PreTrainedModel:
    """Convert a 16-bit model on a CPU without fast 16-bit multiplication to float32 in place, which is exact.

    Any other model is left unchanged. If memory is short, a warning is logged and nothing changes.
    """
    weights = [weight for weight in model.parameters() if weight.dtype in (torch.bfloat16, torch.float16)]
    if (
        not weights
        or weights[0].device.type != "cpu"
        or getattr(model, "is_quantized", False)
        or not is_slow_in_16_bits()
    ):
        return model
    name = _dtype_name(weights[0].dtype)
    if 4 * sum(weight.numel() for weight in weights) > free_bytes(torch.device("cpu")) // 2:
        logger.warning(
            "this CPU has no fast %s multiplication, and not enough memory for float32: the model will be slow", name
        )
        return model
    logger.info("this CPU has no fast %s multiplication: computing in float32", name)
    model.float()
    model.config.dtype = torch.float32
    return model
