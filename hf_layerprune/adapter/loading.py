"""Load whatever a user may call a model: a folder, a Hub id, a GGUF file, or an adapter of any PEFT method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..runtime import loading
from ..runtime.mapping import load_mapped
from .pruning import load_merged
from .reading import find_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(source: str | Path, *, mapped: bool = False, **kwargs: Any) -> PreTrainedModel:
    """Load what a user may call a model as a plain model in evaluation mode, with adapters merged.

    Args:
        source (`str` or `Path`): A Hub id, a folder, or a GGUF file; a model, or an adapter of any PEFT method.
        mapped (`bool`, *optional*, defaults to `False`): Whether the layers may stay on disk, see `load_mapped`. Adapters
            are loaded into memory all the same.
        kwargs: For `from_pretrained`, see `load_base`. `revision` and `subfolder` are those of `source` itself.

    Raises:
        CheckpointError: There is no such model, it can't be loaded, or its weights are not those that its config
            asks for.
    """
    adapter = find_adapter(source, **kwargs)
    if adapter is not None:
        return load_merged(str(source), adapter, kwargs).eval()
    return (load_mapped if mapped else loading.load_base)(source, **kwargs).eval()


def load_tokenizer(model: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a Hub id, an adapter (or else its base's), or a GGUF file.

    Raises:
        CheckpointError: It has none that transformers can load.
    """
    try:
        return loading.load_tokenizer(model, **kwargs)
    except CheckpointError:
        adapter = find_adapter(model, **kwargs)
        if adapter is None or not adapter.base_model_name_or_path:
            raise
        return loading.load_tokenizer(adapter.base_model_name_or_path, revision=adapter.revision)
