"""An output head that is tied to the embeddings has to be untied before one of them is tuned."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .. import families
from ..errors import CutError
from ..families.layout import find_output_head, ties_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import LayerDropConfig

logger = logging.getLogger(__name__)

# The attribute of a model that says how to tie its head again.
TIED = "_layer_drop_tied"


def tunes_tied_matrix(model: PreTrainedModel, names: Collection[str]) -> bool:
    """Whether modules that are tuned have the matrix that the head shares with the embeddings, or did before `untie_head`.

    PEFT tunes a copy of a module, and transformers would tie the head to that, or to the original, as it happens.
    """
    embeddings: Any = model.get_input_embeddings()
    matrix = getattr(getattr(embeddings, "original_module", embeddings), "weight", None)
    tied = matrix is not None and (hasattr(model, TIED) or ties_head(model))
    return tied and any(one is matrix for name in names for one in model.get_submodule(name).parameters())


def check_counted(config: LayerDropConfig, model: PreTrainedModel) -> None:
    """Refuse a target for the size of a model whose head is untied without being counted.

    Raises:
        CutError: `modules_to_save` would untie it.
    """
    uncounted = config.is_new and config.target and not config.tune_lm_head
    if uncounted and tunes_tied_matrix(model, config.modules_to_save or ()):
        raise CutError(
            f"{config.target} does not count the matrix that is added when modules_to_save unties lm_head from the embeddings; set "
            "tune_lm_head=True, which is counted, or leave out both the embeddings and lm_head"
        )


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
        "lm_head is tied to the embeddings; tuning one of them unties it, which adds %s parameters%s. To keep it tied, use "
        "tune_lm_head=False (--no-tune-lm-head), and leave both out of modules_to_save.",
        f"{added:,}",
        more,
    )
