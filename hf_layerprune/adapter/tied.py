"""An output head that is tied to the embeddings has to be untied before it is tuned."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .. import families
from ..families.layout import find_output_head

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# The attribute of a model that says how to tie its head again.
TIED = "_layer_drop_tied"


def _tied_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    parts = {id(part): part for part in (model.config, families.text_config(model.config))}
    return [part for part in parts.values() if getattr(part, "tie_word_embeddings", False)]


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head is the very tensor of the embeddings."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", None) is not None


def untie(model: PreTrainedModel) -> int:
    """Stop transformers from tying the head again. The tuned copy that PEFT makes has a weight of its own.

    Returns:
        `int`: How many parameters that adds.
    """
    configs = _tied_configs(model)
    for config in configs:
        config.tie_word_embeddings = False
    head = find_output_head(model)
    tied = getattr(model, "all_tied_weights_keys", {})
    forgotten = {name: tied.pop(name) for name in list(tied) if name == f"{head}.weight"}
    setattr(model, TIED, (configs, forgotten))
    return model.get_output_embeddings().weight.numel()


def tell_of_untying(added: int, saved: int | None) -> None:
    """Say what untying costs, beside what the dropped layers save (both in parameters)."""
    message = f"lm_head is tied to the embeddings; tuning it unties it, which adds {added:,} parameters"
    if saved is not None and added >= saved:
        logger.warning(
            "%s, more than the %s that the dropped layers save: the pruned model is larger than its base. "
            "Use tune_lm_head=False to keep the head tied.",
            message,
            f"{saved:,}",
        )
    else:
        logger.warning("%s. Use tune_lm_head=False to keep it tied.", message)


def tie_again(model: PreTrainedModel) -> None:
    """Undo `untie`."""
    configs, forgotten = getattr(model, TIED)
    for config in configs:
        config.tie_word_embeddings = True
    model.all_tied_weights_keys.update(forgotten)
