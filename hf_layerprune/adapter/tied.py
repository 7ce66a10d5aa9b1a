"""An output head that is tied to the embeddings has to be untied before it is tuned."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .. import families
from ..families.layout import find_output_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# The attribute of a model that says how to tie its head again.
TIED = "_layer_drop_tied"


def untie_head(model: PreTrainedModel) -> int:
    """Stop transformers from tying the head again; returns how many parameters that adds.

    The tuned copy that PEFT makes has a weight of its own.
    """
    parts = (model.config, families.text_config(model.config))
    configs = [part for part in parts if getattr(part, "tie_word_embeddings", False)]
    for config in configs:
        config.tie_word_embeddings = False
    name, tied = f"{find_output_head(model)}.weight", getattr(model, "all_tied_weights_keys", {})
    setattr(model, TIED, (configs, {name: tied.pop(name)} if name in tied else {}))
    return model.get_output_embeddings().weight.numel()


def retie_head(model: PreTrainedModel) -> None:
    """Undo `untie_head`."""
    configs, forgotten = getattr(model, TIED)
    for config in configs:
        config.tie_word_embeddings = True
    model.all_tied_weights_keys.update(forgotten)


def warn_about_untying(added: int, saved: int | None) -> None:
    """Say what untying costs, compared with what the dropped layers save (both in parameters)."""
    more = ""
    if saved is not None and added >= saved:
        more = f", more than the {saved:,} that the dropped layers save: the pruned model is larger than its base"
    logger.warning(
        "lm_head is tied to the embeddings; tuning it unties it, which adds %s parameters%s. Use tune_lm_head=False "
        "(--no-tune-lm-head) to keep it tied.",
        f"{added:,}",
        more,
    )
