"""What is trained after a cut, by name, and at which learning rate.

`lm_head`, `lm_head+last1`, `lm_head+last2`, `lm_head+last3` (the paper's ways: the head, the final norm, and so many of
the last layers), `lastN` (the same with the head left alone, so that a tied one stays tied), `cut` or `cutN` (so many
layers on each side of a cut), `behind` or `behindN` (so many layers in front of the first cut, and all behind it),
`lora`, `qlora`, `full`, and `auto`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CutError
from ..families import Cut

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..adapter.config import LayerDropConfig

NAMES = "auto, lm_head, lastN, lm_head+lastN, cutN, lm_head+cutN, behindN, lora, qlora, full"

# Adam's step does not shrink with a layer's width, and what a layer can take does: its best learning rate falls about
# as one over the width (arXiv:2203.03466). These are right for the tails of SmolLM2-135M, 576 wide, where they were
# tried (docs/experiments.md), and give 2.4e-5 and 1.2e-5 at 4096.
_PER_WIDTH = {"tail": 0.1, "full": 0.05}
# LoRA's own scale makes one value good for all widths. The paper trained it at 1e-5, as it did whole layers, twenty
# times less than LoRA is commonly trained at, so its comparison of the two says little.
_LORA = 2e-4


@dataclass(frozen=True)
class Method:
    """Which parameters are trained.

    Args:
        name (`str`): As it was asked for.
        kind (`str`): `"tail"` (whole layers, norm and head), `"lora"`, `"qlora"` or `"full"`.
        lm_head (`bool`, defaults to `False`): Whether the head is trained.
        last (`int`, defaults to 0): So many layers at the end of what remains.
        beside (`int`, defaults to 0): So many layers on each side of each cut.
        behind (`int`, defaults to 0): So many layers in front of the first cut, and all behind it. Gradients go through
            all of these anyway to reach the cut.
    """

    name: str
    kind: str
    lm_head: bool = False
    last: int = 0
    beside: int = 0
    behind: int = 0

    @property
    def final_norm(self) -> bool:
        """Whether the norm before the head is trained: with the head or the last layers, as the paper's code does."""
        return self.lm_head or self.last > 0 or self.behind > 0

    def layers(self, cut: Cut) -> list[int]:
        """Which layers are trained whole, as indices in the base.

        Args:
            cut (`Cut`): What stays.

        Returns:
            `list[int]`: Ascending.

        Raises:
            CutError: There are not so many.
        """
        if self.last > len(cut.keep):
            raise CutError(f"{self.name} trains the last {self.last} layers, but only {len(cut.keep)} remain")
        chosen = set(cut.keep[len(cut.keep) - self.last :])
        for dropped in cut.drop:
            place = sum(kept < dropped for kept in cut.keep)
            chosen |= set(cut.keep[max(0, place - self.beside) : place])
            chosen |= set(cut.keep[place : place + self.beside])
        if self.behind:
            first = sum(kept < cut.drop[0] for kept in cut.keep)
            chosen |= set(cut.keep[max(0, first - self.behind) :])
        return sorted(chosen)

    def learning_rate(self, hidden_size: int) -> float:
        """A learning rate to start from.

        Args:
            hidden_size (`int`): The model's width.

        Returns:
            `float`: For AdamW, at the schedule's peak.
        """
        return _LORA if self.kind in ("lora", "qlora") else _PER_WIDTH[self.kind] / hidden_size

    def tail_config(self, cut: Cut, base: str | None) -> LayerDropConfig:
        """The adapter that trains whole layers.

        Args:
            cut (`Cut`): The cut that was made.
            base (`str`, *optional*): What the adapter is of.

        Returns:
            `LayerDropConfig`: For `get_peft_model` on the pruned model.
        """
        from ..adapter.config import LayerDropConfig

        return LayerDropConfig(
            base_model_name_or_path=base,
            drop_layers=list(cut.drop),
            num_base_layers=cut.num_layers,
            tune_layers=self.layers(cut),
            tune_lm_head=self.lm_head,
            tune_final_norm=self.final_norm,
        )


def parse_method(name: str) -> Method:
    """Read a method's name.

    Args:
        name (`str`): One of those in this module's docstring but `auto`, which needs a model: see `choose_method`.

    Returns:
        `Method`: What it means.

    Raises:
        CutError: There is no such method.
    """
    if name in ("lora", "qlora", "full"):
        return Method(name, name)
    found = {"lm_head": 0, "last": 0, "cut": 0, "behind": 0}
    for part in name.split("+"):
        match = re.fullmatch(r"(lm_head)|(last)([1-9]\d*)|(cut|behind)([1-9]\d*)?", part)
        kind = match and (match[1] or match[2] or match[4])
        if not kind or found[kind]:
            raise CutError(f"method={name!r} is unknown; it may be {NAMES}, where N is a number of layers")
        found[kind] = int(match[3] or match[5] or 1)
    return Method(name, "tail", bool(found["lm_head"]), found["last"], found["cut"], found["behind"])


def choose_method(cut: Cut, tied: bool) -> tuple[Method, str]:
    """The method that suits a cut.

    Args:
        cut (`Cut`): What stays.
        tied (`bool`): Whether the head is the embedding matrix.

    Returns:
        `tuple[Method, str]`: The method, and why.
    """
    if cut.drop[-1] != cut.num_layers - 1:
        return parse_method("cut2"), "the cut is inside the model, so the layers beside it have to bridge it"
    last = min(3, len(cut.keep))
    if tied:
        return parse_method(f"last{last}"), "the end was dropped; the head is tied, and training it would untie it"
    return parse_method(f"lm_head+last{last}"), "the end was dropped, so head, norm and last layers have to take over"


def lora_config(*, r: int, alpha: int, dropout: float, target_modules: list[str] | str | None) -> LoraConfig:
    """LoRA on a pruned model, which is its base: on every linear layer but the head, unless named otherwise."""
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
