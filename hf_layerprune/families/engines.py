"""Engines that infer a layer's kind from its index, where transformers reads the config. `make engines` tests them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class PeriodRule(NamedTuple):
    """These engines assume that every `period`-th layer has `value` in the field."""

    field: str
    value: Any
    period: int
    engines: str


PERIOD_RULES = {
    "gemma2": PeriodRule("layer_types", "full_attention", 2, "llama.cpp"),
    "gemma3_text": PeriodRule("layer_types", "full_attention", 6, "llama.cpp"),
    "gpt_oss": PeriodRule("layer_types", "full_attention", 2, "vLLM, llama.cpp and ONNX Runtime"),
    "smollm3": PeriodRule("no_rope_layers", 0, 4, "llama.cpp"),
}


REMEDY = "to serve the model there, drop whole groups (docs/engines.md)"


def describe_period_rule(config: PreTrainedConfig) -> str | None:
    """Which engines infer the kinds of layers in models of this type, as a clause; `None` if none does."""
    text = config.get_text_config(decoder=True)
    rule = PERIOD_RULES.get(text.model_type)
    if rule is None or not getattr(text, rule.field, None):
        return None
    return (
        f"in {rule.engines}, every {rule.period} layers of a {text.model_type} count as a group, whatever {rule.field} "
        "says"
    )


def describe_misread_layers(config: PreTrainedConfig, keep: Sequence[int] | None = None) -> str | None:
    """Describe, in one line, which layers an engine would run as another kind; `None` if there are none.

    The config is the base's, or that of its text decoder. By default, all layers stay, for a model that was pruned
    before.
    """
    about, text = describe_period_rule(config), config.get_text_config(decoder=True)
    if about is None:
        return None
    rule = PERIOD_RULES[text.model_type]
    kinds = getattr(text, rule.field)
    for new, old in enumerate(range(len(kinds)) if keep is None else keep):
        if (kinds[old] == rule.value) != ((new + 1) % rule.period == 0):
            which = f"layer {new}" if keep is None else f"layer {old}, now {new},"
            return f"{about}, and {which} would run as the other kind"
    return None
