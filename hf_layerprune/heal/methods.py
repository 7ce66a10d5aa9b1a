"""The healing methods: which weights they train, and at which learning rate.

A method's name is an entry of `METHODS`, or several entries that train whole layers joined by `+`, such as the paper's
`lm_head+last3`. To add a method, add an entry: its help, its learning rate, and either the layers that it trains or
the adapter that it puts on the model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import CutError, LayerPruneError
from ..families import Cut

if TYPE_CHECKING:
    from peft import PeftConfig
    from trl import ModelConfig

    from ..adapter.config import LayerDropConfig


# --- which layers -----------------------------------------------------------------------------------------


def _last_layers(cut: Cut, n: int) -> Collection[int]:
    if n > len(cut.keep):
        raise CutError(f"last{n} trains the last {n} layers, but only {len(cut.keep)} remain")
    return cut.keep[len(cut.keep) - n :]


def _layers_around_cut(cut: Cut, n: int) -> Collection[int]:
    places = {sum(kept < dropped for kept in cut.keep) for dropped in cut.drop}
    return {layer for place in places for layer in cut.keep[max(0, place - n) : place + n]}


def _layers_from_cut(cut: Cut, n: int) -> Collection[int]:
    first = sum(kept < cut.drop[0] for kept in cut.keep)
    return cut.keep[max(0, first - n) :]


# --- adapters and how the model is loaded -----------------------------------------------------------------


def _lora(settings: ModelConfig) -> PeftConfig:
    """TRL's LoRA, on every linear layer but the head unless the settings say where."""
    from trl import get_peft_config

    where: Any = settings.lora_target_modules or (None if settings.lora_target_parameters else "all-linear")
    made: Any = get_peft_config(replace(settings, use_peft=True, lora_target_modules=where))
    if isinstance(where, str) and re.fullmatch(r"[\w.]+", where):
        made.target_modules = {where}  # of a list of one, TRL leaves a string, which PEFT takes for a pattern
    return made


def _four_bit_loading() -> dict[str, Any]:
    import torch

    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise LayerPruneError('the method qlora needs bitsandbytes: pip install "hf-layerprune[quant]"') from None
    from transformers import BitsAndBytesConfig

    kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
    return {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, **kind)}


# --- the methods ------------------------------------------------------------------------------------------

# Adam's step does not shrink with a layer's width, but the step that a layer tolerates does: the best learning rate is
# about proportional to 1 / width (arXiv:2203.03466). These constants were tuned on the tails of SmolLM2-135M, whose
# width is 576 (docs/experiments.md), and give 2.4e-5 and 1.2e-5 at width 4096. With hundreds of thousands of tokens,
# twice as much does well after a cut in the middle; with few, it harms a model that is still close to the dense one.
_LAYERS, _FULL = 0.1, 0.05
# LoRA's own scaling makes one value work for all widths. The paper trained LoRA at 1e-5, the rate that it used for
# whole layers and a twentieth of what is common for LoRA, so its comparison of the two says little.
_LORA = 2e-4


@dataclass(frozen=True)
class Tuning:
    """One way to train a pruned model.

    Args:
        name (`str`): The name without its number.
        help (`str`): What is trained, in a few words.
        learning_rate (`Callable[[int], float]`): AdamW's peak learning rate for a model's width.
        layers (`Callable[[Cut, int], Collection[int]]`, *optional*): For methods that train whole layers, which can be
            joined: maps the cut and the number after the name to layer indices in the base.
        number (`str`, defaults to `""`): Whether the name takes a number: `""` for none, `"N"` if it is required,
            `"[N]"` if it is optional and defaults to 1.
        lm_head (`bool`, defaults to `False`): Whether the head is trained.
        final_norm (`bool`, defaults to `False`): Whether the norm before the head is trained.
        adapter (`Callable`, *optional*): For other methods: makes the PEFT config from the settings of LoRA. Without
            `adapter` and `layers`, all weights are trained.
        loading_kwargs (`Callable[[], dict]`, *optional*): Extra arguments for `from_pretrained`; raises `LayerPruneError` if
            the method can't run.
    """

    name: str
    help: str
    learning_rate: Callable[[int], float]
    layers: Callable[[Cut, int], Collection[int]] | None = None
    number: str = ""
    lm_head: bool = False
    final_norm: bool = False
    adapter: Callable[[ModelConfig], PeftConfig] | None = None
    loading_kwargs: Callable[[], dict[str, Any]] | None = None

    def count(self, word: str) -> int | None:
        """The number after the name, 0 for a method that takes none; `None` if the word is not this method."""
        number = {"": "", "N": r"([1-9]\d*)", "[N]": r"([1-9]\d*)?"}[self.number]
        match = re.fullmatch(re.escape(self.name) + number, word)
        return None if match is None else int((match[1] or 1) if self.number else 0)


def _per_width(rate: float) -> Callable[[int], float]:
    return lambda width: rate / width


METHODS: dict[str, Tuning] = {
    method.name: method
    for method in (
        Tuning("lm_head", "the head and the norm before it", _per_width(_LAYERS), lambda cut, n: (),
               lm_head=True, final_norm=True),
        Tuning("last", "the last N layers and the final norm; a tied head stays tied", _per_width(_LAYERS), _last_layers, "N",
               final_norm=True),
        Tuning("cut", "up to N layers on each side of the cut", _per_width(_LAYERS), _layers_around_cut, "[N]"),
        # Gradients pass through all layers after the cut anyway.
        Tuning("behind", "up to N layers before the first cut, all layers after it, and the final norm",
               _per_width(_LAYERS), _layers_from_cut, "[N]", final_norm=True),
        Tuning("lora", "LoRA on every linear layer but the head", lambda width: _LORA, adapter=_lora),
        Tuning("qlora", "LoRA on a 4-bit model", lambda width: _LORA, adapter=_lora, loading_kwargs=_four_bit_loading),
        Tuning("full", "all weights", _per_width(_FULL)),
    )
}  # fmt: skip


def method_help() -> str:
    """What each method trains, for the help of `--method`."""
    lines = [f"{method.name}{method.number} ({method.help})" for method in METHODS.values()]
    return f"What is trained: auto (depends on the cut), {', '.join(lines)}; methods that train layers can be joined with +"


@dataclass(frozen=True)
class Method:
    """A parsed method: its name as the user gave it, and the methods in it, with their numbers."""

    name: str
    parts: tuple[tuple[Tuning, int], ...]

    @property
    def trains_layers(self) -> bool:
        """Whether whole layers, norm and head are trained, as an adapter of the dense base."""
        return self.parts[0][0].layers is not None

    @property
    def is_lora(self) -> bool:
        """Whether low-rank matrices are trained."""
        return self.parts[0][0].adapter is not None

    def layers(self, cut: Cut) -> list[int]:
        """The layers that are trained whole, as indices in the base, ascending.

        Raises:
            CutError: Fewer layers remain than the method trains.
        """
        return sorted({layer for part, n in self.parts if part.layers for layer in part.layers(cut, n)})

    def learning_rate(self, hidden_size: int) -> float:
        """AdamW's peak learning rate for a model of this width."""
        return self.parts[0][0].learning_rate(hidden_size)

    def tail_config(self, cut: Cut, base: str | None) -> LayerDropConfig:
        """The adapter that trains whole layers of a pruned model, with its base if that is known."""
        from ..adapter.config import LayerDropConfig

        return LayerDropConfig(
            base_model_name_or_path=base,
            drop_layers=list(cut.drop),
            num_base_layers=cut.num_layers,
            tune_layers=self.layers(cut),
            tune_lm_head=any(part.lm_head for part, _ in self.parts),
            tune_final_norm=any(part.final_norm for part, _ in self.parts),
        )

    def adapter(self, settings: ModelConfig) -> PeftConfig | None:
        """The adapter of a method that does not train whole layers; `None` if all weights are trained."""
        make = self.parts[0][0].adapter
        return None if make is None else make(settings)

    def loading_kwargs(self) -> dict[str, Any]:
        """Extra arguments for `from_pretrained`."""
        load = self.parts[0][0].loading_kwargs
        return {} if load is None else load()


def parse_method(name: str) -> Method:
    """Parse the name of a method: one or several of `METHODS`. `auto` needs a model: see `choose_method`.

    Raises:
        CutError: There is no such method.
    """
    parts: dict[str, tuple[Tuning, int]] = {}
    words = name.split("+")
    for word in words:
        for tuning in METHODS.values():
            count = tuning.count(word)
            if count is not None and (len(words) == 1 or tuning.layers is not None):
                parts[tuning.name] = tuning, count
    if len(parts) != len(words):
        known = ", ".join(["auto", *(f"{method.name}{method.number}" for method in METHODS.values())])
        raise CutError(
            f"method={name!r} is unknown; it may be {known}, where N is a number of layers; methods that "
            "train layers may be joined with +"
        )
    return Method(name, tuple(parts.values()))


# Up to this width, weights and optimizer states of everything after a cut are a few GB.
_NARROW_WIDTH = 2048


def choose_method(cut: Cut, tied: bool, width: int) -> tuple[Method, str]:
    """The method that suits a cut of a model of this hidden size, whose head may be tied; and the reason."""
    if cut.drop[-1] != cut.num_layers - 1:
        if width <= _NARROW_WIDTH:
            why = "the cut is inside the model, and gradients pass through all layers after it"
            return parse_method("behind2"), why
        return parse_method("cut2"), "the cut is inside a large model, so only the layers next to it are trained"
    last = min(3, len(cut.keep))
    if tied:
        return parse_method(f"last{last}"), "the last layers were dropped; training the tied head would untie it"
    return parse_method(f"lm_head+last{last}"), "the last layers were dropped, so head, norm and new last layers adapt"
