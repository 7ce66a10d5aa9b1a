"""Drop whole decoder layers from Hugging Face language models.

from hf_layerprune import LayerDropConfig, prune_with

config = LayerDropConfig(base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct", drop_layers=range(12, 19))
model = prune_with(config)
model.save_pretrained("adapter")  # small: the tuned tail and the plan
model.merge_and_unload().save_pretrained("pruned")  # a plain transformers checkpoint, no plugin needed
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import CheckpointError, CutError, LayerPruneError, UnsupportedModelError
from .registration import register_when_peft_is_imported
from .versions import __version__

if TYPE_CHECKING:
    from .adapter.config import LayerDropConfig
    from .adapter.model import LayerDropModel
    from .adapter.pruning import prune_with
    from .cut.memory import drop_layers
    from .heal.config import HealConfig as HealConfig
    from .heal.trainer import HealTrainer as HealTrainer
    from .measure.compare import compare_models
    from .stages.curve import quality_curve
    from .stages.prune import prune_model
    from .stages.quantize import record_quantized
    from .stages.rank import rank_layers
    from .stages.train import record_trained

# Without `HealConfig` and `HealTrainer`, since `import *` must work without TRL.
__all__ = [
    "CheckpointError", "CutError", "LayerDropConfig", "LayerDropModel", "LayerPruneError", "UnsupportedModelError",
    "__version__", "compare_models", "drop_layers", "prune_model", "prune_with", "quality_curve", "rank_layers",
    "record_quantized", "record_trained",
]  # fmt: skip

# Loaded on first use: each of them imports torch.
_LAZY = {
    "HealConfig": ".heal.config",
    "HealTrainer": ".heal.trainer",
    "LayerDropConfig": ".adapter.config",
    "LayerDropModel": ".adapter.model",
    "compare_models": ".measure.compare",
    "drop_layers": ".cut.memory",
    "quality_curve": ".stages.curve",
    "prune_model": ".stages.prune",
    "prune_with": ".adapter.pruning",
    "rank_layers": ".stages.rank",
    "record_quantized": ".stages.quantize",
    "record_trained": ".stages.train",
}

register_when_peft_is_imported()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_LAZY})
