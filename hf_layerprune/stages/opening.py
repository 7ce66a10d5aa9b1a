"""Load a base to run its layers one at a time, and say in which type its cut is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..runtime.loading import load_config
from .requests import AdviseRequest, RankRequest

if TYPE_CHECKING:
    import torch

    from ..runtime.walk import LayerWalk

WalkRequest = RankRequest | AdviseRequest


def open_base(request: WalkRequest) -> tuple[Any, torch.device]:
    """Load a request's base in the requested type, and return it with the device that will run its layers.

    Raises:
        CutError: The device can't be used. Nothing was loaded.
    """
    import torch

    from ..runtime.devices import pick_device
    from ..runtime.mapping import load_mapped

    device = torch.device(pick_device(request.device))
    return load_mapped(request.base, revision=request.revision, dtype=request.dtype), device


def dtype_of_cut(request: WalkRequest, repair: str | None) -> str:
    """The type to write a cut of a base in, after it was scored in the requested one.

    Weights are converted only where a repair needs that: quantised ones have none, and float16 may overflow.
    """
    config = load_config(request.base, revision=request.revision) if repair else None
    converts = hasattr(config, "quantization_config") or str(getattr(config, "dtype", None)) == "torch.float16"
    return request.dtype if converts else "auto"


def open_walk(request: WalkRequest, model: Any, device: torch.device) -> LayerWalk:
    """Prepare the model from [`open_base`] to be run layer by layer on that device."""
    from ..runtime.precision import to_fast_precision
    from ..runtime.walk import LayerWalk

    if request.dtype == "auto" and device.type == "cpu":
        to_fast_precision(model)
    return LayerWalk(model, device=device)
