"""Quantise a repeated cut as its history says."""

from __future__ import annotations

import logging
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, boundary
from ...records.history import Stage
from ...records.quantized import is_repeatable_method, method_of

logger = logging.getLogger(__name__)


def is_repeatable(stage: Stage | None) -> bool:
    """Whether a stage quantised a model by a method that gives the same bytes again.

    Args:
        stage (`Stage`, *optional*): The stage, if there is one.

    Returns:
        `bool`: `False` for a method that depends on data, or that is not known.
    """
    return stage is not None and is_repeatable_method(stage.settings.get("quantization_config"))


def quantize_again(stage: Stage, cut: Path, target: Path) -> str:
    """Quantise a cut on the CPU.

    Args:
        stage (`Stage`): The stage to repeat.
        cut (`Path`): The folder of the unquantised cut.
        target (`Path`): The folder to write.

    Returns:
        `str`: What quantised it, with its version, and the version that did so first if that is another one.

    Raises:
        CheckpointError: The method's package is not installed, or it does not accept the recorded settings.
    """
    import torch

    from ...runtime.loading import load_base

    told, dtype = stage.settings["quantization_config"], getattr(torch, str(stage.settings.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"lineage.json says that a {stage.settings.get('dtype')!r} model was quantised")
    method = method_of(told)
    try:
        here, then = version(method), (stage.entry.get("versions") or {}).get(method)
    except PackageNotFoundError:
        raise CheckpointError(
            f"the model was quantised with {method}, which is needed to repeat that; install it: pip install {method}"
        ) from None
    logger.info("quantising the cut with %s, to compare", method)
    with boundary(f"{method} {here} can't repeat how the model was quantised"):
        model = load_base(cut, quantization_config=_settings(told), dtype=dtype, device_map="cpu")
        model.save_pretrained(target)
    return f"{method} {here}" + (f" ({then} was used)" if then not in (None, here) else "")


def _settings(told: dict[str, Any]) -> Any:
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(told))
