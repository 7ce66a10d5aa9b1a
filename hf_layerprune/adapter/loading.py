"""Load whatever a user may call a model: a folder, a Hub id, a GGUF file, or an adapter of any PEFT method."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from ..runtime import loading
from ..runtime.loading import load_base
from .reading import WHERE, find_adapter, load_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load what a user may call a model: a folder, a Hub id, an adapter of any PEFT method, or a GGUF file.

    Args:
        model (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: For `from_pretrained`, see `load_base`. `revision` and `subfolder` are those of `model` itself.

    Returns:
        `PreTrainedModel`: A plain model in evaluation mode, adapters merged.

    Raises:
        CheckpointError: There is no such model, it can't be loaded, or its weights are not those that its config
            asks for.
    """
    adapter = find_adapter(model, **kwargs)
    if adapter is None:
        return load_base(model, **kwargs)
    if not adapter.base_model_name_or_path:
        raise CheckpointError(f"{model} is an adapter that does not name its base; merge it first")
    from .config import LayerDropConfig
    from .pruning import load_merged

    if isinstance(adapter, LayerDropConfig):
        return load_merged(str(model), adapter, kwargs).eval()
    where = {name: kwargs[name] for name in WHERE if kwargs.get(name)}
    others = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    base = load_base(adapter.base_model_name_or_path, revision=adapter.revision, **others)
    return load_adapter(base, str(model), **where).merge_and_unload().eval()


def load_tokenizer(model: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a Hub id, an adapter (or else its base's), or a GGUF file.

    Args:
        model (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: For `from_pretrained`: `revision`, `token`, ...

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

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
