"""Engines that go by a layer's number where transformers goes by the config. `make engines` tries them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from .fields import Cut

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Counted(NamedTuple):
    """Every `period`-th layer has `value` in the field, as these engines count."""

    field: str
    value: Any
    period: int
    engines: str


COUNTED = {
    "gemma2": Counted("layer_types", "full_attention", 2, "llama.cpp"),
    "gemma3_text": Counted("layer_types", "full_attention", 6, "llama.cpp"),
    "gpt_oss": Counted("layer_types", "full_attention", 2, "vLLM, llama.cpp and ONNX Runtime"),
    "smollm3": Counted("no_rope_layers", 0, 4, "llama.cpp"),
}


def misread(config: PreTrainedConfig, cut: Cut) -> str | None:
    """Find an engine that would run a pruned model with other kinds of layers than it has.

    Args:
        config (`PreTrainedConfig`): The base's, or that of its text decoder.
        cut (`Cut`): Which layers stay.

    Returns:
        `str | None`: One line for a warning.
    """
    text = config.get_text_config(decoder=True)
    rule = COUNTED.get(text.model_type)
    kinds = getattr(text, rule.field, None) if rule else None
    if rule is None or not kinds:
        return None
    for new, old in enumerate(cut.keep):
        if (kinds[old] == rule.value) != ((new + 1) % rule.period == 0):
            return (
                f"in {rule.engines}, every {rule.period} layers of a {text.model_type} count as a group, whatever "
                f"{rule.field} says, and layer {old}, now {new}, would run as the other kind; to serve the model there, "
                "drop whole groups (docs/engines.md)"
            )
    return None
